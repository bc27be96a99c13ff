"""What can befall one task: placed, moved, tried again, ended, and what follows for others.

Knows: claims and the queue follow the state; an end may start another attempt, release or
end the tasks that wait for it, or end its gang.
Does not know: who asked, what runners said and whether they are believed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.cluster.actions import NodeChanged, SaveTask, SendOrder
from kohaku_daemon.core.cluster.hosts import hosts_of
from kohaku_daemon.core.cluster.long_work import LongWork, Work
from kohaku_daemon.core.cluster.records import Remnant, TaskRecord
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import LONGEST_DELAY_S, ClusterState, LiveBatch
from kohaku_daemon.core.cluster.views import describe_exit
from kohaku_daemon.core.task.lifecycle import TaskEvent, advance, ending
from protocol.ids import BatchId, NodeName, TaskId
from protocol.messages.runner import OrderKill, OrderStart
from protocol.models.task import Cause, Change, Claim, Exit, TaskSpec, TaskState

#: Stands for a user where the cluster itself has asked for an end. No user is called so.
CLUSTER: Final = "the cluster"
#: Seconds before the first retry; doubled with each, up to the longest. What fails at once
#: must not turn the cluster into a mill.
_FIRST_DELAY_S: Final = 1.0
#: Steps of a task's history that are kept: its beginning and its latest. A runner that says
#: "paused" and "running" for ever must not make a record grow without end.
_FIRST_STEPS: Final = 100
_LATEST_STEPS: Final = 900


class Moves:
    """Changes tasks, and writes down what is to be done about it."""

    def __init__(self, state: ClusterState, scribe: Scribe, works: LongWork) -> None:
        self._state = state
        self._scribe = scribe
        self._works = works
        #: Gangs that are not whole any more. They are ended when the event at hand is through,
        #: all at once: what is stored never has a part of one that could begin.
        self._broken: list[LiveBatch] = []
        #: What became of tasks and batches that others wait for: None for well, or the end that
        #: those get. They are told one after the other, for they may be many, and each may be
        #: waited for in turn.
        self._news: deque[tuple[int, Exit | None]] = deque()
        self._is_telling = False

    # Placing ------------------------------------------------------------------------

    def place_waiting(self) -> None:
        """Place what fits, or a part of it: ``backlog.is_settled`` says whether that was all."""
        state = self._state
        seats = state.backlog.place_waiting(state.fleet.sites, self._scribe.now, self._ends_at)
        placed = [self._assign(state.tasks[seat.task], seat.node, seat.claim) for seat in seats]
        # All first: each of a gang is told where the others are. That is one answer for all of
        # them, or a gang of 1024 would look up a million names.
        hosts: dict[BatchId, tuple[str, ...]] = {}
        for task in placed:
            if task.batch not in hosts:
                hosts[task.batch] = hosts_of(state, task.batch)
            self._order(task, hosts[task.batch])

    def _ends_at(self, task_id: TaskId) -> float:
        """Give when a placed task has surely ended; infinity if nobody knows."""
        task = self._state.tasks[task_id]
        spec = self.spec_of(task)
        if not spec.time_limit_s or not task.started_at or task.state is TaskState.LOST:
            return math.inf
        return task.started_at + spec.time_limit_s + spec.grace_s

    def _assign(self, task: TaskRecord, node: NodeName, claim: Claim) -> TaskRecord:
        self._state.fleet.nodes[node].site.books.enter(task.id, claim)
        task.node = node
        task.claim = claim
        task.reason = ""
        task.attempt = max(task.attempt, task.doubted) + 1
        self._state.tasks_on(node)[task.id] = task
        self.move(task, advance(task.state, TaskEvent.PLACED), "placed")
        self._scribe.add(NodeChanged(node))
        return task

    def order_start(self, task: TaskRecord) -> None:
        """Order the present attempt of a task."""
        self._order(task, hosts_of(self._state, task.batch))

    def _order(self, task: TaskRecord, hosts: tuple[str, ...]) -> None:
        batch = self._state.batch_of(task).record
        spec = batch.spec
        if row := batch.row(task.index):
            spec = replace(spec, env={**spec.env, **row})
        order = OrderStart(
            task=task.id,
            attempt=task.attempt,
            batch=task.batch,
            index=task.index,
            size=batch.size,
            spec=spec,
            claim=task.claim or Claim(),
            image=batch.image,
            trusted=batch.trusted,
            hosts=hosts,
        )
        self._scribe.add(SendOrder(task.node, order))

    def order_kill(self, task: TaskRecord) -> None:
        """Order the end of the present attempt."""
        grace_s = self.spec_of(task).grace_s
        order = OrderKill(task=task.id, attempt=task.attempt, grace_s=grace_s)
        self._scribe.add(SendOrder(task.node, order))

    # Moving -------------------------------------------------------------------------

    def move(self, task: TaskRecord, state: TaskState, cause: str, actor: str = "") -> None:
        """Bring a task into a state, and keep that."""
        task.state = state
        self.note(task, cause, actor)

    def note(self, task: TaskRecord, cause: str, actor: str = "") -> None:
        """Add a step to a task's history, and keep it."""
        change = Change(self._scribe.now, task.state, cause, actor, task.attempt, task.node)
        task.history = _extend(task.history, change)
        self.keep(task)

    def keep(self, task: TaskRecord) -> None:
        """Keep a task as it is now."""
        self._scribe.add(SaveTask(task, self._state.batch_of(task).record))

    def ask_end(self, task: TaskRecord, actor: str, cause: str = "end asked for") -> None:
        """Have a task ended that a runner may hold."""
        if not task.kill_asked_by:
            task.kill_asked_by = actor
            self.note(task, cause, actor)
        self.order_kill(task)

    def spec_of(self, task: TaskRecord) -> TaskSpec:
        """Give a live task's spec, without its row of variables."""
        return self._state.batch_of(task).record.spec

    # Losing and trying again --------------------------------------------------------

    def miss(self, task: TaskRecord, reason: str) -> None:
        """Take it that nobody knows what became of a task."""
        if self.spec_of(task).requeue_on_lost and not task.kill_asked_by:
            self.requeue_lost(task, f"{reason}; tries again, as asked")
        else:
            task.reason = reason
            self.move(task, advance(task.state, TaskEvent.MISSED), reason)
        self._scribe.tell("task.lost", f"task {task.id} is lost: {reason}", task=task)

    def requeue_lost(self, task: TaskRecord, cause: str, actor: str = "") -> None:
        """Make another attempt although the present one may still run on its node.

        Until the node says that it has ended, what it holds there is not given to others.
        """
        node = self._state.fleet.nodes.get(task.node)
        if node is not None and task.claim is not None:
            grace_s = self.spec_of(task).grace_s
            claim = node.site.books.give_up(task.id, task.attempt)
            remnant = Remnant(task.id, task.attempt, claim, grace_s)
            self._scribe.keep_remnants(node, (*node.record.remnants, remnant))
            order = OrderKill(task=task.id, attempt=task.attempt, grace_s=grace_s)
            self._scribe.add(SendOrder(node.name, order))
        self._requeue(task, cause, self._scribe.now, actor)

    def take_end(self, task: TaskRecord, exit_: Exit, at: float) -> None:
        """End an attempt as its runner says (``at``: UTC seconds), and the task unless it is
        to be tried again.
        """
        event = ending(exit_, kill_asked=bool(task.kill_asked_by))
        spec = self.spec_of(task)
        if (
            task.retried < spec.retries
            and event in {TaskEvent.FAILED, TaskEvent.OOM_KILLED}
            and not task.kill_asked_by
        ):
            self._try_again(task, exit_, spec)
        else:
            self.finish(task, event, exit_, at)

    def _try_again(self, task: TaskRecord, exit_: Exit, spec: TaskSpec) -> None:
        delay_s = min(_FIRST_DELAY_S * 2**task.retried, LONGEST_DELAY_S)
        task.retried += 1
        left = spec.retries - task.retried
        cause = (
            f"attempt {task.attempt} {describe_exit(exit_, spec, '')}; tries again in"
            f" {delay_s:.0f} s, {left} of {spec.retries} retries left"
        )
        self._let_go(task)
        self._requeue(task, cause, self._scribe.now + delay_s)

    def _requeue(self, task: TaskRecord, cause: str, not_before: float, actor: str = "") -> None:
        change = Change(self._scribe.now, TaskState.QUEUED, cause, actor, task.attempt, task.node)
        self._state.tasks_on(task.node).pop(task.id, None)
        task.state = advance(task.state, TaskEvent.REQUEUED)
        task.kill_asked_by = ""  # of the attempt that is over; who asks for another wants it
        task.node = NodeName("")
        task.claim = None
        task.started_at = 0.0
        task.not_before = not_before
        task.reason = cause
        task.history = _extend(task.history, change)
        self._scribe.add(SaveTask(task, self._state.batch_of(task).record))
        self._state.enqueue(task, self._scribe.now)

    # Ending -------------------------------------------------------------------------

    def finish(self, task: TaskRecord, event: TaskEvent, exit_: Exit, at: float) -> None:
        """End a task: state, exit, claim, queue; and what waits for it."""
        state = advance(task.state, event)
        if state is TaskState.KILLED and exit_.cause in {Cause.SIGNALLED, Cause.EXITED}:
            exit_ = replace(exit_, cause=Cause.KILLED)
        task.exit = exit_
        task.ended_at = at
        task.reason = describe_exit(exit_, self.spec_of(task), task.kill_asked_by)
        self.move(task, state, task.reason, task.kill_asked_by if state is TaskState.KILLED else "")
        self._let_go(task)
        batch = self._state.drop_task(task)
        if batch.record.gang and (not task.started_at or exit_.cause is Cause.START_FAILED):
            why = f"task {task.id} of its gang did not begin"
            self._break_gang(batch, Exit(Cause.GANG, message=why))
        if state is not TaskState.COMPLETED:
            batch.failed += 1
        if self._state.dependents:
            self._note_news(task, batch)

    def _break_gang(self, batch: LiveBatch, exit_: Exit) -> None:
        if batch.falls is None:
            batch.falls = exit_
            self._broken.append(batch)

    def _let_go(self, task: TaskRecord) -> None:
        if task.node and task.claim is not None and task.node in self._state.fleet.nodes:
            self._state.fleet.nodes[task.node].site.books.strike(task.id)
            self._state.backlog.loosen(task.node)
            self._scribe.add(NodeChanged(task.node))

    def _note_news(self, task: TaskRecord, batch: LiveBatch) -> None:
        """Note what an end means to those who wait for the task or for its batch."""
        names = [task.id, batch.record.id]
        news = None
        if task.state is not TaskState.COMPLETED:
            why = f"task {task.id}, which it had to wait for, {task.reason}"
            if task.exit is not None and task.exit.cause is Cause.DEPENDENCY:
                why = task.exit.message  # the first of the chain says it for all
            news = Exit(Cause.DEPENDENCY, message=why)
        elif batch.live or batch.failed:
            names = [task.id]
        self._news.extend((name, news) for name in names if name in self._state.dependents)

    def follow_up(self) -> None:
        """Do what the event at hand means for others, or begin with it."""
        self.end_broken()
        if self._news and not self._is_telling:
            self._is_telling = True
            self._works.begin(self._tell())

    def end_broken(self) -> None:
        """End what is left of gangs that are not whole any more."""
        while self._broken:
            for _ in self.bring_down(self._broken.pop()):
                pass

    def bring_down(self, batch: LiveBatch) -> Iterator[None]:
        """End the tasks of a batch that falls, one in each step."""
        assert batch.falls is not None, f"batch {batch.record.id} may begin"
        for name in batch.record.ids():
            task = self._state.tasks.get(name)
            if task is None:
                continue  # no step: 100,000 that have ended are passed in 6 ms
            if task.state is TaskState.QUEUED:
                event = ending(batch.falls, kill_asked=False)
                self.finish(task, event, batch.falls, self._scribe.now)
            else:
                self.ask_end(task, CLUSTER, batch.falls.message)
            yield

    def _tell(self) -> Work:
        """Tell those who wait for others what became of these, until nothing more follows.

        A host that is killed meanwhile sees from the store what they would have been told.
        """
        while self._news:
            name, news = self._news.popleft()
            while (batch := self._state.next_dependent(name)) is not None:
                if news is None:
                    self._state.await_no_more(batch, name)
                    if not batch.awaits:
                        yield from self._state.entering(batch, self._scribe.now)
                else:
                    self._state.await_nothing(batch)
                    batch.falls = news
                    if not batch.folded:  # else it falls once it is made
                        yield from self.bring_down(batch)
                yield
        self._is_telling = False
        return None


def _extend(history: tuple[Change, ...], change: Change) -> tuple[Change, ...]:
    if len(history) < _FIRST_STEPS + _LATEST_STEPS:
        return (*history, change)
    return (*history[:_FIRST_STEPS], *history[1 - _LATEST_STEPS :], change)
