"""``kohakud down``: stop the cluster of this machine.

Knows: that tasks outlive their daemons, and how to end them first if asked.
Does not know: how a process is stopped (``daemons``).
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

import msgspec

from kohaku_daemon.local import daemons
from kohaku_daemon.local.door import enter
from kohaku_daemon.local.home import Home
from kohaku_daemon.local.up import Wanted, bring_up
from protocol.client import Connection
from protocol.errors import TimedOut
from protocol.ids import TaskId
from protocol.messages.task import ListTasks, SteerTasks, WaitTasks
from protocol.methods import TASK_KILL, TASK_LIST, TASK_WAIT
from protocol.models.task import TaskState

T = TypeVar("T")

#: Seconds for all tasks to end: their own grace, and some for the way.
_END_S: Final = 120.0
#: Names that one call takes.
_NAMES: Final = 1000
_LIVE: Final = tuple(state for state in TaskState if not state.is_over)


def down(*, tasks: bool) -> int:
    """Stop every daemon of this home; with ``tasks`` end all tasks of its cluster first.

    Gives the exit status. What does not run is stopped already.

    Raises:
        TimedOut: Tasks, or a daemon, do not end. The daemons are then left as they are.
        StartFailed: Tasks were left by an earlier ``down``, and the daemons that could end
            them do not start.
    """
    home = Home()
    with home.turn():
        if tasks:
            _end_all_tasks(home)
        runners = [daemons.runner_of(home, name) for name in home.runners()]
        stopped = daemons.stop(runners)
        stopped |= daemons.stop([daemons.host_of(home)])
    sys.stdout.write(_describe(stopped, tasks=tasks))
    return 0


def _end_all_tasks(home: Home) -> None:
    before = home.recall()
    if not before.tasks_left:
        return
    # A node that is down cannot end its tasks: whatever ever ran here is brought up for it.
    numbers = [
        int(found[1]) for name in home.runners() if (found := re.fullmatch(r"node(\d+)", name))
    ]
    asyncio.run(_bring_up_and_end(home, max(numbers, default=0)))
    home.remember(msgspec.structs.replace(before, tasks_left=False))


async def _bring_up_and_end(home: Home, runners: int) -> None:
    await bring_up(home, Wanted(runners=runners))
    async with await enter(home.host) as connection:
        try:
            async with asyncio.timeout(_END_S):
                while live := await _list(connection, _LIVE):
                    await _kill(connection, live)
        except TimeoutError:
            raise TimedOut(
                f"not all tasks have ended after {_END_S:g} s",
                hint="kohaku task list shows them; kohakud down leaves them alone",
            ) from None
        # Lost ones end when their node is back, if it ever is: asked for, but not waited for.
        lost = await _list(connection, (TaskState.LOST,))
        for names in _groups(lost):
            await connection.call(TASK_KILL, SteerTasks(tasks=names))


async def _list(connection: Connection, states: tuple[TaskState, ...]) -> list[TaskId]:
    found: list[TaskId] = []
    more = True
    while more:
        before = found[-1] if found else None
        page = await connection.call(TASK_LIST, ListTasks(states=states, before=before, limit=500))
        found += [task.id for task in page.tasks]
        more = page.more
    return found


async def _kill(connection: Connection, live: Sequence[TaskId]) -> None:
    for names in _groups(live):
        await connection.call(TASK_KILL, SteerTasks(tasks=names))
    for names in _groups(live):
        while not (await connection.call(TASK_WAIT, WaitTasks(tasks=names, hold_s=10.0))).done:
            pass


def _groups(names: Sequence[T]) -> Iterator[tuple[T, ...]]:
    for begin in range(0, len(names), _NAMES):
        yield tuple(names[begin : begin + _NAMES])


def _describe(stopped: dict[str, bool], *, tasks: bool) -> str:
    if not stopped:
        return "nothing was running\n"
    lines = [f"stopped {', '.join(stopped)}"]
    lines += [
        f"{name} did not stop by itself and was killed"
        for name, willing in stopped.items()
        if not willing
    ]
    lines.append(
        "all tasks have ended"
        if tasks
        else "tasks that run go on; kohakud up --detach brings the cluster back to them"
    )
    return "\n".join(lines) + "\n"
