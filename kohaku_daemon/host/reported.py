"""What runners say, before it is believed: numbers that can be, words of a length.

A runner's machine may be anybody's once it is broken into, and what it says is stored, shown
to people and reckoned with. Numbers that cannot be are refused, because only a bug or an
attacker says them; words are cut, because an honest program's last words may be long.

Knows: what a number or a word of each kind may be.
Does not know: nodes, tasks, attempts; which reports count is the engine's to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from protocol.errors import BadRequest
from protocol.messages.runner import AttemptReport
from protocol.models.node import Inventory, Readings
from protocol.models.task import Exit

#: What a store of signed 64-bit numbers can keep.
_LARGEST: Final = 2**63 - 1
#: Characters of a remark, and of the sentence about an end: both stay in a task's history.
LONGEST_REMARK: Final = 1000
#: The kernel's own bounds: CONFIG_NR_CPUS is 8192 in Debian's, signals end at 64 (man 7 signal).
_MOST_CORES: Final = 8192
_LAST_SIGNAL: Final = 64
_MOST_TASKS: Final = 100_000


def check_inventory(inventory: Inventory) -> None:
    """Let an inventory pass that a machine could have.

    Raises:
        BadRequest: It could not, with the reason.
    """
    _check_distinct("cores", inventory.cores, most=_MOST_CORES)
    _check_distinct("NUMA nodes", [numa.number for numa in inventory.numa], most=_MOST_CORES)
    _check_distinct("indices of GPUs", [gpu.index for gpu in inventory.gpus], most=_MOST_CORES)
    if len({gpu.uuid for gpu in inventory.gpus}) < len(inventory.gpus):
        raise BadRequest("the inventory: two GPUs with one UUID")
    sizes = [
        inventory.memory,
        *(numa.memory for numa in inventory.numa),
        *(gpu.memory for gpu in inventory.gpus),
    ]
    _check_sizes("the inventory", sizes)
    if not 0 <= inventory.max_tasks <= _MOST_TASKS:
        raise BadRequest(f"the inventory: max_tasks is {inventory.max_tasks}")


def check_readings(readings: Readings) -> None:
    """Let readings pass that are numbers.

    Raises:
        BadRequest: One is infinite or not a number, or a size that cannot be.
    """
    floats = [readings.at, readings.cpu_percent, readings.load_1m, *readings.temperatures.values()]
    sizes = [readings.memory_total, readings.memory_available, readings.swap_used]
    for disk in readings.disks:
        sizes += (disk.total, disk.free)
    for gpu in readings.gpus:
        # What a GPU does not say is as good as nothing.
        floats += (
            gpu.used_percent, gpu.temperature or 0.0, gpu.power or 0.0, gpu.power_limit or 0.0,
            gpu.fan_percent or 0.0,
        )  # fmt: skip
        sizes += (gpu.memory_used, gpu.processes_left_out)
        for process in gpu.processes:
            sizes += (process.pid, process.memory or 0, process.task or 0)
    for task in readings.tasks:
        floats += (task.cpu_s, task.cpu_percent)
        sizes += (task.task, task.memory, task.processes)
    # A sum that is finite has no term that is not; one that is not may have run over.
    if not math.isfinite(sum(floats)) and not all(map(math.isfinite, floats)):
        raise BadRequest("the readings: one is not a finite number")
    _check_sizes("the readings", sizes)


def tidy(report: AttemptReport) -> AttemptReport:
    """Give a report as it may be kept.

    Raises:
        BadRequest: It says how a program ended in numbers that no program can end with.
    """
    exit_ = report.exit
    if exit_ is not None:
        _check_exit(report, exit_)
        if len(exit_.message) > LONGEST_REMARK:
            exit_ = replace(exit_, message=_cut(exit_.message))
    times_fit = math.isfinite(report.at) and math.isfinite(report.started_at)
    if exit_ is report.exit and times_fit and len(report.note) <= LONGEST_REMARK:
        return report
    return replace(
        report,
        exit=exit_,
        note=_cut(report.note),
        at=report.at if math.isfinite(report.at) else 0.0,
        started_at=report.started_at if math.isfinite(report.started_at) else 0.0,
    )


def _check_exit(report: AttemptReport, exit_: Exit) -> None:
    if exit_.code is not None and not 0 <= exit_.code <= 255:
        raise BadRequest(f"the report of task {report.task}: exit code {exit_.code}")
    if exit_.signal is not None and not 1 <= exit_.signal <= _LAST_SIGNAL:
        raise BadRequest(f"the report of task {report.task}: signal {exit_.signal}")
    _check_sizes(f"the report of task {report.task}", [exit_.oom_kills])


def _check_distinct(subject: str, numbers: Iterable[int], *, most: int) -> None:
    seen = set[int]()
    for number in numbers:
        if not 0 <= number < most:
            raise BadRequest(f"the inventory: {number} among its {subject}")
        if number in seen:
            raise BadRequest(f"the inventory: {number} twice among its {subject}")
        seen.add(number)


def _check_sizes(subject: str, sizes: Sequence[int]) -> None:
    if sizes and min(sizes) >= 0 and max(sizes) <= _LARGEST:
        return
    for size in sizes:
        if not 0 <= size <= _LARGEST:
            raise BadRequest(f"{subject}: {size} is no size or number of anything")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_REMARK else text[: LONGEST_REMARK - 3] + "..."
