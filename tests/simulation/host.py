"""The host's shell in a simulation: groups of events, one commit for each, death anywhere.

The engine and its records are the real ones. What is committed, answered and ordered when is
as in ``kohaku_daemon.host.loop``: documents first, then tasks, then orders, then answers; a
refusal is told at once; what comes during a commit gathers for the next.

Knows: that order, and where a crash can fall into it.
Does not know: runners (``door``), people (``people``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec

from kohaku_daemon.core.cluster.actions import (
    Answer,
    AnswerLater,
    CloseLink,
    ClusterAction,
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
    RunnerBeat,
    StoreFailing,
    StoreWell,
    Ticked,
    WorkDue,
)
from kohaku_daemon.core.cluster.records import (
    BatchRecord,
    DocumentChange,
    DropDocument,
    EventRecord,
    PutDocument,
    TaskRecord,
)
from protocol.errors import KohakuError, Unavailable
from protocol.ids import TaskId
from protocol.models.task import TaskState
from tests.simulation.disk import Disk
from tests.simulation.stage import BrokenPromise, Clock, Stage, promise

#: Given the answer to a request, or the error.
Reply = Callable[[object], None]

#: Seconds that news may be on their way at most while a link is not given up.
_NEWS_WITHIN_S: Final = 25.0

#: Seconds a request waits for a store that fails before it is told so.
_PATIENCE_S: Final = 5.0

_encode: Final = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Gathering:
    """What will be committed together, and what is owed once it is."""

    batches: list[BatchRecord] = field(default_factory=list)
    tasks: dict[TaskId, TaskRecord] = field(default_factory=dict)
    events: list[EventRecord] = field(default_factory=list)
    documents: list[DocumentChange] = field(default_factory=list)
    orders: list[SendOrder | CloseLink] = field(default_factory=list)
    answers: list[Callable[[], None]] = field(default_factory=list)
    #: Called once it is closed, and once it is committed.
    looks: list[Callable[[], None]] = field(default_factory=list)
    reads: list[Callable[[], None]] = field(default_factory=list)

    def is_empty(self) -> bool:
        """Whether there is nothing to commit or answer."""
        return not (
            self.batches or self.tasks or self.events or self.documents or self.orders
            or self.answers or self.looks or self.reads
        )  # fmt: skip


class _Once:
    """Takes the first answer to a request; a later one is told to nobody."""

    def __init__(self, reply: Reply) -> None:
        self.is_done = False
        self._reply = reply

    def __call__(self, value: object) -> None:
        if not self.is_done:
            self.is_done = True
            self._reply(value)


class Host:
    """The one host."""

    def __init__(
        self,
        stage: Stage,
        disk: Disk,
        clock: Clock,
        engine: type[ClusterEngine],
    ) -> None:
        self.disk = disk
        self.clock = clock
        self.engine: ClusterEngine | None = None
        #: Counts the lives: what was begun in an earlier one is not finished.
        self.life = 0
        #: Carries out what is released to runners.
        self.on_order: Callable[[SendOrder | CloseLink], None] = lambda _: None
        self.on_death: Callable[[], None] = lambda: None
        self._stage = stage
        self._random = stage.chance()
        self._engine = engine
        self._gathering = Gathering()
        self._committing = False
        self._trouble = False
        self._failing_since = 0.0
        self._impatient: list[_Once] = []
        #: To whom answers go that come later, by their numbers.
        self._replies: dict[int, Reply | None] = {}
        #: Since when a task is lost although it runs on a node that is there.
        self._lost_since: dict[TaskId, float] = {}
        #: Attempts that were given GPUs.
        self._given: set[tuple[TaskId, int]] = set()
        #: Boundaries until it dies; negative for no such plan.
        self._dies_in = -1
        self._down_s = 0.0

    # Life and death -----------------------------------------------------------------

    def boot(self) -> None:
        """Start from what is committed."""
        if self.engine is not None:
            return
        self.life += 1
        self._gathering, self._committing, self._trouble = Gathering(), False, False
        self._impatient = []
        self._replies = {}
        self.engine = self.disk.boot(self._engine, self.clock.now())
        self._check()
        self._stage.tell("the host is up")
        life = self.life
        self._stage.after(1.0, lambda: self._tick(life))

    def die(self, down_s: float) -> None:
        """Lose everything that was not committed."""
        self.engine = None
        self._dies_in = -1
        self._stage.tell("the host dies")
        self.on_death()
        self._stage.after(down_s, self.boot)

    def doom(self, step: int, down_s: float) -> None:
        """Let it die at the ``step``-th boundary between two actions from now on."""
        if self.engine is not None:
            self._dies_in, self._down_s = step, down_s

    def spare(self) -> None:
        """Let it live after all."""
        self._dies_in = -1

    def _dies(self) -> bool:
        if self._dies_in < 0:
            return False
        self._dies_in -= 1
        if self._dies_in >= 0:
            return False
        self.die(self._down_s)
        return True

    # Events -------------------------------------------------------------------------

    def ask(self, event: ClusterEvent, reply: Reply, *, patient: bool = False) -> None:
        """Handle a request; the answer comes once all it changed is committed, a refusal now.

        While nothing can be stored it is refused, unless it is ``patient``.
        """
        if self.engine is None:
            return
        if patient:
            self._handle(event, reply)
        elif self._trouble:
            reply(Unavailable("the host cannot store anything now"))
        else:
            once = _Once(reply)
            self._impatient.append(once)
            self._handle(event, once)

    def tell(self, event: ClusterEvent) -> None:
        """Handle something that happened and that nobody waits for."""
        if self.engine is not None:
            self._handle(event, None)

    def settled(self, then: Callable[[], None]) -> None:
        """Go on once the stores have all that has happened so far."""
        if self.engine is None:
            return
        if self._trouble or (self._gathering.is_empty() and not self._committing):
            then()
        else:
            self._gathering.reads.append(then)
            self._wake()

    def look(self, view: Callable[[ClusterEngine], None]) -> None:
        """See the engine's memory when all that has happened so far is placed."""
        engine = self.engine
        if engine is None or self._trouble:
            return
        if self._gathering.is_empty() and not self._committing:
            view(engine)
        else:
            self._gathering.looks.append(lambda: view(engine))
            self._wake()

    def _tick(self, life: int) -> None:
        if self.life == life and self.engine is not None:
            self._check_lost(self.engine)
            self.tell(Ticked())
            self._stage.after(1.0, lambda: self._tick(life))

    def _handle(self, event: ClusterEvent, reply: Reply | None) -> None:
        assert self.engine is not None
        answered = False
        actions = self.engine.handle(event, self.clock.now())
        for action in actions:
            answered |= isinstance(action, Answer | AnswerLater | Refuse)
            self.gather(action, reply)
        if isinstance(event, RunnerBeat) and len(actions) == 1:
            return  # readings alone change nothing that is kept, and come all the time
        if actions:
            self._check()
        self._wake()
        promise(answered or reply is None, "requests are answered", "{} is not", event)

    def gather(self, action: ClusterAction, reply: Reply | None) -> None:
        """Note what an action saves, and what is owed once it is committed."""
        gathering = self._gathering
        match action:
            case SaveTask(task):
                gathering.tasks[task.id] = task
            case SendOrder() | CloseLink():
                gathering.orders.append(action)
            case SaveBatch(batch):
                gathering.batches.append(batch)
            case SaveEvent(event):
                gathering.events.append(event)
            case PutDocument() | DropDocument():
                gathering.documents.append(action)
            case Answer(value, number):
                to = self._replies.pop(number) if number else reply
                if to is not None:
                    gathering.answers.append(partial(to, value))
            case AnswerLater(number):
                self._replies[number] = reply
            case Refuse(error) if reply is not None:
                self.refused(error, reply)
            case _:
                pass

    def refused(self, error: KohakuError, reply: Reply) -> None:
        """Tell a refusal, which changed nothing and so waits for nothing."""
        reply(error)

    def _check(self) -> None:
        """Check what must hold between any two events."""
        assert self.engine is not None
        try:
            self.engine.state.check_invariants()
        except AssertionError as error:
            raise BrokenPromise("the books hold together", str(error)) from error

    def _check_lost(self, engine: ClusterEngine) -> None:
        """Check that what a node that is there runs does not stay lost."""
        lost = {
            task.id: self._lost_since.get(task.id, self._stage.now)
            for node in engine.state.fleet.nodes.values()
            if node.is_online
            for task in engine.state.tasks_on(node.name).values()
            if task.state is TaskState.LOST and self.disk.truth.runs(task.id, task.attempt)
        }
        for task, since in lost.items():
            promise(
                self._stage.now - since < _NEWS_WITHIN_S,
                "books tell the truth",
                "{} is lost since {} s, runs, and its node is there",
                task,
                _NEWS_WITHIN_S,
            )
        self._lost_since = lost

    # Commits ------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._committing:
            self._committing = True
            self._later(self._close_group)

    def _later(self, act: Callable[[], None], delay_s: float = 0.0) -> None:
        life = self.life

        def if_alive() -> None:
            if self.life == life and self.engine is not None:
                act()

        self._stage.after(delay_s or 0.0001 + 0.02 * self._random.random(), if_alive)

    def _close_group(self) -> None:
        if self.engine is not None and self.engine.has_work:
            self._handle(WorkDue(), None)
        self._handle(PlacementDue(), None)
        self._check_gpus()
        group, self._gathering = self._gathering, Gathering()
        if group.is_empty():
            self._committing = False
            self._go_on()
            return
        tasks = [_encode(task) for task in group.tasks.values()]
        for look in group.looks:
            look()
        self._later(lambda: self._write_documents(group, tasks))

    def _check_gpus(self) -> None:
        """Check that nobody was just given a GPU that is known to be out of order."""
        assert self.engine is not None
        nodes = self.engine.state.fleet.nodes
        for task in self._gathering.tasks.values():
            if task.claim is None or not task.claim.gpus or task.state is not TaskState.ASSIGNED:
                continue
            stored = self.disk.tasks.get(task.id)
            is_old = stored is not None and stored.attempt == task.attempt
            if not is_old and (task.id, task.attempt) not in self._given:
                self._given.add((task.id, task.attempt))
                faults = nodes[task.node].site.books.faults
                promise(
                    faults.keys().isdisjoint(task.claim.gpus),
                    "no broken GPU is given away",
                    "{} has {} of {}, where {} are broken",
                    task.id,
                    task.claim,
                    task.node,
                    faults,
                )

    def _write_documents(self, group: Gathering, tasks: list[bytes]) -> None:
        if self._is_in_trouble(lambda: self._write_documents(group, tasks)) or self._dies():
            return
        if group.documents:
            self.disk.write_documents(group.documents)
            group.documents.clear()
            self._later(lambda: self._write_tasks(group, tasks))
        else:
            self._write_tasks(group, tasks)

    def _write_tasks(self, group: Gathering, tasks: list[bytes]) -> None:
        if self._is_in_trouble(lambda: self._write_tasks(group, tasks)) or self._dies():
            return
        states = {
            task: self.disk.tasks[task].state for task in group.tasks if task in self.disk.tasks
        }
        self.disk.write_tasks(group.batches, tasks, group.events)
        for task in group.tasks:
            record = self.disk.tasks[task]
            if states.get(task) is not record.state:
                where = f" on {record.node}" if record.node else ""
                self._stage.tell("the books have {} as {}{}", task, record.state, where)
        self._release(group)

    def _is_in_trouble(self, again: Callable[[], None]) -> bool:
        was, self._trouble = self._trouble, self.disk.is_full
        if self._trouble:
            if not was:
                self._failing_since = self._stage.now
                self._handle(StoreFailing("the disk is full"), None)
            if self._stage.now - self._failing_since > _PATIENCE_S:
                self._disappoint()
            self._later(again, 1.0)
        elif was:
            self._handle(StoreWell(), None)
        return self._trouble

    def _disappoint(self) -> None:
        """Tell those who wait that nobody knows whether and when what they asked is kept."""
        impatient, self._impatient = self._impatient, []
        for once in impatient:
            once(Unavailable("it could not be stored so far, and may yet be"))

    def _release(self, group: Gathering) -> None:
        for order in group.orders:
            if self._dies():
                return
            self.on_order(order)
        for answer in (*group.answers, *group.reads):
            if self._dies():
                return
            answer()
        self._committing = False
        self._impatient = [once for once in self._impatient if not once.is_done]
        self._go_on()

    def _go_on(self) -> None:
        assert self.engine is not None
        if not (self._gathering.is_empty() and self.engine.is_settled):
            self._wake()
