"""A task's output on its way from the runner through the host to a client."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from frame import Row, interleave
from stage import Stage, cluster

from protocol.connection import Connection
from protocol.ids import TaskId
from protocol.messages.stream import LogChunk, OpenLogs, Source
from protocol.methods import TASK_LOGS
from protocol.models.task import TaskSpec

_SIZE: Final = 400_000_000
_LINE: Final = "a line of output, as programs write them"
_WRITE: Final = f"yes '{_LINE}' | head -c {_SIZE}"
_STALLED: Final = 8
#: Daemons that the output goes through.
_DAEMONS: Final = ("host", "runner-node1")
_PATIENCE_S: Final = 120.0


@dataclass(slots=True)
class _Figures:
    #: How much host and runner together grew while following, at their peak.
    grown_mb: list[float] = field(default_factory=list)
    #: The same with readers that do not read.
    grown_stalled_mb: list[float] = field(default_factory=list)


def logs(rounds: int) -> list[Row]:
    """Following 400 MB while a task writes it; memory meanwhile; readers that do not read."""
    figures = _Figures()
    with cluster(KOHAKU_RUNNER_LOG_CAP="2G", KOHAKU_RUNNER_LOG_TOTAL="6G") as place:
        ours, beside, piped = interleave(
            rounds,
            lambda: _follow(place, 0, figures.grown_mb),
            lambda: _follow(place, _STALLED, figures.grown_stalled_mb),
            _through_pipes,
        )
    what = "following a task that writes 400 MB"
    memory = "growth of host and runner at their peak"
    return [
        Row("logs.follow", what, "MB/s", ours, "two pipes", piped, ">= 100 MB/s"),
        Row(
            "logs.beside_stalled", f"the same beside {_STALLED} readers that do not read", "MB/s",
            beside, "without them", ours, ">= 0.9 x",
        ),
        Row(
            "logs.memory", f"{memory}, one reader", "MB", figures.grown_mb[-rounds:],
            goal="<= 32 MB",
        ),
        Row(
            "logs.memory_stalled", f"{memory}, {_STALLED} stalled readers beside it", "MB",
            figures.grown_stalled_mb[-rounds:], goal="<= 64 MB",
        ),
    ]  # fmt: skip


def _follow(place: Stage, stalled: int, grown_mb: list[float]) -> float:
    with _peaks(place) as grown:
        rate = asyncio.run(_follow_one(place, stalled))
    grown_mb.append(grown())
    return rate


async def _follow_one(place: Stage, stalled: int) -> float:
    """Submit and follow at once; give the rate from the start of the program to its end."""
    got = 0
    async with asyncio.timeout(_PATIENCE_S), place.connect() as there, AsyncExitStack() as stack:
        # The others stall on a task that has written, so that nothing but the reading is new.
        if stalled:
            written = await there.submit(TaskSpec(command=("sh", "-c", _WRITE), cores=0))
            await there.wait(written)
            for _ in range(stalled):
                await _stall(place, stack, next(written.ids()))
        submitted = await there.submit(TaskSpec(command=("sh", "-c", _WRITE), cores=0))
        began = time.perf_counter()
        async for item in there.logs(next(submitted.ids()), follow=True, sources=(Source.STDOUT,)):
            if isinstance(item, LogChunk):
                got += len(item.data)
        wall_s = time.perf_counter() - began
    if got != _SIZE:
        raise RuntimeError(f"{got} bytes of {_SIZE} came")
    return got / wall_s / 1e6


async def _stall(place: Stage, stack: AsyncExitStack, task: TaskId) -> None:
    """Open a reader and never read."""
    connection = await stack.enter_async_context(
        await Connection.dial(place.url, token=place.token, agent="bench")
    )
    ticket = await connection.call(TASK_LOGS, OpenLogs(task=task, follow=True))
    await stack.enter_async_context(await connection.open_data(ticket.path, ticket.ticket))


def _through_pipes() -> float:
    began = time.perf_counter()
    subprocess.run(f"{_WRITE} | cat | cat >/dev/null", shell=True, check=True)
    return _SIZE / (time.perf_counter() - began) / 1e6


@contextmanager
def _peaks(place: Stage) -> Iterator[Callable[[], float]]:
    """Give how much MB the daemons' peaks are above what they had at the beginning."""
    pids = [place.pid(name) for name in _DAEMONS]
    before = []
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted anew (man 5 proc)
        before.append(_kib(pid, "VmRSS"))

    def grown_mb() -> float:
        grown = (_kib(pid, "VmHWM") - had for pid, had in zip(pids, before, strict=True))
        return sum(grown) * 1024 / 1e6

    yield grown_mb


def _kib(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])
