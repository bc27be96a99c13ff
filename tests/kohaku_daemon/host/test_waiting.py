"""The waiting room: who waits for what, and that nobody is forgotten in it."""

from __future__ import annotations

import asyncio

from kohaku_daemon.host.waiting import WaitingRoom
from protocol.ids import BatchId, TaskId, UserName
from protocol.models.task import Task, TaskSpec, TaskState

A, B = TaskId(1), TaskId(2)


def a_task(task: TaskId, state: TaskState) -> Task:
    spec = TaskSpec(command=("true",))
    return Task(id=task, batch=BatchId(9), owner=UserName("ada"), state=state, spec=spec)


async def test_each_waiter_is_done_with_the_last_of_its_own() -> None:
    room = WaitingRoom()
    both = asyncio.create_task(room.wait([A, B], 5.0))
    one = asyncio.create_task(room.wait([A], 5.0))
    await asyncio.sleep(0)
    room.task_changed(a_task(A, TaskState.RUNNING))
    room.task_changed(a_task(A, TaskState.LOST))
    assert await one == 0
    assert not both.done()
    room.task_changed(a_task(A, TaskState.COMPLETED))
    room.task_changed(a_task(B, TaskState.KILLED))
    assert await both == 0
    assert await room.wait([], 5.0) == 0
    assert not room._by_task


async def test_who_gives_up_or_is_cancelled_leaves_nothing_behind() -> None:
    room = WaitingRoom()
    assert await room.wait([A, B], 0.01) == 2
    cancelled = asyncio.create_task(room.wait([A], 5.0))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert not room._by_task


async def test_beginning_is_told_to_all_who_wait_for_it() -> None:
    room = WaitingRoom()
    waits = [asyncio.create_task(room.wait_begun(A)) for _ in range(2)]
    await asyncio.sleep(0)
    room.task_changed(a_task(A, TaskState.QUEUED))
    room.task_changed(a_task(B, TaskState.RUNNING))
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in waits)
    waits[0].cancel()
    room.task_changed(a_task(A, TaskState.ASSIGNED))
    await asyncio.wait_for(waits[1], 1)
