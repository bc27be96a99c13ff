"""What tasks.sqlite promises: groups whole or not at all, and answers as a list would give them."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgspec
import pytest
from msgspec.structs import replace

from kohaku_daemon.core.cluster.records import BatchRecord, EventRecord, TaskRecord
from kohaku_daemon.store.tasks import LIVE_STATES, Group, TaskStore, batch_row, task_row
from protocol.errors import Unavailable
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.models.task import TaskSpec, TaskState
from tests.kohaku_daemon.store.make_samples import AUDIT, BATCH, ENDED, EVENT, WAITING

SUBMITS = """
import sys
from pathlib import Path
from kohaku_daemon.store.tasks import TaskStore
from tests.kohaku_daemon.store.test_tasks import a_batch, put
store = TaskStore.open(Path(sys.argv[1]))
for number in range(1000, 100_000_000, 1000):
    put(store, *a_batch(number, 20))
    print(number, flush=True)
"""

SPEC = TaskSpec(command=("true",), name="job")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TaskStore]:
    store = TaskStore.open(tmp_path / "tasks.sqlite")
    yield store
    store.close()


def a_batch(number: int, size: int, owner: str = "alice") -> tuple[BatchRecord, list[TaskRecord]]:
    """Make a batch whose ids are ``number``, then its tasks'; leave room between two runs."""
    half = size // 2
    runs = tuple(run for run in ((number + 1, half), (number + 100 + half, size - half)) if run[1])
    batch = BatchRecord(
        id=BatchId(number),
        owner=UserName(owner),
        request_id=f"request-{number}",
        digest=b"",
        spec=SPEC,
        size=size,
        runs=runs,
        created_at=float(number),
    )
    ids = [number for first, count in runs for number in range(first, first + count)]
    return batch, [
        TaskRecord(id=TaskId(task), batch=batch.id, index=index, owner=batch.owner)
        for index, task in enumerate(ids)
    ]


def put(store: TaskStore, batch: BatchRecord, tasks: list[TaskRecord]) -> None:
    store.write(Group([batch_row(batch)], [task_row(task) for task in tasks]))


def test_records_come_back_as_they_were_written(store: TaskStore) -> None:
    store.write(Group([batch_row(BATCH)], [task_row(ENDED), task_row(WAITING)], [EVENT], [AUDIT]))
    assert store.task(ENDED.id) == ENDED
    assert store.task(TaskId(5)) is None
    assert store.batch(BATCH.id) == BATCH
    assert store.batches([BATCH.id, BatchId(5)]) == {BATCH.id: BATCH}
    assert store.by_request("alice", "request-1") == BATCH
    assert store.by_request("bob", "request-1") is None
    assert (store.highest_id(), store.last_event_id()) == (WAITING.id, EVENT.id)


def test_an_empty_store_has_nothing(store: TaskStore) -> None:
    assert (store.highest_id(), store.last_event_id()) == (0, 0)
    assert list(store.live_tasks()) == []
    assert store.page() == []
    assert store.batch_page() == []
    assert store.events() == []
    assert store.batch_summary(BatchId(1)) is None


def test_a_row_keeps_the_task_as_it_was_when_the_row_was_made(store: TaskStore) -> None:
    batch, (task,) = a_batch(1000, 1)
    row = task_row(task)
    task.state = TaskState.RUNNING
    store.write(Group([batch_row(batch)], [row]))
    assert [task.state for task in store.live_tasks()] == [TaskState.QUEUED]
    store.write(Group(tasks=[task_row(task)]))
    assert [task.state for task in store.live_tasks()] == [TaskState.RUNNING]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_few_rows_and_many_are_written_alike(store: TaskStore, count: int) -> None:
    batch, tasks = a_batch(1000, count)
    put(store, batch, tasks)
    for task in tasks:
        task.state, task.node = TaskState.RUNNING, NodeName("node1")
    first = task_row(tasks[0])
    tasks[0].state, tasks[0].ended_at = TaskState.COMPLETED, 7.0
    # Of the one that is here twice the last row counts, also where that makes it one row more.
    store.write(Group(tasks=[first, *map(task_row, tasks)]))
    assert [store.task(task.id) for task in tasks] == tasks
    assert [task.id for task in store.page(states=[TaskState.COMPLETED])] == [tasks[0].id]
    assert {task.id for task in store.live_tasks()} == {task.id for task in tasks[1:]}


def test_a_request_id_is_unique_for_its_owner(store: TaskStore) -> None:
    first, tasks = a_batch(1000, 1)
    put(store, first, tasks)
    again = msgspec.structs.replace(first, id=BatchId(2000), runs=((2001, 1),))
    with pytest.raises(sqlite3.IntegrityError, match="request_id"):
        store.write(Group([batch_row(again)], [], [EVENT]))
    assert store.batch(BatchId(2000)) is None
    assert store.events() == []
    put(store, msgspec.structs.replace(again, owner=UserName("bob")), [])


