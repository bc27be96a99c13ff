"""The host's one loop: events into the engine, its actions to the disk and then to the world.

Knows: that everything saved together is committed before anything of it is answered,
ordered or announced, and that what arrives during a commit gathers for the next one.
Does not know: what events mean, who asked, what a commit is made of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeVar, cast

from kohaku_daemon.clock import Clock
from kohaku_daemon.core.cluster.actions import (
    Answer,
    AnswerLater,
    CloseLink,
    EnvironmentChanged,
    NodeChanged,
    ReadingsChanged,
    Refuse,
    SaveBatch,
    SaveEvent,
    SaveTask,
    SendOrder,
)
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.environments import show_environment
from kohaku_daemon.core.cluster.events import (
    ClusterEvent,
    PlacementDue,
    StoreFailing,
    StoreWell,
    WorkDue,
)
from kohaku_daemon.core.cluster.records import (
    AuditRecord,
    BatchRecord,
    DocumentChange,
    DropDocument,
    EventRecord,
    PutDocument,
)
from kohaku_daemon.host.meters import Meters
from kohaku_daemon.host.subscriptions import TaskChange
from kohaku_daemon.store.documents import Documents
from kohaku_daemon.store.tasks import Group, TaskStore, batch_row, task_row
from kohaku_daemon.writer import Writer
from protocol.errors import Unavailable
from protocol.ids import NodeName, TaskId
from protocol.messages.runner import Order
from protocol.models.environment import Environment
from protocol.models.node import Node

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
    | EnvironmentChanged
    | SendOrder
    | CloseLink
    | Answer
    | AnswerLater
)

#: Told what comes of a request, once that is committed.
_Answered = Callable[[object], None]

_log = logging.getLogger(__name__)

#: Seconds between tries to write what could not be written.
_RETRY_S: Final = 1.0
#: Seconds a request waits for a store that fails before it is told so.
_PATIENCE_S: Final = 5.0


class World(Protocol):
    """What the loop tells of committed changes."""

    def send_orders(self, node: NodeName, orders: Sequence[Order]) -> None:
        """Pass orders to a runner if its link is open."""

    def close_link(self, node: NodeName, reason: str) -> None:
        """Close a runner's link."""

    def wants_nodes(self) -> bool:
        """Say whether somebody would see nodes that changed: if not, they are not shown."""

    def tasks_changed(self, tasks: Mapping[TaskId, TaskChange]) -> None:
        """Show tasks that changed."""

    def nodes_changed(
        self, nodes: Mapping[NodeName, Node | None], readings: Iterable[Node]
    ) -> None:
        """Show nodes that changed, None for one that is no more, and readings."""

    def nodes_skipped(self) -> None:
        """Note that nodes changed while nobody wanted them."""

    def environments_changed(self, environments: Mapping[str, Environment | None]) -> None:
        """Show environments that changed, None for one that is no more, and work on them."""

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

    tasks: dict[TaskId, TaskChange]
    #: Nodes that changed, and nodes whose readings did; both None if nobody wants them.
    nodes: dict[NodeName, Node | None] | None
    readings: list[Node] | None
    environments: dict[str, Environment | None]


