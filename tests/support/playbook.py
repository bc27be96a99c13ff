"""Tell the host's engine things, and read what it does as lines a person can follow.

    play = Playbook(a_cluster([a_node("n1")]))
    assert play.tell(a_submission()) == ["save batch of 1", "save #1 queued", "answer"]

Stands in for the shell: what one event saves is encoded and kept before anything else
counts, every order is encoded and decoded, and the engine's invariants are checked after
every event. Tasks are called #1, #2 ... in the order in which they were first saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from kohaku_daemon.core.cluster.actions import (
    Answer,
    AnswerLater,
    CloseLink,
    ClusterAction,
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
from kohaku_daemon.core.cluster.events import (
    ClusterEvent,
    PlacementDue,
    RunnerReported,
    SteerAsked,
    Verb,
    WorkDue,
)
from kohaku_daemon.core.cluster.records import (
    BatchRecord,
    Document,
    DropDocument,
    EnvironmentRecord,
    EventRecord,
    JoinTokenRecord,
    NodeRecord,
    PutDocument,
    RegistryRecord,
    TaskRecord,
    TokenRecord,
)
from kohaku_daemon.core.cluster.recovery import restore_engine
from kohaku_daemon.core.cluster.state import ClusterState
from protocol.errors import KohakuError
from protocol.ids import BatchId, NodeName, TaskId
from protocol.messages.runner import (
    AttemptReport,
    AttemptState,
    Order,
    OrderKill,
    OrderPause,
    OrderPull,
    OrderResume,
    OrderStart,
)
from protocol.models.task import Exit, TaskState
from protocol.snowflake import SnowflakeSource
from tests.support.builders import NOW, a_user

T = TypeVar("T")


def recoded(value: T, kind: Any = None) -> T:
    """Encode a value and decode it again, as the wire and the stores do."""
    again: T = msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=kind or type(value))
    assert again == value
    return again


def document_key(record: Document) -> tuple[type[Document], str]:
    """Give what a document is found by."""
    match record:
        case NodeRecord():
            return NodeRecord, record.name
        case TokenRecord() | JoinTokenRecord():
            return type(record), record.digest
        case EnvironmentRecord():
            return EnvironmentRecord, record.name
        case RegistryRecord():
            return RegistryRecord, record.registry


@dataclass(slots=True)
class Kept:
    """What a host's stores hold: all that is left of it after a crash."""

    batches: dict[BatchId, BatchRecord] = field(default_factory=dict)
    tasks: dict[TaskId, TaskRecord] = field(default_factory=dict)
    events: list[EventRecord] = field(default_factory=list)
    documents: dict[tuple[type[Document], str], Document] = field(default_factory=dict)

    def commit(self, actions: Iterable[ClusterAction]) -> None:
        """Keep what these actions save, as it is now."""
        for action in actions:
            match action:
                case SaveBatch(batch):
                    self.batches[batch.id] = recoded(batch)
                case SaveTask(task, batch):
                    assert batch.id == task.batch
                    self.tasks[task.id] = recoded(task)
                case SaveEvent(event):
                    self.events.append(recoded(event))
                case PutDocument(record):
                    self.documents[document_key(record)] = recoded(record)
                case DropDocument(kind, key):
                    self.documents.pop((kind, key), None)
                case _:
                    pass

    def standing(self, name: int) -> TaskState | None:
        """Give how a task stands, or a batch: bad if one of its tasks is, as far as it is made."""
        task = self.tasks.get(TaskId(name))
        if task is not None:
            return task.state
        batch = self.batches.get(BatchId(name))
        if batch is None:
            return None
        states = [self.tasks[one].state for one in batch.ids() if one in self.tasks]
        bad = [one for one in states if one.is_final and one is not TaskState.COMPLETED]
        whole = len(states) == batch.count and set(states) == {TaskState.COMPLETED}
        return bad[0] if bad else TaskState.COMPLETED if whole else TaskState.QUEUED

    def ended(self) -> dict[TaskId, TaskState]:
        """Give the tasks that have ended."""
        return {task.id: task.state for task in self.tasks.values() if task.state.is_final}

    def restored(self, now: float, lost_after_s: float = 120.0) -> ClusterEngine:
        """Make the engine that a host starts with."""
        state = ClusterState("test")
        documents = self.documents.values()
        state.fleet.load([one for one in documents if isinstance(one, NodeRecord)], now)
        for one in documents:
            if isinstance(one, JoinTokenRecord):
                state.fleet.join_tokens[one.digest] = one
            elif isinstance(one, EnvironmentRecord):
                state.environments[one.name] = one
            elif isinstance(one, RegistryRecord):
                state.registries[one.registry] = one
        last = max([0, *self.batches, *self.tasks])
        last_event = self.events[-1].id if self.events else 0
        engine = ClusterEngine(
            state, SnowflakeSource(1, last), last_event=last_event, lost_after_s=lost_after_s
        )
        live = [recoded(task) for task in self.tasks.values() if not task.state.is_final]
        batches = [self.batches[number] for number in sorted({task.batch for task in live})]
        restore_engine(engine, batches, sorted(live, key=lambda task: task.id), self.standing, now)
        state.check_invariants()
        return engine


