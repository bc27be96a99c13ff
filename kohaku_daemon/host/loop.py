"""The host's one loop: events into the engine, its actions to the disk and then to the world.

Knows: that everything saved together is committed before anything of it is answered,
ordered or announced, and that what arrives during a commit gathers for the next one.
Does not know: what events mean, who asked, what a commit is made of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar, cast

from kohaku_daemon.clock import Clock
from kohaku_daemon.core.cluster.actions import (
    Answer,
    CloseLink,
    NodeChanged,
    ReadingsChanged,
    Refuse,
    SaveBatch,
    SaveEvent,
    SaveTask,
    SendOrder,
)
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import ClusterEvent, PlacementDue
from kohaku_daemon.core.cluster.records import (
    AuditRecord,
    BatchRecord,
    DocumentChange,
    DropDocument,
    EventRecord,
    PutDocument,
    TaskRecord,
)
from kohaku_daemon.core.cluster.views import view_task
from kohaku_daemon.store.documents import Documents
from kohaku_daemon.store.tasks import Group, TaskStore, batch_row, task_row
from protocol.errors import Unavailable
from protocol.ids import NodeName, TaskId
from protocol.messages.runner import Order
from protocol.models.node import Node
from protocol.models.task import Task

V = TypeVar("V")

#: What comes of an event that is not refused.
_Kept = (
    SaveBatch
    | SaveTask
    | SaveEvent
    | PutDocument
    | DropDocument
    | NodeChanged
    | ReadingsChanged
    | SendOrder
    | CloseLink
    | Answer
)

_log = logging.getLogger(__name__)

#: Seconds between tries to write what could not be written.
_RETRY_S: Final = 1.0


class World(Protocol):
    """What the loop tells of committed changes."""

    def send_order(self, node: NodeName, order: Order) -> None:
        """Pass an order to a runner if its link is open."""

    def close_link(self, node: NodeName, reason: str) -> None:
        """Close a runner's link."""

    def task_changed(self, task: Task) -> None:
        """Show a task."""

    def node_changed(self, name: NodeName, node: Node | None) -> None:
        """Show a node, or that it is no more."""

    def readings_changed(self, node: Node) -> None:
        """Show a node's readings."""

    def event_told(self, event: EventRecord) -> None:
        """Show a line of the diary."""


@dataclass(slots=True, eq=False)
class _Read:
    """Somebody who wants to see the engine's memory as it is, once that is committed."""

    view: Callable[[], object]
    answer: asyncio.Future[object]
    #: What was seen, or why it could not be.
    seen: object = None
    error: Exception | None = None

    def look(self) -> None:
        """See what there is now."""
        try:
            self.seen = self.view()
        except Exception as error:  # the trouble of whoever reads, and not of the commit
            self.error = error

    def tell(self) -> None:
        """Tell what was seen."""
        if self.answer.done():
            return
        if self.error is not None:
            self.answer.set_exception(self.error)
        else:
            self.answer.set_result(self.seen)


@dataclass(slots=True)
class _Shown:
    """What a group shows once it is committed, as it was when the group was closed."""

    tasks: list[Task]
    nodes: dict[NodeName, Node | None]
    readings: list[Node]


@dataclass(slots=True)
class _Gathering:
    """What will be committed together, and what is owed to the world once it is."""

    batches: list[BatchRecord] = field(default_factory=list)
    #: Each task once, however often it changed.
    tasks: dict[TaskId, tuple[TaskRecord, BatchRecord]] = field(default_factory=dict)
    events: list[EventRecord] = field(default_factory=list)
    audits: list[AuditRecord] = field(default_factory=list)
    documents: list[DocumentChange] = field(default_factory=list)
    orders: list[SendOrder | CloseLink] = field(default_factory=list)
    nodes: dict[NodeName, None] = field(default_factory=dict)
    readings: dict[NodeName, None] = field(default_factory=dict)
    answers: list[tuple[asyncio.Future[object], object]] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)

    def is_empty(self) -> bool:
        """Whether there is nothing to commit, tell or answer."""
        return not (
            self.batches or self.tasks or self.events or self.audits or self.documents
            or self.orders or self.nodes or self.readings or self.answers or self.reads
        )  # fmt: skip