@dataclass(slots=True)
class _Gathering:
    """What will be committed together, and what is owed to the world once it is."""

    batches: list[BatchRecord] = field(default_factory=list)
    #: Each task once, however often it changed.
    tasks: dict[TaskId, SaveTask] = field(default_factory=dict)
    events: list[EventRecord] = field(default_factory=list)
    audits: list[AuditRecord] = field(default_factory=list)
    documents: list[DocumentChange] = field(default_factory=list)
    orders: list[SendOrder | CloseLink] = field(default_factory=list)
    nodes: dict[NodeName, None] = field(default_factory=dict)
    readings: dict[NodeName, None] = field(default_factory=dict)
    environments: dict[str, None] = field(default_factory=dict)
    answers: list[tuple[_Answered, object]] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)

    def is_empty(self) -> bool:
        """Whether there is nothing to commit, tell or answer."""
        return not (
            self.batches or self.tasks or self.events or self.audits or self.documents
            or self.orders or self.nodes or self.readings or self.environments or self.answers
            or self.reads
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
        meters: Meters | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._documents = documents
        self._world = world
        self._clock = clock
        self._meters = meters or Meters()
        self._gathering = _Gathering()
        self._wake = asyncio.Event()
        self._committing = False
        self._stopping = False
        #: Those who wait in ``read``.
        self._readers: set[_Read] = set()
        #: One thread: commits are one after the other, and SQLite is used by one at a time.
        self._writer = Writer("commit")
        #: Those who wait for an answer and are not patient.
        self._impatient: set[asyncio.Future[object]] = set()
        #: Those whose answers come when long work is done, by the number these will have.
        self._later: dict[int, _Answered] = {}
        #: Why the last commit failed; empty while commits succeed.
        self.trouble = ""
        #: The same in few words that anybody may read.
        self.reason = ""
        #: Since when, by the monotonic clock.
        self._failing_since = 0.0

    async def ask(
        self, event: ClusterEvent, audit: AuditRecord | None = None, *, patient: bool = False
    ) -> object:
        """Handle a request and give its answer once all it changed is committed.

        While nothing can be stored it is refused, unless it is ``patient``: a runner's report
        is true whether or not it can be kept, and waits until it can.

        Raises:
            KohakuError: The engine refused it, or nothing can be stored at present.
        """
        if self.trouble and not patient:
            raise Unavailable(
                f"the host cannot store anything now: {self.trouble}",
                hint="reads go on; an operator has to look at the host's disk",
            )
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        refusal = self._handle(event, partial(_resolve, future))
        self._wake.set()
        if refusal is not None:
            if audit is not None:
                self.audit(audit, outcome=refusal.error.code)
            try:
                raise refusal.error
            finally:
                # Its traceback holds this frame. Held by it in turn, all that was asked would
                # stay until the garbage collector comes, and it may be large.
                del refusal
        if audit is not None:
            self.audit(audit)
        if patient:
            return await future
        self._impatient.add(future)
        try:
            return await future
        finally:
            self._impatient.discard(future)

    def ask_later(self, event: ClusterEvent, answer: Callable[[object], None]) -> None:
        """Handle a patient request, and have ``answer`` called once all it changed is committed.

        As ``ask`` for who need not wait: it costs no job and no turn of the event loop.

        Raises:
            KohakuError: The engine refused it.
        """
        refusal = self._handle(event, answer)
        self._wake.set()
        if refusal is not None:
            try:
                raise refusal.error
            finally:
                del refusal  # as above

    def tell(self, event: ClusterEvent) -> None:
        """Handle something that happened and that nobody waits for."""
        self._happen(event)
        # Most heartbeats change nothing that anybody wants: they cost no turn of the loop.
        if not (self._gathering.is_empty() and self._engine.is_settled):
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
            self._writer.close()

    def stop(self) -> None:
        """Let ``run`` end once everything is committed, or cannot be."""
        self._stopping = True
        self._wake.set()

    def _happen(self, event: ClusterEvent) -> None:
        refusal = self._handle(event, None)
        if refusal is not None:
            _log.warning("%s was refused: %s", type(event).__name__, refusal.error)

    def _handle(self, event: ClusterEvent, answered: _Answered | None) -> Refuse | None:
        refusal = None
        for action in self._engine.handle(event, self._clock.now()):
            if isinstance(action, Refuse):
                refusal = action
            else:
                self._gather(action, answered)
        return refusal

    def _gather(self, action: _Kept, answered: _Answered | None) -> None:
        gathering = self._gathering
        # The common ones first: nearly all are these four.
        if type(action) is SaveTask:
            gathering.tasks[action.task.id] = action
            return
        if type(action) is NodeChanged:
            gathering.nodes[action.node] = None
            return
        if type(action) is SendOrder:
            gathering.orders.append(action)
            return
        if type(action) is ReadingsChanged:
            if self._world.wants_nodes():
                gathering.readings[action.node] = None
            else:
                self._world.nodes_skipped()
            return
        match action:
            case SaveTask() | NodeChanged() | SendOrder() | ReadingsChanged():
                pass
            case CloseLink():
                gathering.orders.append(action)
            case EnvironmentChanged(name):
                gathering.environments[name] = None
            case SaveBatch(new):
                gathering.batches.append(new)
            case SaveEvent(event):
                gathering.events.append(event)
            case PutDocument() | DropDocument():
                gathering.documents.append(action)
            case Answer(value, number):
                if number:
                    answered = self._later.pop(number, None)
                if answered is not None:
                    gathering.answers.append((answered, value))
            case AnswerLater(number):
                if answered is not None:
                    self._later[number] = answered

    async def _commit(self) -> None:
        backlog = self._engine.state.backlog
        if self._engine.has_work:
            self._happen(WorkDue())
        if not backlog.is_settled:
            began = self._clock.monotonic()
            self._happen(PlacementDue())
            self._meters.placements.observe(self._clock.monotonic() - began)
        if not self._engine.is_settled:
            self._wake.set()  # what more there is to do is done once this group is written
        gathering, self._gathering = self._gathering, _Gathering()
        if gathering.is_empty():
            await asyncio.sleep(0)  # nothing to write, and perhaps more to do: others first
            return
        # Encoded here and now: the engine goes on changing the records during the commit.
        shown = self._view(gathering)
        group = Group(
            batches=[batch_row(batch) for batch in gathering.batches],
            tasks=[row for row, _ in shown.tasks.values()],
            events=gathering.events,
            audits=gathering.audits,
        )
        for read in gathering.reads:
            read.look()
        self._committing = True
        try:
            await self._write(group, gathering.documents)
        finally:
            self._committing = False
        self._release(gathering, shown)

    def _view(self, gathering: _Gathering) -> _Shown:
        tasks = {id_: (task_row(save.task), save.batch) for id_, save in gathering.tasks.items()}
        state = self._engine.state
        environments = {name: show_environment(state, name) for name in gathering.environments}
        if not self._world.wants_nodes():
            return _Shown(tasks, None, None, environments)
        nodes = state.fleet.nodes
        return _Shown(
            tasks,
            {name: nodes[name].view() if name in nodes else None for name in gathering.nodes},
            [nodes[name].view() for name in gathering.readings if name in nodes],
            environments,
        )

    async def _write(self, group: Group, documents: list[DocumentChange]) -> None:
        """Write, however often it takes: memory is ahead of the disk and must not be alone.

        Raises:
            Unavailable: It failed, and the host is to stop.
        """
        if not (group.batches or group.tasks or group.events or group.audits or documents):
            return
        while True:
            began = self._clock.monotonic()
            try:
                await self._writer.run(partial(self._write_now, group, documents))
            except Unavailable as error:
                self._note_trouble(error)
                if self._stopping:
                    raise
                await asyncio.sleep(_RETRY_S)
                continue
            if self.trouble:
                _log.warning("changes can be stored again")
                self.trouble = self.reason = ""
                self._happen(StoreWell())
                self._wake.set()
            self._meters.committed(self._clock.monotonic() - began, len(group.tasks))
            return

    def _note_trouble(self, error: Unavailable) -> None:
        is_news = not self.trouble
        self.trouble = error.message
        self.reason = str(error.details.get("reason", ""))
        if is_news:
            self._failing_since = self._clock.monotonic()
            _log.error("cannot store changes, will go on trying: %s", error)
            # Kept, as all the rest, once it can be.
            self._happen(StoreFailing(self.reason))
        for read in self._readers:
            read.look()
            read.tell()
        if self._clock.monotonic() - self._failing_since > _PATIENCE_S:
            self._disappoint(error)

    def _disappoint(self, error: Unavailable) -> None:
        """Tell those who wait that nobody knows whether and when what they asked is kept."""
        for future in self._impatient:
            if not future.done():
                future.set_exception(
                    Unavailable(
                        f"it could not be stored so far, and may yet be: {error.message}",
                        hint="look at the cluster before you repeat it; "
                        "the same request_id again does no harm",
                    )
                )

    def _write_now(self, group: Group, documents: list[DocumentChange]) -> None:
        # Documents first: a task may be on a node that has just joined, never the other way
        # round. Writing them twice, after a failure in between, changes nothing.
        if documents:
            self._documents.apply(documents)
            documents.clear()
        self._store.write(group)

    def _release(self, gathering: _Gathering, shown: _Shown) -> None:
        orders: dict[NodeName, list[Order]] = {}
        for order in gathering.orders:
            match order:
                case SendOrder(node, what):
                    orders.setdefault(node, []).append(what)
                case CloseLink(node, reason):
                    self._world.send_orders(node, orders.pop(node, ()))
                    self._world.close_link(node, reason)
        for node, what_to_do in orders.items():
            self._world.send_orders(node, what_to_do)
        self._world.tasks_changed(shown.tasks)
        if shown.nodes is not None and shown.readings is not None:
            self._world.nodes_changed(shown.nodes, shown.readings)
        elif gathering.nodes or gathering.readings:
            self._world.nodes_skipped()
        if shown.environments:
            self._world.environments_changed(shown.environments)
        for event in gathering.events:
            self._world.event_told(event)
        for answered, value in gathering.answers:
            answered(value)
        for read in gathering.reads:
            read.tell()


def _resolve(future: asyncio.Future[object], value: object) -> None:
    if not future.done():
        future.set_result(value)