class Playbook:
    """A host to talk to."""

    def __init__(self, engine: ClusterEngine) -> None:
        self.engine = engine
        self.kept = Kept()
        for node in engine.state.fleet.nodes.values():
            self.kept.commit([PutDocument(node.record)])
        self.now = NOW
        #: What the last request was answered with.
        self.answer: Any = None
        self.refusal: KohakuError | None = None
        #: Orders of the last event.
        self.orders: list[Order] = []
        self._names: dict[TaskId, int] = {}

    def tell(self, event: ClusterEvent, *, after_s: float = 0.0) -> list[str]:
        """Tell one event, ``after_s`` seconds after the last, and give what the host does."""
        self.now += after_s
        actions = self.engine.handle(event, self.now)
        self.kept.commit(actions)
        self.engine.state.check_invariants()
        self.orders = [
            recoded(action.order, Order) for action in actions if isinstance(action, SendOrder)
        ]
        return list(dict.fromkeys(self._line(action) for action in actions))

    def finish(self) -> int:
        """Let long work be done to its end, and give how many more pieces that took."""
        pieces = 0
        while self.engine.has_work:
            self.tell(WorkDue())
            pieces += 1
        return pieces

    def place(self) -> list[str]:
        """Let what waits be placed, and give the orders."""
        return [line for line in self.tell(PlacementDue()) if ": " in line]

    def run(self, event: ClusterEvent) -> list[str]:
        """Tell a submission, place it, and have its runners say that it runs."""
        self.tell(event)
        lines = self.place()
        for order in self.orders:
            assert isinstance(order, OrderStart)
            task = self.engine.state.tasks[order.task]
            self.tell(RunnerReported(task.node, (self.report(task.id, AttemptState.RUNNING),)))
        return lines

    def id(self, number: int) -> TaskId:
        """Give the id of the task called #number."""
        return {name: task for task, name in self._names.items()}[number]

    def task(self, number: int) -> TaskRecord:
        """Give the task called #number as it is kept."""
        return self.kept.tasks[self.id(number)]

    def states(self) -> list[str]:
        """Give the states of all tasks, in order."""
        return [str(self.kept.tasks[task].state) for task in sorted(self._names)]

    def report(
        self,
        task: TaskId,
        state: AttemptState,
        *,
        attempt: int = 1,
        exit_: Exit | None = None,
        note: str = "",
    ) -> AttemptReport:
        """Make what a runner says of a task."""
        started_at = 0.0 if state is AttemptState.ACCEPTED else self.now
        return recoded(
            AttemptReport(
                task=task,
                attempt=attempt,
                state=state,
                at=self.now,
                started_at=started_at,
                exit=exit_,
                note=note,
            )
        )

    def hear(
        self,
        number: int,
        state: AttemptState,
        *,
        node: str = "n1",
        attempt: int = 1,
        exit_: Exit | None = None,
        note: str = "",
    ) -> list[str]:
        """Tell a runner's report of the task called #number."""
        report = self.report(self.id(number), state, attempt=attempt, exit_=exit_, note=note)
        return self.tell(RunnerReported(NodeName(node), (report,)))

    def steer(self, verb: Verb, *numbers: int, user: str = "ada") -> list[str]:
        """Ask something of tasks."""
        tasks = tuple(map(self.id, numbers))
        return self.tell(SteerAsked(a_user(user), verb, tasks, self.kept.ended()))

    def kill(self, *numbers: int) -> list[str]:
        """Ask for the end of tasks."""
        return self.steer(Verb.KILL, *numbers)

    def restart(self) -> None:
        """Crash the host and start it again from what it kept."""
        self.engine = self.kept.restored(self.now)

    def _name(self, task: TaskId) -> str:
        return f"#{self._names.setdefault(task, len(self._names) + 1)}"

    def _line(self, action: ClusterAction) -> str:
        match action:
            case SaveBatch(batch):
                return f"save batch of {batch.size}"
            case SaveTask(task):
                return f"save {self._name(task.id)} {task.state}"
            case SaveEvent(event):
                return f"diary {event.kind}"
            case PutDocument(record):
                return f"keep {_KINDS[type(record)]} {document_key(record)[1]}"
            case DropDocument(kind, key):
                return f"drop {_KINDS[kind]} {key}"
            case NodeChanged(node):
                return f"show {node}"
            case ReadingsChanged(node):
                return f"show readings of {node}"
            case EnvironmentChanged(name):
                return f"show environment {name}"
            case SendOrder(node, order):
                return f"{node}: {self._order(order)}"
            case CloseLink(node, _):
                return f"close the link of {node}"
            case Answer(value):
                self.answer, self.refusal = value, None
                return "answer"
            case AnswerLater():
                self.answer, self.refusal = None, None
                return "answer later"
            case Refuse(error):
                self.answer, self.refusal = None, error
                return f"refuse {error.code}"

    def _order(self, order: Order) -> str:
        match order:
            case OrderStart(task=task, attempt=attempt):
                return f"start {self._name(task)}/{attempt}"
            case OrderKill(task=task, attempt=attempt):
                return f"kill {self._name(task)}/{attempt}"
            case OrderPause(task=task, attempt=attempt):
                return f"pause {self._name(task)}/{attempt}"
            case OrderResume(task=task, attempt=attempt):
                return f"resume {self._name(task)}/{attempt}"
            case OrderPull(image=image):
                return f"pull {image.environment}"
            case _:
                raise AssertionError(f"the engine gave an unexpected order: {order}")


_KINDS: Final[dict[type[Document], str]] = {
    NodeRecord: "node",
    TokenRecord: "token",
    JoinTokenRecord: "join token",
    EnvironmentRecord: "environment",
    RegistryRecord: "registry",
}
