"""Who waits for tasks to begin, and to be over.

Knows: the tasks each waiter still misses. Told of every committed change.
Does not know: connections; a waiter that is cancelled takes itself out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from protocol.ids import TaskId
from protocol.models.task import Task, TaskState


@dataclass(slots=True, eq=False)
class _Waiter:
    missing: set[TaskId]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class WaitingRoom:
    """All waiters, by the tasks they miss."""

    def __init__(self) -> None:
        self._by_task: dict[TaskId, set[_Waiter]] = {}
        self._unbegun: dict[TaskId, asyncio.Event] = {}

    async def wait_begun(self, task: TaskId) -> None:
        """Wait until a queued task is queued no more."""
        await self._unbegun.setdefault(task, asyncio.Event()).wait()

    def task_changed(self, task: Task) -> None:
        """Tell those who wait for it."""
        if task.state is not TaskState.QUEUED and (begun := self._unbegun.pop(task.id, None)):
            begun.set()
        if not task.state.is_over:
            return
        for waiter in self._by_task.pop(task.id, ()):
            waiter.missing.discard(task.id)
            if not waiter.missing:
                waiter.done.set()

    async def wait(self, tasks: Iterable[TaskId], hold_s: float) -> int:
        """Wait until all of them are over, at most ``hold_s`` seconds; give how many are not."""
        waiter = _Waiter(set(tasks))
        if not waiter.missing:
            return 0
        for task in waiter.missing:
            self._by_task.setdefault(task, set()).add(waiter)
        try:
            async with asyncio.timeout(hold_s):
                await waiter.done.wait()
        except TimeoutError:
            pass
        finally:
            for task in waiter.missing:
                others = self._by_task.get(task)
                if others is not None:
                    others.discard(waiter)
                    if not others:
                        del self._by_task[task]
        return len(waiter.missing)
