"""Which words of a registration show that an old copy speaks."""

import pytest

from kohaku_daemon.core.cluster.copies import refuse_copy
from kohaku_daemon.core.cluster.records import TaskRecord
from protocol.errors import Conflict
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.models.task import Change, TaskState

N1, TASK = NodeName("n1"), TaskId(7)


def says(state: AttemptState, attempt: int = 1) -> tuple[AttemptReport, ...]:
    return (AttemptReport(task=TASK, attempt=attempt, state=state),)


def books(state: TaskState, attempt: int = 1, node: str = "n1") -> dict[TaskId, TaskRecord]:
    history = (Change(1.0, state, attempt=attempt, node=node),)
    return {TASK: TaskRecord(id=TASK, batch=BatchId(6), owner=UserName("ada"), history=history)}


@pytest.mark.parametrize("state", [TaskState.RUNNING, TaskState.PAUSED])
def test_what_ran_here_cannot_be_about_to_start(state: TaskState) -> None:
    with pytest.raises(Conflict, match="attempt 1 of task 7"):
        refuse_copy(N1, says(AttemptState.ACCEPTED), books(state), ())
    with pytest.raises(Conflict):
        refuse_copy(N1, says(AttemptState.ACCEPTED), {}, {TASK})


@pytest.mark.parametrize(
    "known",
    [
        books(TaskState.PREPARING),
        books(TaskState.RUNNING, attempt=2),
        books(TaskState.RUNNING, node="n2"),
        {},
    ],
)
def test_what_may_still_begin_is_no_contradiction(known: dict[TaskId, TaskRecord]) -> None:
    refuse_copy(N1, says(AttemptState.ACCEPTED), known, ())


@pytest.mark.parametrize("state", [AttemptState.RUNNING, AttemptState.PAUSED, AttemptState.ENDED])
def test_who_knows_that_it_ran_is_no_copy(state: AttemptState) -> None:
    refuse_copy(N1, says(state), books(TaskState.RUNNING), {TASK})
