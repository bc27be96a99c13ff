"""The life of one task, as a table.

Knows: which event each state accepts and where it leads; which end an exit amounts to.
Does not know: nodes, claims, the clock. A pair missing from the table is an event that
state refuses: our bug, or a peer that must not be believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from protocol.models.task import Cause, Exit, TaskState


class TaskEvent(StrEnum):
    """What can happen to a task."""

    #: Placement chose a node and holds a claim there.
    PLACED = "placed"
    #: The runner has the order in its vault.
    ACCEPTED = "accepted"
    #: The runner says it runs: for the first time, again after a pause, or back from lost.
    STARTED = "started"
    PAUSED = "paused"
    #: Four ends, told apart by ``ending``.
    COMPLETED = "completed"
    FAILED = "failed"
    KILLED = "killed"
    OOM_KILLED = "oom_killed"
    #: Its node was silent for longer than the grace, or no longer knows it.
    MISSED = "missed"
    #: This attempt is over or given up, and another was asked for.
    REQUEUED = "requeued"

    __hash__ = str.__hash__  # as of TaskState, for the same reason


class InvalidTransition(Exception):
    """An event came that the task's state does not allow."""

    def __init__(self, state: TaskState, event: TaskEvent) -> None:
        super().__init__(f"a task that is {state} cannot take {event}")
        self.state = state
        self.event = event


_Q, _A, _P = TaskState.QUEUED, TaskState.ASSIGNED, TaskState.PREPARING
_R, _H, _L = TaskState.RUNNING, TaskState.PAUSED, TaskState.LOST

#: The ends, as every state accepts them in which a runner may hold the task.
_ENDS: Final[Mapping[TaskEvent, TaskState]] = {
    TaskEvent.COMPLETED: TaskState.COMPLETED,
    TaskEvent.FAILED: TaskState.FAILED,
    TaskEvent.KILLED: TaskState.KILLED,
    TaskEvent.OOM_KILLED: TaskState.OOM_KILLED,
}

#: The whole truth about the life of a task. Final states have no row: nothing leaves them.
TABLE: Final[Mapping[TaskState, Mapping[TaskEvent, TaskState]]] = {
    _Q: {
        TaskEvent.PLACED: _A,
        TaskEvent.KILLED: TaskState.KILLED,
        # What it waits for did not complete, or its gang is not whole any more.
        TaskEvent.FAILED: TaskState.FAILED,
    },
    _A: {
        TaskEvent.ACCEPTED: _P,
        # Reports of a runner that was cut off tell the newest state only, so steps may be missing.
        TaskEvent.STARTED: _R,
        TaskEvent.PAUSED: _H,
        TaskEvent.MISSED: _L,
        TaskEvent.REQUEUED: _Q,
        **_ENDS,
    },
    _P: {
        TaskEvent.STARTED: _R,
        TaskEvent.PAUSED: _H,
        TaskEvent.MISSED: _L,
        TaskEvent.REQUEUED: _Q,
        **_ENDS,
    },
    _R: {
        TaskEvent.PAUSED: _H,
        TaskEvent.MISSED: _L,
        TaskEvent.REQUEUED: _Q,
        **_ENDS,
    },
    _H: {
        TaskEvent.STARTED: _R,
        TaskEvent.MISSED: _L,
        TaskEvent.REQUEUED: _Q,
        **_ENDS,
    },
    _L: {
        # The node came back, with the task alive or with the news of its end.
        TaskEvent.ACCEPTED: _P,
        TaskEvent.STARTED: _R,
        TaskEvent.PAUSED: _H,
        TaskEvent.REQUEUED: _Q,
        **_ENDS,
    },
}


_NOWHERE: Final[Mapping[TaskEvent, TaskState]] = {}


def advance(state: TaskState, event: TaskEvent) -> TaskState:
    """Give the state that follows.

    Raises:
        InvalidTransition: The state has no place for this event.
    """
    after = TABLE.get(state, _NOWHERE).get(event)
    if after is None:
        raise InvalidTransition(state, event)
    return after


def ending(exit_: Exit, *, kill_asked: bool) -> TaskEvent:
    """Say which of the four ends an exit is.

    A program that returned 0 by itself has completed, also if somebody asked for its end
    at the same moment: the fact wins over the wish. Running out of memory is told even if
    it was being killed, because its owner needs to know.
    """
    if exit_.cause is Cause.OOM:
        return TaskEvent.OOM_KILLED
    if exit_.cause is Cause.EXITED and exit_.code == 0:
        return TaskEvent.COMPLETED
    if kill_asked or exit_.cause in {Cause.KILLED, Cause.NODE_REMOVED, Cause.GANG}:
        return TaskEvent.KILLED
    return TaskEvent.FAILED