def test_pages_are_what_a_list_would_give(store: TaskStore) -> None:
    random = Random(7)
    batches, everything = [], list[TaskRecord]()
    for number in range(1000, 40_000, 1000):
        batch, tasks = a_batch(number, random.choice([1, 2, 50]), random.choice(["alice", "bob"]))
        for task in tasks:
            task.state = random.choice(list(TaskState))
            if task.state is not TaskState.QUEUED:
                task.node = NodeName(random.choice(["n1", "n2"]))
            if task.state.is_final:
                task.ended_at = float(random.randrange(1, 100))
        put(store, batch, tasks)
        batches.append(batch)
        everything += tasks
    newest = everything[::-1]

    for _ in range(300):
        states = tuple(random.sample(list(TaskState), random.choice([0, 0, 1, 3])))
        batch_id = random.choice([None, None, random.choice(batches).id])
        node, owner = random.choice(["", "", "n1", "n9"]), random.choice(["", "", "bob", "eve"])
        before = random.choice([None, random.choice(newest).id])
        after = random.choice([None, None, random.choice(newest).id, 0])
        limit = random.choice([1, 5, 10_000])
        wanted = [
            task
            for task in (newest if after is None else everything)
            if (not states or task.state in states)
            and batch_id in (None, task.batch)
            and node in ("", task.node)
            and owner in ("", task.owner)
            and (before is None or task.id < before)
            and (after is None or task.id > after)
        ][:limit]
        assert wanted == store.page(
            states=states,
            batch=batch_id,
            node=node,
            owner=owner,
            before=before,
            after=None if after is None else TaskId(after),
            limit=limit,
        )

    assert list(store.live_tasks()) == [task for task in everything if task.state in LIVE_STATES]
    ended = [task for task in everything if task.state.is_final and task.ended_at >= 50]
    counted = {(minute, state): count for minute, state, count in store.ends_since(50.0)}
    assert counted == Counter((int(task.ended_at // 60), task.state) for task in ended)
    for batch in batches:
        of_batch = [task for task in everything if task.batch == batch.id]
        summary = store.batch_summary(batch.id)
        assert summary is not None
        assert summary.states == Counter(task.state.value for task in of_batch)


def test_batches_are_listed_newest_first_with_their_tasks_counted(store: TaskStore) -> None:
    for number, owner in ((1000, "alice"), (2000, "bob"), (3000, "alice")):
        put(store, *a_batch(number, 3, owner))
    _, tasks = a_batch(3000, 3, "alice")
    tasks[1].state = TaskState.COMPLETED
    store.write(Group(tasks=[task_row(tasks[1])]))

    newest, oldest = store.batch_page(owner="alice")
    assert (newest.id, newest.name, newest.size) == (3000, "job", 3)
    assert newest.states == {"queued": 2, "completed": 1}
    assert oldest.id == 1000
    assert [batch.id for batch in store.batch_page(before=BatchId(3000), limit=1)] == [2000]
    assert store.batch_summary(BatchId(3000)) == newest


def test_what_becomes_known_of_a_batch_is_kept_with_it(store: TaskStore) -> None:
    batch, tasks = a_batch(1000, 3, "alice")
    put(store, batch, tasks)
    pinned = replace(batch, pinned="sha256:1")
    store.write(Group(batches=[batch_row(pinned)]))
    assert store.batch(batch.id) == pinned
    summary = store.batch_summary(batch.id)
    assert summary is not None
    assert summary.states == {"queued": 3}


def test_the_diary_is_paged_newest_first(store: TaskStore) -> None:
    lines = [EventRecord(id=number, at=0.0, kind="k", text=str(number)) for number in range(1, 6)]
    store.write(Group(events=lines))
    assert store.events(limit=2) == [lines[4], lines[3]]
    assert store.events(before=3) == [lines[1], lines[0]]
    assert store.last_event_id() == 5


def test_the_audit_log_can_be_read_with_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite"
    store = TaskStore.open(path)
    store.write(Group(audits=[AUDIT, AUDIT]))
    store.close()
    assert path.stat().st_mode & 0o777 == 0o600
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT id, actor, method, outcome FROM audit").fetchall()
    connection.close()
    assert rows == [(1, "alice", "task.submit", "ok"), (2, "alice", "task.submit", "ok")]


def test_kill_9_keeps_every_acknowledged_batch_and_none_in_part(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", SUBMITS, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(50)]
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]

    store = TaskStore.open(path)
    kept = store.batch_page(limit=1_000_000)
    assert {batch.id for batch in kept} >= set(acknowledged)
    assert all(batch.states == {"queued": 20} for batch in kept)
    assert len(list(store.live_tasks())) == 20 * len(kept)
    store.close()


def test_a_full_disk_keeps_nothing_of_the_group_and_the_store_goes_on(
    store: TaskStore, tmp_path: Path
) -> None:
    batch, tasks = a_batch(1000, 2)
    put(store, batch, tasks)
    large, many = a_batch(5000, 4)
    many[3].reason = "x" * 5_000_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As near to a full disk as comes without one: the kernel refuses to let files grow.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(Unavailable, match=r"tasks\.sqlite failed") as caught:
            put(store, large, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "nothing of this change was kept" in caught.value.hint
    assert [task.id for task in store.live_tasks()] == [task.id for task in tasks]
    put(store, large, many)
    assert len(list(store.live_tasks())) == 6
