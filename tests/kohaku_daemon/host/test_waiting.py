"""The waiting room: who waits for what, and that nobody is forgotten in it."""

from __future__ import annotations

import asyncio

import pytest

from kohaku_daemon.host import waiting
from kohaku_daemon.host.waiting import WaitingRoom
from protocol.ids import BatchId, TaskId
from protocol.models.task import TaskState

A, B = TaskId(1), TaskId(2)
BATCH = BatchId(9)


async def test_each_waiter_is_done_with_the_last_of_its_own() -> None:
    room = WaitingRoom()
    both = asyncio.create_task(room.wait([A, B], 5.0))
    one = asyncio.create_task(room.wait([A], 5.0))
    await asyncio.sleep(0)
    room.tasks_changed([(A, BATCH, TaskState.RUNNING)])
    room.tasks_changed([(A, BATCH, TaskState.LOST)])
    assert await one == 0
    assert not both.done()
    room.tasks_changed([(A, BATCH, TaskState.COMPLETED)])
    room.tasks_changed([(B, BATCH, TaskState.KILLED)])
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
    room.tasks_changed([(A, BATCH, TaskState.QUEUED)])
    room.tasks_changed([(B, BATCH, TaskState.RUNNING)])
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in waits)
    waits[0].cancel()
    room.tasks_changed([(A, BATCH, TaskState.ASSIGNED)])
    await asyncio.wait_for(waits[1], 1)


async def test_who_waits_for_a_batch_is_told_of_each_of_its_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "_LOOKED_AT", 1)
    room = WaitingRoom()
    live = {A, B, TaskId(3)}
    waits = asyncio.create_task(
        room.wait_batch(BATCH, (task for task in (A, B, TaskId(3)) if task in live), 5.0)
    )
    await asyncio.sleep(0)
    # While it is still looking: one it has seen, and one it has not.
    for task in (A, TaskId(3)):
        live.discard(task)
        room.tasks_changed([(task, BATCH, TaskState.COMPLETED)])
    for _ in range(5):
        await asyncio.sleep(0)
    room.tasks_changed([(TaskId(4), BatchId(8), TaskState.COMPLETED)])
    room.tasks_changed([(B, BATCH, TaskState.RUNNING)])
    await asyncio.sleep(0)
    assert not waits.done()
    room.tasks_changed([(B, BATCH, TaskState.LOST)])
    assert await waits == 0
    assert await room.wait_batch(BATCH, [B], 0.01) == 1
    assert await room.wait_batch(BATCH, [], 5.0) == 0
    assert not room._by_batch
