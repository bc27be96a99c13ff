"""Values of the cluster as the words people read: one way for each.

Knows: how a state, an end, an age, a claim or a command is said, and which colour helps.
Does not know: tables, terminals, JSON. Sizes and durations come from ``protocol.units``.

A colour never says more than the word beside it. All text given here is safe to print.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime
from signal import Signals
from typing import Final, assert_never

from kohaku_tui.sanitize import clean_line
from protocol.models.node import Node, NodeState
from protocol.models.task import Cause, Exit, Mount, Task, TaskSpec, TaskState
from protocol.units import render_duration, render_size

#: What stands where there is nothing to say.
NOTHING: Final = "-"

#: How a runner says what share of an image is there.
_SHARE: Final = re.compile(rf"{TaskState.PREPARING} [0-9]{{1,3}} %")

_STATE_STYLES: Final[Mapping[str, str]] = {
    TaskState.QUEUED: "yellow",
    TaskState.ASSIGNED: "cyan",
    TaskState.PREPARING: "cyan",
    TaskState.RUNNING: "green",
    TaskState.PAUSED: "magenta",
    TaskState.COMPLETED: "dim",
    TaskState.FAILED: "red",
    TaskState.KILLED: "red",
    TaskState.OOM_KILLED: "red",
    TaskState.LOST: "bold red",
    NodeState.ONLINE: "green",
    NodeState.OFFLINE: "bold red",
}


def state_style(state: str) -> str:
    """Give the rich style of a state of a task or a node; empty for one not known here."""
    return _STATE_STYLES.get(state, "")


def task_state(task: Task) -> str:
    """Say a task's state: with the status it ended with, what is asked of it, how far it is."""
    if task.state is TaskState.PREPARING and not task.kill_asked and task.reason:
        return preparing_text(task.reason)
    if task.state is TaskState.FAILED and task.exit is not None and task.exit.code is not None:
        return f"{task.state} ({task.exit.code})"
    if task.kill_asked and not task.state.is_final:
        return f"{task.state}, to be killed"
    return str(task.state)


def preparing_text(reason: str) -> str:
    """Say how far the preparation of a task is, such as ``preparing 43 %``.

    What else there is to say of it is too long for a state.
    """
    return reason if _SHARE.fullmatch(reason) else str(TaskState.PREPARING)


def node_state(node: Node) -> str:
    """Say a node's standing."""
    return f"{node.state}, draining" if node.draining else str(node.state)


def signal_name(number: int) -> str:
    """Give a signal's name, such as ``SIGKILL``, or its number where it has none."""
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_text(end: Exit, time_limit_s: float = 0.0) -> str:
    """Say how an attempt ended, such as ``exit code 3`` or ``ended by SIGSEGV: ...``.

    ``time_limit_s``: what it was allowed, in seconds; 0.0 where that is not known.
    """
    match end.cause:
        case Cause.EXITED:
            said = f"exit code {end.code}"
        case Cause.SIGNALLED:
            said = f"ended by {signal_name(end.signal or 0)}"
        case Cause.OOM:
            said = "out of memory"
        case Cause.KILLED:
            by = f" with {signal_name(end.signal)}" if end.signal else ""
            code = "" if end.code is None else f", exit code {end.code}"
            said = f"killed{by}{code}"
        case Cause.START_FAILED:
            said = "could not be started"
        case Cause.NODE_FAILED:
            said = "its node failed"
        case Cause.NODE_REMOVED:
            said = "its node was removed"
        case Cause.TIME_LIMIT:
            limit = f" of {render_duration(time_limit_s)}" if time_limit_s else ""
            said = f"ended at its time limit{limit}"
        case Cause.DEPENDENCY | Cause.GANG:
            said = "never began"
        case _:
            assert_never(end.cause)
    return f"{said}: {clean_line(end.message)}" if end.message else said


def age(at: float, now: float) -> str:
    """Say how long ago ``at`` was, such as ``5m20s``. Both are UTC seconds; 0.0 is never."""
    return render_duration(max(now - at, 0.0)) if at else NOTHING


def run_time(task: Task, now: float) -> str:
    """Say for how long a task has run or ran."""
    if not task.started_at:
        return NOTHING
    return render_duration((task.ended_at or now) - task.started_at)


def moment(at: float) -> str:
    """Write UTC seconds as local date and time with its offset; 0.0 is ``-``."""
    if not at:
        return NOTHING
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def clock(at: float) -> str:
    """Write UTC seconds as local time of day."""
    return datetime.fromtimestamp(at).astimezone().strftime("%H:%M:%S")


def command_text(command: Iterable[str]) -> str:
    """Write a command on one line as a shell would read it."""
    return clean_line(shlex.join(command)) or NOTHING


def task_title(task: Task) -> str:
    """Give a task's name, or its command where it has none."""
    return clean_line(task.spec.name) or command_text(task.spec.command)


def image_text(spec: TaskSpec) -> str:
    """Say what a task runs in: its environment or its image; ``-`` for what the node is."""
    return clean_line(spec.container or spec.image) or NOTHING


def mount_text(mount: Mount) -> str:
    """Write a mount as ``--mount`` takes it."""
    mode = ":ro" if mount.read_only else ""
    return clean_line(f"{mount.source}:{mount.destination}{mode}")


def limits_text(limits: Mapping[str, tuple[int, int]]) -> str:
    """Write limits as ``--ulimit`` takes them, in order of their names."""
    written = (
        f"{name}={_limit(soft)}" if soft == hard else f"{name}={_limit(soft)}:{_limit(hard)}"
        for name, (soft, hard) in sorted(limits.items())
    )
    return clean_line(" ".join(written))


def _limit(value: int) -> str:
    return "unlimited" if value == -1 else str(value)


def share(held: int, whole: int) -> str:
    """Say how much of a whole number of things is held, such as ``3 of 8``."""
    return f"{held} of {whole}" if whole else NOTHING


def size_share(held: int, whole: int) -> str:
    """Say how many bytes of how many are held."""
    return f"{render_size(held)} of {render_size(whole)}" if whole else NOTHING


def number_ranges(numbers: Iterable[int]) -> str:
    """Write whole numbers briefly, such as ``0-3,8``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    written = (str(low) if low == high else f"{low}-{high}" for low, high in parts)
    return ",".join(written) or NOTHING


def pairs_text(pairs: Mapping[str, str]) -> str:
    """Write labels or variables as ``KEY=VALUE`` in order of their keys."""
    written = (f"{key}={value}" for key, value in sorted(pairs.items()))
    return clean_line(" ".join(written)) or NOTHING


def counts_text(counts: Mapping[str, int]) -> str:
    """Write how many of each kind there are, such as ``2 running, 10 queued``."""
    written = (f"{count} {clean_line(kind)}" for kind, count in counts.items() if count)
    return ", ".join(written) or "none"


def plural(count: int, thing: str) -> str:
    """Write a count with its thing, such as ``1 task`` or ``3 tasks``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
