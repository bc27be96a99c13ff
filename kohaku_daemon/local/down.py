"""``kohakud down``: stop the cluster of this machine.

Knows: that tasks outlive their daemons, how to end them first if asked, and that a node that is
away ends its own only when it is back.
Does not know: how a process is stopped (``daemons``).
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Final, TypeVar

import msgspec

from kohaku_daemon.local import daemons
from kohaku_daemon.local.door import enter
from kohaku_daemon.local.home import Home
from kohaku_daemon.local.up import Wanted, bring_up
from protocol.client import Connection
from protocol.errors import TimedOut
from protocol.ids import NodeName
from protocol.messages.node import ListNodes
from protocol.messages.task import ListTasks, SteerTasks, WaitTasks
from protocol.methods import NODE_LIST, TASK_KILL, TASK_LIST, TASK_WAIT
from protocol.models.node import Node, NodeState
from protocol.models.task import Task, TaskState

T = TypeVar("T")

#: Seconds for all tasks to end: their own grace, and some for the way.
_END_S: Final = 120.0
#: Seconds that the tasks of a node that is away are waited for: it may be about to come back,
#: as after a start of the host.
_AWAY_S: Final = 5.0
#: Seconds between looks at who is away.
_LOOK_S: Final = 2.0
#: Names that one call takes.
_NAMES: Final = 1000
_TASKS_GO_ON: Final = "tasks that run go on; kohakud up --detach brings the cluster back to them"
_LIVE: Final = tuple(state for state in TaskState if not state.is_over)


def down(*, tasks: bool) -> int:
    """Stop every daemon of this home; with ``tasks`` end all tasks of its cluster first.

    Gives the exit status. What does not run is stopped already.

    Raises:
        TimedOut: Tasks, or a daemon, do not end. The daemons are then left as they are.
        StartFailed: Tasks were left by an earlier ``down``, and the host does not start. A node
            that does not counts as away.
    """
    home, away = Home(), frozenset[NodeName]()
    with home.turn():
        if tasks:
            away = _end_all_tasks(home)
        runners = [daemons.runner_of(home, name) for name in home.runners()]
        stopped = daemons.stop(runners)
        stopped |= daemons.stop([daemons.host_of(home)])
    sys.stdout.write(_describe(stopped, _say_of_tasks(away) if tasks else _TASKS_GO_ON))
    return 0


def _end_all_tasks(home: Home) -> frozenset[NodeName]:
    """End them; give the nodes that are away, with tasks that they end when they are back."""
    before = home.recall()
    if not before.tasks_left:
        return frozenset()
    # A node that is down cannot end its tasks: whatever ever ran here is brought up for it.
    numbers = [
        int(found[1]) for name in home.runners() if (found := re.fullmatch(r"node(\d+)", name))
    ]
    away = asyncio.run(_bring_up_and_end(home, max(numbers, default=0)))
    home.remember(msgspec.structs.replace(before, tasks_left=bool(away)))
    return away


async def _bring_up_and_end(home: Home, runners: int) -> frozenset[NodeName]:
    cluster = await bring_up(home, Wanted(runners=runners))
    for failure in cluster.absent:
        sys.stderr.write(f"kohakud: {failure.message}\n  {failure.hint}\n")
    async with await enter(home.host) as connection:
        try:
            async with asyncio.timeout(_END_S):
                left = await _end(connection)
        except TimeoutError:
            raise TimedOut(
                f"not all tasks have ended after {_END_S:g} s",
                hint="kohaku task list shows them; kohakud down leaves them alone",
            ) from None
        lost = await _list(connection, (TaskState.LOST,))
        await _kill(connection, lost)
        return frozenset(task.node for task in (*left, *lost))


async def _end(connection: Connection) -> list[Task]:
    """End all tasks that are not over; give those of nodes that are away, asked to end too."""
    clock = asyncio.get_running_loop()
    patience = clock.time() + _AWAY_S
    while live := await _list(connection, _LIVE):
        await _kill(connection, live)
        if clock.time() > patience:
            away = await _find_away(connection)
            if all(task.node in away for task in live):
                return live
        for names in _groups([task.id for task in live]):
            await connection.call(TASK_WAIT, WaitTasks(tasks=names, hold_s=_LOOK_S))
    return []


async def _find_away(connection: Connection) -> set[NodeName]:
    found: list[Node] = []
    more = True
    while more:
        after = found[-1].name if found else ""
        page = await connection.call(NODE_LIST, ListNodes(after=after))
        found += page.nodes
        more = page.more
    return {node.name for node in found if node.state is not NodeState.ONLINE}


async def _list(connection: Connection, states: tuple[TaskState, ...]) -> list[Task]:
    found: list[Task] = []
    more = True
    while more:
        before = found[-1].id if found else None
        page = await connection.call(TASK_LIST, ListTasks(states=states, before=before, limit=500))
        found += page.tasks
        more = page.more
    return found


async def _kill(connection: Connection, tasks: Sequence[Task]) -> None:
    for names in _groups([task.id for task in tasks if not task.kill_asked]):
        await connection.call(TASK_KILL, SteerTasks(tasks=names))


def _groups(names: Sequence[T]) -> Iterator[tuple[T, ...]]:
    for begin in range(0, len(names), _NAMES):
        yield tuple(names[begin : begin + _NAMES])


def _describe(stopped: dict[str, bool], of_tasks: str) -> str:
    if not stopped:
        return "nothing was running\n"
    lines = [f"stopped {', '.join(stopped)}"]
    lines += [
        f"{name} did not stop by itself and was killed"
        for name, willing in stopped.items()
        if not willing
    ]
    return "\n".join((*lines, of_tasks)) + "\n"


def _say_of_tasks(away: Collection[NodeName]) -> str:
    if not away:
        return "all tasks have ended"
    return (
        f"tasks of nodes that are away end when these are back and the host runs: "
        f"{', '.join(sorted(away))}; all others have ended"
    )
