"""Deleting what is old: nothing that lives, nothing in part, nothing for long."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from kohaku_daemon.core.cluster.records import BatchRecord, EventRecord, TaskRecord
from kohaku_daemon.store.tasks import Group, TaskStore, batch_row, task_row
from protocol.ids import BatchId, TaskId, UserName
from protocol.models.task import TaskSpec, TaskState
from tests.kohaku_daemon.store.make_samples import AUDIT


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TaskStore]:
    store = TaskStore.open(tmp_path / "tasks.sqlite")
    yield store
    store.close()


def put_batch(store: TaskStore, number: int, *ends: float) -> list[TaskId]:
    """Store a batch whose tasks ended at these times; 0.0 for one that runs."""
    batch = BatchRecord(
        id=BatchId(number),
        owner=UserName("ada"),
        request_id=f"request-{number}",
        digest=b"",
        spec=TaskSpec(command=("true",)),
        size=len(ends),
        runs=((number + 1, len(ends)),),
    )
    tasks = [
        TaskRecord(
            id=TaskId(number + 1 + index),
            batch=batch.id,
            index=index,
            owner=batch.owner,
            state=TaskState.COMPLETED if end else TaskState.RUNNING,
            ended_at=end,
        )
        for index, end in enumerate(ends)
    ]
    store.write(Group([batch_row(batch)], [task_row(task) for task in tasks]))
    return [task.id for task in tasks]


def prune(
    store: TaskStore, *, tasks: float = 0, events: float = 0, audits: float = 0, limit: int = 1000
) -> int:
    return store.prune(tasks_before=tasks, events_before=events, audits_before=audits, limit=limit)


def newest(store: TaskStore) -> list[TaskId]:
    return [task.id for task in store.page(limit=100_000)]


def test_tasks_go_by_their_end_and_a_batch_with_its_last_task(store: TaskStore) -> None:
    put_batch(store, 1000, 10.0, 20.0)
    put_batch(store, 2000, 10.0, 30.0, 0.0)
    put_batch(store, 9000, 0.0)
    assert prune(store, tasks=25.0) == 3
    assert newest(store) == [9001, 2003, 2002]
    assert [batch.id for batch in store.batch_page()] == [9000, 2000]
    assert store.by_request("ada", "request-1000") is None
    summary = store.batch_summary(BatchId(2000))
    assert summary is not None
    assert (summary.size, summary.states) == (3, {"completed": 1, "running": 1})
    assert prune(store, tasks=25.0) == 0
    assert prune(store, tasks=1e12) == 1, "a live task was taken for an old one"
    assert newest(store) == [9001, 2003]


def test_one_go_deletes_so_many_and_the_oldest_first(store: TaskStore) -> None:
    ids = put_batch(store, 1000, *(float(100 - number) for number in range(50)))
    put_batch(store, 9000, 1.0)
    assert prune(store, tasks=1e12, limit=20) == 20
    assert sorted(newest(store)) == [*ids[:30], 9001]
    assert store.batch(BatchId(1000)) is not None
    assert [prune(store, tasks=1e12, limit=20) for _ in range(3)] == [20, 10, 0]
    assert store.batch(BatchId(1000)) is None


def test_ids_are_not_given_again_though_everything_is_old(store: TaskStore, tmp_path: Path) -> None:
    put_batch(store, 1000, 1.0)
    (newest,) = put_batch(store, 2000, 1.0)
    events = [EventRecord(id=number, at=1.0, kind="k", text="") for number in range(1, 6)]
    store.write(Group(events=events, audits=[AUDIT] * 3))
    assert prune(store, tasks=1e12, events=1e12, audits=1e12) == 1 + 4 + 3
    assert (store.highest_id(), store.last_event_id()) == (newest, 5)
    store.write(Group(audits=[AUDIT]))
    connection = sqlite3.connect(tmp_path / "tasks.sqlite")
    assert connection.execute("SELECT id FROM audit").fetchall() == [(4,)]
    connection.close()


def test_each_kind_is_kept_for_as_long_as_is_said(store: TaskStore) -> None:
    put_batch(store, 1000, 10.0)
    put_batch(store, 9000, 10.0)
    events = [EventRecord(id=at, at=float(at), kind="k", text="") for at in (10, 20, 30)]
    # A line of a time when the clock was wrong does not hold back those after it.
    events[0] = replace(events[0], at=1e12)
    store.write(Group(events=events, audits=[replace(AUDIT, at=at) for at in (10.0, 20.0)]))
    assert prune(store, tasks=5.0, events=5.0, audits=5.0) == 0
    assert prune(store, events=25.0) == 1
    assert [event.id for event in store.events()] == [30, 10]
    assert prune(store, audits=15.0) == 1
    assert prune(store, tasks=15.0) == 1


def test_an_empty_store_has_nothing_to_delete(store: TaskStore) -> None:
    assert prune(store, tasks=1e12, events=1e12, audits=1e12) == 0


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_is_what_a_list_would_leave(store: TaskStore, seed: int) -> None:
    random = Random(seed)
    ends: dict[TaskId, float] = {}
    of_batch: dict[int, list[TaskId]] = {}
    for number in range(1000, 20_000, 500):
        times = [
            random.choice([0.0, *map(float, range(1, 20))])
            for _ in range(random.choice([1, 3, 40]))
        ]
        of_batch[number] = put_batch(store, number, *times)
        ends |= zip(of_batch[number], times, strict=True)
    last = max(of_batch)
    for before in (0.0, 5.0, 5.5, 12.0, 30.0):
        while prune(store, tasks=before, limit=random.choice([1, 7, 100])):
            pass
        left = [
            task
            for task, end in ends.items()
            if end == 0 or end >= before or task in of_batch[last]
        ]
        assert sorted(newest(store)) == sorted(left)
        assert {batch.id for batch in store.batch_page(limit=1000)} == {
            number for number, tasks in of_batch.items() if set(tasks) & set(left)
        }
