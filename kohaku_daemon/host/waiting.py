"""Who waits for tasks to begin, and to be over.

Knows: the tasks each waiter still misses. Told of every committed change.
Does not know: connections; a waiter that is cancelled takes itself out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, TypeVar

from protocol.ids import BatchId, TaskId
from protocol.models.task import TaskState

K = TypeVar("K", TaskId, BatchId)

#: Tasks of a batch that are looked at in one go, some 2 ms: a batch may have 100,000.
_LOOKED_AT: Final = 5000


@dataclass(slots=True, eq=False)
class _Waiter:
    missing: set[TaskId] = field(default_factory=set)
    #: ``missing`` is still being filled.
    is_counting: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, task: TaskId) -> None:
        """Note that a task is over."""
        self.missing.discard(task)
        self.check()

    def check(self) -> None:
        """Be done if nothing is missing."""
        if not self.missing and not self.is_counting:
            self.done.set()


class WaitingRoom:
    """All waiters, by the tasks they miss or by the batch whose tasks these are."""

    def __init__(self) -> None:
        self._by_task: dict[TaskId, set[_Waiter]] = {}
        self._by_batch: dict[BatchId, set[_Waiter]] = {}
        self._unbegun: dict[TaskId, asyncio.Event] = {}

    async def wait_begun(self, task: TaskId) -> None:
        """Wait until a queued task is queued no more."""
        await self._unbegun.setdefault(task, asyncio.Event()).wait()

    def tasks_changed(self, states: Iterable[tuple[TaskId, BatchId, TaskState]]) -> None:
        """Tell those who wait for these tasks where they stand."""
        if not (self._by_task or self._by_batch or self._unbegun):
            return
        for task, batch, state in states:
            if task in self._unbegun and state is not TaskState.QUEUED:
                self._unbegun.pop(task).set()
            if (task in self._by_task or batch in self._by_batch) and state.is_over:
                for waiter in (*self._by_task.pop(task, ()), *self._by_batch.get(batch, ())):
                    waiter.take(task)

    async def wait(self, tasks: Iterable[TaskId], hold_s: float) -> int:
        """Wait until all of them are over, at most ``hold_s`` seconds; give how many are not."""
        waiter = _Waiter(set(tasks))
        for task in waiter.missing:
            self._by_task.setdefault(task, set()).add(waiter)
        try:
            await self._hold(waiter, hold_s)
        finally:
            for task in waiter.missing:
                _take_out(self._by_task, task, waiter)
        return len(waiter.missing)

    async def wait_batch(self, batch: BatchId, tasks: Iterable[TaskId], hold_s: float) -> int:
        """Wait as ``wait`` does, for tasks of one batch.

        ``tasks`` is looked at bit by bit: it gives tasks that are not over when it is asked.
        """
        waiter = _Waiter(is_counting=True)
        self._by_batch.setdefault(batch, set()).add(waiter)
        try:
            left = iter(tasks)
            while some := list(islice(left, _LOOKED_AT)):
                waiter.missing.update(some)
                await asyncio.sleep(0)
            waiter.is_counting = False
            await self._hold(waiter, hold_s)
        finally:
            _take_out(self._by_batch, batch, waiter)
        return len(waiter.missing)

    async def _hold(self, waiter: _Waiter, hold_s: float) -> None:
        waiter.check()
        try:
            async with asyncio.timeout(hold_s):
                await waiter.done.wait()
        except TimeoutError:
            pass


def _take_out(waiters: dict[K, set[_Waiter]], key: K, waiter: _Waiter) -> None:
    others = waiters.get(key)
    if others is not None:
        others.discard(waiter)
        if not others:
            del waiters[key]