class HostLoop:
    """Feeds the engine and commits what it decides."""

    def __init__(
        self,
        engine: ClusterEngine,
        store: TaskStore,
        documents: Documents,
        world: World,
        clock: Clock,
        *,
        on_commit: Callable[[float, int], None] = lambda _seconds, _tasks: None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._documents = documents
        self._world = world
        self._clock = clock
        self._on_commit = on_commit
        self._gathering = _Gathering()
        self._wake = asyncio.Event()
        self._committing = False
        self._stopping = False
        #: Those who wait in ``read``.
        self._readers: set[_Read] = set()
        #: One thread: commits are one after the other, and SQLite is used by one at a time.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        #: Why the last commit failed; empty while commits succeed.
        self.trouble = ""

    async def ask(self, event: ClusterEvent, audit: AuditRecord | None = None) -> object:
        """Handle a request and give its answer once all it changed is committed.

        Raises:
            KohakuError: The engine refused it, or nothing can be stored at present.
        """
        if self.trouble:
            raise Unavailable(
                f"the host cannot store anything now: {self.trouble}",
                hint="reads go on; an operator has to look at the host's disk",
            )
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        refusal = self._handle(event, future)
        self._wake.set()
        if refusal is not None:
            if audit is not None:
                self.audit(audit, outcome=refusal.error.code)
            raise refusal.error
        if audit is not None:
            self.audit(audit)
        return await future

    def tell(self, event: ClusterEvent) -> None:
        """Handle something that happened and that nobody waits for."""
        self._happen(event)
        self._wake.set()

    def audit(self, record: AuditRecord, outcome: str = "ok") -> None:
        """Keep a line of who did what."""
        if outcome != "ok":
            record = AuditRecord(
                at=record.at, actor=record.actor, role=record.role, address=record.address,
                method=record.method, subject=record.subject, outcome=outcome,
            )  # fmt: skip
        self._gathering.audits.append(record)
        self._wake.set()

    async def settled(self) -> None:
        """Wait until the store has all that has happened so far, as a read of it must.

        While nothing can be stored this returns at once: an old answer beats none.
        """
        await self.read(lambda: None)

    async def read(self, view: Callable[[], V]) -> V:
        """Give a view of the engine's memory, taken at a moment all of which is committed.

        Memory goes on changing while a group is written, so it is looked at when the group is
        closed, and told when the group is on the disk. While nothing can be stored it is told
        at once: an answer that is ahead of the disk beats none, and the status says so.

        Raises:
            KohakuError: What ``view`` raised.
        """
        if self.trouble or (self._gathering.is_empty() and not self._committing):
            return view()
        read = _Read(view, asyncio.get_running_loop().create_future())
        self._gathering.reads.append(read)
        self._wake.set()
        self._readers.add(read)
        try:
            return cast("V", await read.answer)
        finally:
            self._readers.discard(read)

    async def run(self) -> None:
        """Commit group after group, until ``stop``; then commit what has gathered."""
        try:
            while not self._stopping:
                await self._wake.wait()
                self._wake.clear()
                await self._commit()
            await self._commit()
        except Unavailable as error:
            # Nobody was told of them, so nobody relies on them.
            _log.error("stopping without the last changes, which cannot be stored: %s", error)
        finally:
            self._writer.shutdown()

    def stop(self) -> None:
        """Let ``run`` end once everything is committed, or cannot be."""
        self._stopping = True
        self._wake.set()

    def _happen(self, event: ClusterEvent) -> None:
        refusal = self._handle(event, None)
        if refusal is not None:
            _log.warning("%s was refused: %s", type(event).__name__, refusal.error)

    def _handle(self, event: ClusterEvent, future: asyncio.Future[object] | None) -> Refuse | None:
        refusal = None
        for action in self._engine.handle(event, self._clock.now()):
            if isinstance(action, Refuse):
                refusal = action
            else:
                self._gather(action, future)
        return refusal

    def _gather(self, action: _Kept, future: asyncio.Future[object] | None) -> None:
        gathering = self._gathering
        match action:
            case SaveTask(task, batch):
                gathering.tasks[task.id] = (task, batch)
            case SendOrder() | CloseLink():
                gathering.orders.append(action)
            case NodeChanged(node):
                gathering.nodes[node] = None
            case ReadingsChanged(node):
                gathering.readings[node] = None
            case SaveBatch(new):
                gathering.batches.append(new)
            case SaveEvent(event):
                gathering.events.append(event)
            case PutDocument() | DropDocument():
                gathering.documents.append(action)
            case Answer(value):
                if future is not None:
                    gathering.answers.append((future, value))

    async def _commit(self) -> None:
        self._happen(PlacementDue())
        gathering, self._gathering = self._gathering, _Gathering()
        if gathering.is_empty():
            return
        # Encoded here and now: the engine goes on changing the records during the commit.
        group = Group(
            batches=[batch_row(batch) for batch in gathering.batches],
            tasks=[task_row(task) for task, _ in gathering.tasks.values()],
            events=gathering.events,
            audits=gathering.audits,
        )
        shown = self._view(gathering)
        for read in gathering.reads:
            read.look()
        self._committing = True
        try:
            await self._write(group, gathering.documents)
        finally:
            self._committing = False
        self._release(gathering, shown)

    def _view(self, gathering: _Gathering) -> _Shown:
        nodes = self._engine.state.fleet.nodes
        return _Shown(
            tasks=[view_task(task, batch) for task, batch in gathering.tasks.values()],
            nodes={name: nodes[name].view() if name in nodes else None for name in gathering.nodes},
            readings=[nodes[name].view() for name in gathering.readings if name in nodes],
        )

    async def _write(self, group: Group, documents: list[DocumentChange]) -> None:
        """Write, however often it takes: memory is ahead of the disk and must not be alone.

        Raises:
            Unavailable: It failed, and the host is to stop.
        """
        if not (group.batches or group.tasks or group.events or group.audits or documents):
            return
        loop = asyncio.get_running_loop()
        while True:
            began = self._clock.monotonic()
            try:
                await loop.run_in_executor(self._writer, self._write_now, group, documents)
            except Unavailable as error:
                self._note_trouble(error)
                if self._stopping:
                    raise
                await asyncio.sleep(_RETRY_S)
                continue
            if self.trouble:
                _log.warning("changes can be stored again")
                self.trouble = ""
            self._on_commit(self._clock.monotonic() - began, len(group.tasks))
            return

    def _note_trouble(self, error: Unavailable) -> None:
        if not self.trouble:
            _log.error("cannot store changes, will go on trying: %s", error)
        self.trouble = error.message
        for read in self._readers:
            read.look()
            read.tell()

    def _write_now(self, group: Group, documents: list[DocumentChange]) -> None:
        # Documents first: a task may be on a node that has just joined, never the other way
        # round. Writing them twice, after a failure in between, changes nothing.
        if documents:
            self._documents.apply(documents)
            documents.clear()
        self._store.write(group)

    def _release(self, gathering: _Gathering, shown: _Shown) -> None:
        for order in gathering.orders:
            match order:
                case SendOrder(node, what):
                    self._world.send_order(node, what)
                case CloseLink(node, reason):
                    self._world.close_link(node, reason)
        for task in shown.tasks:
            self._world.task_changed(task)
        for name, there in shown.nodes.items():
            self._world.node_changed(name, there)
        for reading in shown.readings:
            self._world.readings_changed(reading)
        for event in gathering.events:
            self._world.event_told(event)
        for future, value in gathering.answers:
            if not future.done():
                future.set_result(value)
        for read in gathering.reads:
            read.tell()
