"""A host with much to remember is killed and started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from frame import Row, interleave
from loads import Nulls
from null_runner import HOLD
from stage import Stage, stage

from protocol.client import Cluster
from protocol.messages.cluster import Status
from protocol.models.node import NodeState
from protocol.models.task import TaskSpec, TaskState

_NODES: Final = 100
_TASKS: Final = 10_000
#: So half of the tasks run and half wait.
_PER_NODE: Final = _TASKS // _NODES // 2
_PATIENCE_S: Final = 120.0
_LOOK_S: Final = 0.01
#: A runner whose link held for less than ten seconds waits longer before it dials again: a host
#: that is killed every few seconds is not what is measured here.
_LINK_HELD_S: Final = 10.5


def restart(rounds: int) -> list[Row]:
    """kill -9 of a host with 10,000 tasks and 100 runners: ready again, and runners back."""
    back: list[float] = []
    with stage() as place, stage() as empty:
        place.start_host()
        empty.start_host()
        Nulls(place, _NODES, max_tasks=_PER_NODE)
        asyncio.run(_fill(place))
        ready, ready_empty = interleave(
            rounds, lambda: _restart(place, back), lambda: _restart_empty(empty)
        )
    return [
        Row(
            "restart.ready", f"host ready, {_TASKS:,} tasks, half of them running", "s", ready,
            "an empty host", ready_empty, "<= 2 s",
        ),
        Row(
            "restart.runners", f"all {_NODES} runners back, from the start of the host", "s",
            back[-rounds:], goal="<= 5 s", note=f"{_TASKS // 2:,} running tasks are said anew",
        ),
    ]  # fmt: skip


async def _fill(place: Stage) -> None:
    async with place.connect() as there, asyncio.timeout(_PATIENCE_S):
        await there.submit(TaskSpec(command=(HOLD,), cores=0), array=_TASKS)
        await _until_status(
            there, lambda status: status.tasks.get(TaskState.RUNNING, 0) == _NODES * _PER_NODE
        )


def _restart(place: Stage, back: list[float]) -> float:
    time.sleep(_LINK_HELD_S)
    place.kill("host")
    began = time.perf_counter()
    ready_s = place.start_host()
    asyncio.run(_until_back(place))
    back.append(time.perf_counter() - began)
    return ready_s


async def _until_back(place: Stage) -> None:
    async with place.connect() as there, asyncio.timeout(_PATIENCE_S):
        status = await _until_status(
            there, lambda status: status.nodes.get(NodeState.ONLINE, 0) == _NODES
        )
    counts = status.tasks
    if counts.get(TaskState.RUNNING, 0) != _NODES * _PER_NODE:
        raise RuntimeError(f"after the restart the books say {counts}")


async def _until_status(there: Cluster, holds: Callable[[Status], bool]) -> Status:
    while True:
        status = await there.status()
        if holds(status):
            return status
        await asyncio.sleep(_LOOK_S)


def _restart_empty(place: Stage) -> float:
    place.kill("host")
    return place.start_host()
