"""The host's loop: nothing is answered, ordered or shown before the commit, and commits are shared.

The engine is real; the store is one that the test can hold back and break, and the world
writes down what it is told.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from msgspec.structs import replace

from kohaku_daemon.clock import SystemClock
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import (
    DrainAsked,
    JoinTokenAsked,
    RunnerBeat,
    RunnerReported,
)
from kohaku_daemon.core.cluster.long_work import PIECE
from kohaku_daemon.core.cluster.records import AuditRecord, DocumentChange, EventRecord
from kohaku_daemon.host import loop as loop_module
from kohaku_daemon.host.loop import HostLoop
from kohaku_daemon.host.subscriptions import TaskChange
from kohaku_daemon.store.tasks import Group, TaskStore
from protocol.errors import Conflict, NotFound, Unavailable
from protocol.ids import NodeName, TaskId
from protocol.messages.cluster import GetStatus, ListEvents
from protocol.messages.runner import Order, OrderStart
from protocol.messages.task import ListTasks, SubmitTask, Submitted
from protocol.methods import EVENT_LIST, STATUS, TASK_LIST, TASK_SUBMIT
from protocol.models.environment import Environment
from protocol.models.node import Node, Readings
from protocol.models.task import TaskSpec, TaskState
from tests.support.builders import OPERATOR, a_cluster, a_node, a_submission
from tests.support.host import RunningHost, until

AUDIT = AuditRecord(at=1.0, actor="ada", role="user", address="", method="m", subject="s")


class SlowStore:
    """Writes into a real store when it is let, and fails when it is told to."""

    def __init__(self, store: TaskStore) -> None:
        self.store = store
        self.groups: list[Group] = []
        self.failure: Exception | None = None
        self.free = threading.Event()
        self.free.set()
        #: A write waits to be let.
        self.waits = threading.Event()

    def write(self, group: Group) -> None:
        self.waits.set()
        assert self.free.wait(10)
        self.waits.clear()
        if self.failure is not None:
            raise self.failure
        self.store.write(group)
        self.groups.append(group)


class MemoryDocuments:
    """Stands in for cluster.json."""

    def __init__(self) -> None:
        self.applied: list[DocumentChange] = []

    def apply(self, changes: list[DocumentChange]) -> None:
        self.applied += changes


@dataclass
class Diary:
    """A world that writes down what it is told."""

    lines: list[str] = field(default_factory=list)
    nodes: list[Node | None] = field(default_factory=list)
    #: Whether somebody watches nodes.
    is_watched: bool = True

    def send_orders(self, node: NodeName, orders: Sequence[Order]) -> None:
        for order in orders:
            assert isinstance(order, OrderStart)
            self.lines.append(f"order to {node}")

    def close_link(self, node: NodeName, reason: str) -> None:
        self.lines.append(f"close {node}")

    def wants_nodes(self) -> bool:
        return self.is_watched

    def tasks_changed(self, tasks: Mapping[TaskId, TaskChange]) -> None:
        self.lines += [f"task {row.state}" for row, _ in tasks.values()]

    def nodes_changed(
        self, nodes: Mapping[NodeName, Node | None], readings: Iterable[Node]
    ) -> None:
        self.lines += [f"node {name}" for name in nodes]
        self.nodes += nodes.values()
        self.lines += [f"readings {node.name}" for node in readings]

    def nodes_skipped(self) -> None:
        self.lines.append("nodes skipped")

    def environments_changed(self, environments: Mapping[str, Environment | None]) -> None:
        self.lines += [f"environment {name}" for name in environments]

    def event_told(self, event: EventRecord) -> None:
        self.lines.append(event.kind)


@dataclass
class Rig:
    """A loop and all around it."""

    engine: ClusterEngine
    loop: HostLoop
    store: SlowStore
    documents: MemoryDocuments
    diary: Diary
    job: asyncio.Task[None]

    async def submit(self, number: int) -> object:
        return await self.loop.ask(a_submission(request_id=f"request-{number}"))


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(loop_module, "_RETRY_S", 0.01)
    real = TaskStore.open(tmp_path / "tasks.sqlite")
    engine, store, documents, diary = (
        a_cluster([a_node()]),
        SlowStore(real),
        MemoryDocuments(),
        Diary(),
    )
    loop = HostLoop(engine, store, documents, diary, SystemClock())  # type: ignore[arg-type]
    job = asyncio.create_task(loop.run())
    yield Rig(engine, loop, store, documents, diary, job)
    store.free.set()
    store.failure = None
    loop.stop()
    await job
    real.close()


async def test_nothing_is_answered_ordered_or_shown_before_the_commit(rig: Rig) -> None:
    rig.store.free.clear()
    asking = asyncio.create_task(rig.submit(1))
    await until(rig.store.waits.is_set)
    await asyncio.sleep(0.02)
    assert rig.diary.lines == []
    assert not asking.done()
    rig.store.free.set()
    submitted = await asking
    assert isinstance(submitted, Submitted)
    # It was placed in the same go, and shown once, as it is now. The order went out first.
    assert rig.diary.lines == ["order to n1", "task assigned", "node n1"]
    assert [record.state for record in rig.store.store.live_tasks()] == [TaskState.ASSIGNED]


async def test_what_arrives_during_a_commit_shares_the_next_one(rig: Rig) -> None:
    rig.store.free.clear()
    first = asyncio.create_task(rig.submit(0))
    await until(rig.store.waits.is_set)
    rest = [asyncio.create_task(rig.submit(number)) for number in range(1, 201)]
    await asyncio.sleep(0)
    rig.store.free.set()
    await asyncio.gather(first, *rest)
    assert [len(group.batches) for group in rig.store.groups] == [1, 200]


async def test_a_refusal_is_told_at_once_and_is_kept_in_the_audit_log(rig: Rig) -> None:
    with pytest.raises(NotFound):
        await rig.loop.ask(DrainAsked(OPERATOR, "n9", draining=True), AUDIT)
    await rig.loop.ask(DrainAsked(OPERATOR, "n1", draining=True), AUDIT)
    await rig.loop.settled()
    audits = [audit for group in rig.store.groups for audit in group.audits]
    assert audits == [replace(AUDIT, outcome="not_found"), AUDIT]


async def test_what_was_refused_is_let_go_of_without_the_garbage_collector(rig: Rig) -> None:
    async def ask() -> weakref.ref[NotFound]:
        try:
            await rig.loop.ask(DrainAsked(OPERATOR, "n9", draining=True))
        except NotFound as error:
            return weakref.ref(error)
        raise AssertionError("it was not refused")

    gc.disable()
    try:
        refs = [await ask() for _ in range(3)]
        assert [ref() for ref in refs] == [None] * 3
    finally:
        gc.enable()


async def test_a_repeated_submission_is_answered_only_once_the_first_is_committed(
    rig: Rig,
) -> None:
    rig.store.free.clear()
    both = [asyncio.create_task(rig.submit(1)) for _ in range(2)]
    await until(rig.store.waits.is_set)
    await asyncio.sleep(0.02)
    assert not any(asking.done() for asking in both)
    rig.store.free.set()
    first, again = await asyncio.gather(*both)
    assert isinstance(first, Submitted)
    assert isinstance(again, Submitted)
    assert (again.batch, first.repeated, again.repeated) == (first.batch, False, True)


async def test_a_store_that_fails_holds_back_what_it_has_and_loses_and_doubles_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await rig.submit(0)
    rig.diary.lines.clear()
    rig.store.failure = Unavailable("the disk is full")
    asking = asyncio.create_task(rig.submit(1))
    await until(lambda: rig.loop.trouble)
    assert rig.loop.trouble == "the disk is full"
    with pytest.raises(Unavailable, match="cannot store anything now: the disk is full"):
        await rig.submit(2)
    rig.loop.tell(RunnerBeat(NodeName("n1"), Readings()))
    assert not asking.done()
    assert rig.diary.lines == []
    await asyncio.sleep(0.05)  # several more tries
    rig.store.failure = None
    await asking
    assert rig.loop.trouble == ""
    await rig.submit(2)
    batches = [len(group.batches) for group in rig.store.groups if group.batches]
    assert batches == [1, 1, 1]
    diary = [event.kind for group in rig.store.groups for event in group.events]
    assert diary == ["host.failing", "host.well"]
    assert len(list(rig.store.store.live_tasks())) == 3
    assert "readings n1" in rig.diary.lines
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in told] == [
        "cannot store changes, will go on trying",
        "changes can be stored again",
    ]


async def test_who_waits_for_a_store_that_fails_is_told_so_unless_it_is_patient(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_PATIENCE_S", 0.02)
    reason = {"reason": "the disk is full"}
    rig.store.failure = Unavailable("the store /secret failed", details=reason)
    asking = asyncio.create_task(rig.submit(1))
    report = RunnerReported(NodeName("n1"), ())
    reporting = asyncio.create_task(rig.loop.ask(report, patient=True))
    with pytest.raises(Unavailable, match="may yet be"):
        await asyncio.wait_for(asking, 5)
    assert rig.loop.reason == "the disk is full"
    later = asyncio.create_task(rig.loop.ask(report, patient=True))
    await asyncio.sleep(0.05)  # several more tries
    assert not reporting.done()
    rig.store.failure = None
    await asyncio.gather(reporting, later)
    assert [len(group.batches) for group in rig.store.groups if group.batches] == [1]


async def test_documents_are_written_once_though_the_store_fails_after_them(rig: Rig) -> None:
    rig.store.failure = Unavailable("the disk is full")
    asked = JoinTokenAsked(OPERATOR, "digest", "khj_dige", 1, 60.0, "")
    asking = asyncio.create_task(rig.loop.ask(asked, AUDIT))
    await until(lambda: rig.loop.trouble)
    assert len(rig.documents.applied) == 1
    assert not asking.done()
    rig.store.failure = None
    await asking
    assert len(rig.documents.applied) == 1


async def test_settled_waits_for_what_has_happened_and_not_for_what_has_not(rig: Rig) -> None:
    await asyncio.wait_for(rig.loop.settled(), 1)
    rig.store.free.clear()
    asking = asyncio.create_task(rig.submit(1))
    await until(rig.store.waits.is_set)
    reading = asyncio.create_task(rig.loop.settled())
    await asyncio.sleep(0.02)
    assert not reading.done()
    rig.store.free.set()
    await reading
    assert asking.done()
    assert rig.store.store.by_request("ada", "request-1") is not None


async def test_what_is_shown_of_memory_is_what_was_committed_and_nothing_of_what_came_later(
    rig: Rig,
) -> None:
    fleet = rig.engine.state.fleet

    def view() -> tuple[bool, int]:
        node = fleet.find("n1")
        return node.record.draining, len(rig.engine.state.tasks)

    assert await rig.loop.read(view) == (False, 0)
    rig.store.free.clear()
    submitting = asyncio.create_task(rig.submit(1))
    await until(rig.store.waits.is_set)
    # The first group is being written: a reader now has to wait, and for the second.
    draining = asyncio.create_task(rig.loop.ask(DrainAsked(OPERATOR, "n1", draining=True)))
    reading = asyncio.create_task(rig.loop.read(view))
    await asyncio.sleep(0.02)
    assert not reading.done()
    rig.store.waits.clear()
    rig.store.free.set()
    await submitting
    (first,) = [node for node in rig.diary.nodes if node is not None][:1]
    assert not first.draining, "a group showed what the next one changes"
    await draining
    assert await reading == (True, 1)


async def test_a_reader_sees_nothing_of_what_arrives_while_its_group_is_written(rig: Rig) -> None:
    rig.store.free.clear()
    submitting = asyncio.create_task(rig.submit(1))
    reading = asyncio.create_task(rig.loop.read(lambda: len(rig.engine.state.tasks)))
    await until(rig.store.waits.is_set)
    later = asyncio.create_task(rig.submit(2))
    await until(lambda: len(rig.engine.state.tasks) == 2)
    rig.store.free.set()
    assert await reading == 1
    await asyncio.gather(submitting, later)


@pytest.mark.parametrize("bug", [NotFound("no such node"), ZeroDivisionError()])
async def test_a_view_that_fails_is_its_readers_trouble_only(rig: Rig, bug: Exception) -> None:
    def view() -> int:
        raise bug

    rig.store.free.clear()
    asking = asyncio.create_task(rig.submit(1))
    await until(rig.store.waits.is_set)
    reading = asyncio.create_task(rig.loop.read(view))
    await asyncio.sleep(0)
    rig.store.free.set()
    with pytest.raises(type(bug)):
        await reading
    await asking
    await rig.submit(2)


async def test_an_event_that_is_refused_though_nobody_asked_is_told(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.loop.tell(DrainAsked(OPERATOR, "n9", draining=True))
    assert [record.getMessage() for record in caplog.records] == [
        "DrainAsked was refused: no node is called 'n9'"
    ]


async def test_reads_do_not_wait_for_a_store_that_fails(rig: Rig) -> None:
    rig.store.free.clear()
    asking = asyncio.create_task(rig.submit(1))
    await until(rig.store.waits.is_set)
    waiting = asyncio.create_task(rig.loop.settled())
    await asyncio.sleep(0)
    rig.store.failure = Unavailable("the disk is full")
    rig.store.free.set()
    await asyncio.wait_for(waiting, 2)  # it began to wait before the trouble was known
    await asyncio.wait_for(rig.loop.settled(), 2)
    assert not asking.done()
    rig.store.failure = None
    await asking


async def test_stopping_commits_what_has_gathered(rig: Rig) -> None:
    rig.store.free.clear()
    first = asyncio.create_task(rig.submit(1))
    await until(rig.store.waits.is_set)
    second = asyncio.create_task(rig.submit(2))
    await asyncio.sleep(0)
    rig.loop.stop()
    rig.store.free.set()
    await rig.job
    await asyncio.gather(first, second)
    assert len(list(rig.store.store.live_tasks())) == 2


async def test_a_host_that_cannot_store_can_be_stopped(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.store.failure = Unavailable("the disk is full")
    asking = asyncio.create_task(rig.submit(1))
    await until(lambda: rig.loop.trouble)
    rig.loop.stop()
    await asyncio.wait_for(rig.job, 5)
    assert "stopping without the last changes" in caplog.text
    assert not asking.done()
    asking.cancel()


async def test_a_bug_in_a_commit_ends_the_loop_instead_of_answering(
    tmp_path: Path, rig: Rig
) -> None:
    engine, diary = a_cluster([a_node()]), Diary()
    broken = SlowStore(rig.store.store)
    broken.failure = ZeroDivisionError()
    loop = HostLoop(engine, broken, MemoryDocuments(), diary, SystemClock())  # type: ignore[arg-type]
    job = asyncio.create_task(loop.run())
    asking = asyncio.create_task(loop.ask(a_submission()))
    with pytest.raises(ZeroDivisionError):
        await job
    assert not asking.done()
    assert diary.lines == []
    asking.cancel()


# The same through the doors -------------------------------------------------------------


async def test_with_a_full_disk_the_host_says_so_reads_on_and_catches_up(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_RETRY_S", 0.02)
    write, is_full = TaskStore.write, True

    def refuse(store: TaskStore, group: Group) -> None:
        if is_full:
            reason = {"reason": "the disk is full"}
            raise Unavailable("the store is full", details=reason)
        write(store, group)

    def request(number: int) -> SubmitTask:
        return SubmitTask(request_id=f"request-{number}", spec=TaskSpec(command=("true",)))

    async def readiness() -> tuple[int, str]:
        async with aiohttp.ClientSession() as http, http.get(host.url + "/readyz") as answer:
            return answer.status, await answer.text()

    async with await host.connect() as admin:
        await admin.call(TASK_SUBMIT, request(1))
        monkeypatch.setattr(TaskStore, "write", refuse)
        held = asyncio.create_task(admin.call(TASK_SUBMIT, request(2)))
        async with asyncio.timeout(5):
            while await readiness() == (200, "ready\n"):
                pass
        assert await readiness() == (503, "nothing can be stored: the disk is full\n")
        with pytest.raises(Unavailable, match="cannot store anything now: the store is full"):
            await admin.call(TASK_SUBMIT, request(3))
        status = await admin.call(STATUS, GetStatus())
        assert status.problems[0] == "nothing can be stored: the store is full"
        assert len((await admin.call(TASK_LIST, ListTasks())).tasks) == 1
        await admin.call(EVENT_LIST, ListEvents())
        is_full = False
        assert not (await held).repeated
        assert (await admin.call(TASK_SUBMIT, request(2))).repeated
        assert len((await admin.call(TASK_LIST, ListTasks())).tasks) == 2
        assert await readiness() == (200, "ready\n")
        with pytest.raises(Conflict, match="was used for something else"):
            await admin.call(TASK_SUBMIT, replace(request(2), array=2))


async def test_many_clients_at_once_share_commits(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[Group] = []
    write = TaskStore.write

    def count(store: TaskStore, group: Group) -> None:
        groups.append(group)
        write(store, group)

    monkeypatch.setattr(TaskStore, "write", count)
    clients = [await host.connect() for _ in range(10)]
    spec = TaskSpec(command=("true",))
    answers = await asyncio.gather(
        *(
            client.call(TASK_SUBMIT, SubmitTask(request_id=f"request-{a}-{b}", spec=spec))
            for a, client in enumerate(clients)
            for b in range(20)
        )
    )
    assert len({answer.batch for answer in answers}) == 200
    assert sum(len(group.batches) for group in groups) == 200
    assert len(groups) < 60, "each submission waited for a disk of its own"
    for client in clients:
        await client.close()


async def test_a_heartbeat_that_nobody_wants_costs_no_turn_of_the_loop(rig: Rig) -> None:
    await rig.submit(1)
    await rig.loop.settled()
    rig.diary.lines.clear()
    rig.diary.is_watched = False
    rig.loop.tell(RunnerBeat(NodeName("n1"), Readings()))
    assert rig.diary.lines == ["nodes skipped"]
    assert not rig.loop._wake.is_set()
    rig.diary.is_watched = True
    rig.loop.tell(RunnerBeat(NodeName("n1"), Readings()))
    await until(lambda: len(rig.diary.lines) == 2)
    assert rig.diary.lines[1] == "readings n1"


async def test_nodes_that_changed_are_not_shown_when_nobody_watches(rig: Rig) -> None:
    rig.diary.is_watched = False
    await rig.submit(1)
    assert rig.diary.nodes == []
    assert "nodes skipped" in rig.diary.lines


async def test_long_work_is_written_in_pieces_and_others_are_answered_meanwhile(rig: Rig) -> None:
    many = asyncio.create_task(rig.loop.ask(a_submission(request_id="the-many", array=6 * PIECE)))
    await until(lambda: len(rig.store.groups) >= 1)
    small = await rig.submit(2)
    assert isinstance(small, Submitted)
    assert not many.done()
    whole = await many
    assert isinstance(whole, Submitted)
    sizes = [len(group.tasks) for group in rig.store.groups]
    assert sum(sizes) >= 6 * PIECE
    assert max(sizes) < 3 * PIECE
    assert len(list(rig.store.store.live_tasks())) == 6 * PIECE + 1
