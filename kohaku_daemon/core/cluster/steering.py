"""Ending tasks, holding them still and letting them go on, as somebody asks.

Knows: what of it is refused and why; that of a batch those go first that wait.
Does not know: how a task ends (``moves``), what a runner makes of an order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import assert_never

from kohaku_daemon.core.access.permissions import may_steer
from kohaku_daemon.core.cluster.actions import SendOrder
from kohaku_daemon.core.cluster.events import SteerAsked, Verb
from kohaku_daemon.core.cluster.long_work import LongWork, Work
from kohaku_daemon.core.cluster.moves import Moves
from kohaku_daemon.core.cluster.records import BatchRecord, TaskRecord
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.core.task.lifecycle import TaskEvent
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import OrderPause, OrderResume
from protocol.messages.task import SteerResult
from protocol.models.task import Cause, Exit, TaskState

#: Tasks that an answer names, with why they were left as they are.
_MOST_NAMED = 100


class Steering:
    """Carries out what is asked of tasks that exist."""

    def __init__(self, state: ClusterState, scribe: Scribe, moves: Moves, works: LongWork) -> None:
        self._state = state
        self._scribe = scribe
        self._moves = moves
        self._works = works

    def steer(self, event: SteerAsked) -> None:
        """Take a request for tasks or for a batch. If it is cut short, what was done stays
        done, and the same once more does the rest.
        """
        if event.batch is None:
            named = list(dict.fromkeys(event.tasks))
            if len(named) > self._works.piece:
                named.sort(key=self._has_begun)  # as of a batch
            self._works.answer(self._steer_all(event, named))
            return
        batch = self._state.batches.get(event.batch)
        live = self._live_backwards(batch.record) if batch is not None else iter(())
        work = self._steer_all(event, live)
        if batch is not None and batch.folded:
            self._works.answer_after(event.batch, work)
        else:
            self._works.answer(work)

    def _has_begun(self, task_id: TaskId) -> bool:
        task = self._state.tasks.get(task_id)
        return task is not None and task.state is not TaskState.QUEUED

    def _live_backwards(self, batch: BatchRecord) -> Iterator[TaskId]:
        """Give the tasks of a batch that have not ended.

        From its end, for those there wait: were those killed first that run, the next would be
        placed before they are killed in turn.
        """
        for first, count in reversed(batch.runs):
            for number in range(first + count - 1, first - 1, -1):
                if number in self._state.tasks:
                    yield TaskId(number)

    def _steer_all(self, event: SteerAsked, tasks: Iterable[TaskId]) -> Work:
        asked = 0
        refused: list[tuple[TaskId, str]] = []
        before: BatchId | None = None
        is_gang = False
        for task_id in tasks:
            task = self._state.tasks.get(task_id)
            if task is not None and task.batch != before:
                # Of a gang that was named in part the rest ends at once, and not with all others.
                self._moves.end_broken()
                before, is_gang = task.batch, self._state.batch_of(task).record.gang
            why = self._steer_one(event, task_id)
            asked += not why
            if why and len(refused) < _MOST_NAMED:
                refused.append((task_id, why))
            if not is_gang or event.batch is None:
                yield
        return SteerResult(asked, tuple(refused))

    def _steer_one(self, event: SteerAsked, task_id: TaskId) -> str:
        task = self._state.tasks.get(task_id)
        if task is None:
            ended = event.ended.get(task_id)
            if ended is not None:
                return f"it is {ended} already"
            if BatchId(task_id) in self._state.batches:
                return f"it is a batch, see: kohaku batch show {task_id}"
            return "there is no such task"
        if not may_steer(event.actor, task.owner):
            return "it belongs to somebody else"
        match event.verb:
            case Verb.KILL:
                return self._kill(task, event.actor.user)
            case Verb.PAUSE:
                return self._hold(
                    task, TaskState.RUNNING, OrderPause(task=task.id, attempt=task.attempt)
                )
            case Verb.RESUME:
                return self._hold(
                    task, TaskState.PAUSED, OrderResume(task=task.id, attempt=task.attempt)
                )
            case _:
                assert_never(event.verb)

    def _kill(self, task: TaskRecord, actor: str) -> str:
        if task.state is not TaskState.QUEUED:
            self._moves.ask_end(task, actor)
        elif task.folded:
            # It stands for those that are not made yet, and ends when they are.
            if not task.kill_asked_by:
                task.kill_asked_by = actor
                self._moves.note(task, "end asked for", actor)
        else:
            task.kill_asked_by = actor
            exit_ = Exit(Cause.KILLED, message="it was still waiting")
            self._moves.finish(task, TaskEvent.KILLED, exit_, self._scribe.now)
        return ""

    def _hold(self, task: TaskRecord, wanted: TaskState, order: OrderPause | OrderResume) -> str:
        if task.state is not wanted:
            return f"it is {task.state}, not {wanted}"
        node = self._state.fleet.nodes.get(task.node)
        if node is None or not node.is_online:
            return f"its node {task.node} is away; try again when it is back"
        self._scribe.add(SendOrder(task.node, order))
        return ""
