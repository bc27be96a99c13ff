"""Of books from a backup nothing is launched by itself, and no attempt's number is given again."""

from __future__ import annotations

from copy import deepcopy

import pytest

from kohaku_daemon.core.cluster.events import DrainAsked
from kohaku_daemon.core.cluster.records import NodeRecord, PutDocument, TaskRecord
from kohaku_daemon.core.cluster.restoring import ATTEMPTS_APART, doubt_node, doubt_task
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.models.task import FINAL_STATES, Change, Claim, TaskState
from tests.support.builders import (
    OPERATOR,
    a_cluster,
    a_node,
    a_spec,
    a_submission,
    an_inventory,
    registered,
)
from tests.support.playbook import Playbook

NOW = 2000.0
LIVE = [state for state in TaskState if state not in FINAL_STATES]


def a_task(state: TaskState, attempt: int = 1) -> TaskRecord:
    waits = state is TaskState.QUEUED
    return TaskRecord(
        id=TaskId(1001),
        batch=BatchId(1000),
        owner=UserName("alice"),
        state=state,
        node=NodeName("" if waits else "n1"),
        claim=None if waits else Claim(cores=(0,)),
        attempt=attempt,
        history=(Change(1000.0, TaskState.QUEUED, "submitted", "alice"),),
    )


@pytest.mark.parametrize("attempt", [0, 3])
def test_what_waited_gets_a_number_nobody_gave_before(attempt: int) -> None:
    doubted = doubt_task(a_task(TaskState.QUEUED, attempt), "the backup of noon", NOW)
    assert doubted.state is TaskState.QUEUED
    assert doubted.attempt == attempt
    assert doubted.doubted == attempt + ATTEMPTS_APART


def test_what_was_ordered_counts_as_accepted_so_that_it_is_not_ordered_again() -> None:
    doubted = doubt_task(a_task(TaskState.ASSIGNED), "the backup of noon", NOW)
    assert doubted.state is TaskState.PREPARING
    assert doubted.history[-1].state is TaskState.PREPARING
    assert doubted.history[-1].attempt == doubted.attempt == 1


@pytest.mark.parametrize("state", LIVE)
def test_history_says_so_and_claims_stay(state: TaskState) -> None:
    task = a_task(state)
    doubted = doubt_task(task, "the backup of noon", NOW)
    *before, last = doubted.history
    assert tuple(before) == task.history
    assert "restored from the backup of noon" in last.cause
    assert (last.at, last.actor) == (NOW, "kohakud restore")
    assert (doubted.claim, doubted.node, doubted.id) == (task.claim, task.node, task.id)
    assert task.history == a_task(state).history, "the original is as it was"


def test_a_node_gets_nothing_new() -> None:
    node = NodeRecord(name=NodeName("n1"), credential="c", labels={"a": "b"})
    doubted = doubt_node(node)
    assert doubted.draining
    assert (doubted.labels, doubted.credential) == (node.labels, node.credential)


# With the engine ------------------------------------------------------------------------------


class Story(Playbook):
    """A cluster that goes on after its backup was made, and then comes back from it."""

    def back_up(self) -> None:
        self.saved = deepcopy(self.kept)

    def restore(self) -> None:
        self.kept = self.saved
        for id_, task in self.kept.tasks.items():
            if not task.state.is_final:
                self.kept.tasks[id_] = doubt_task(task, "the backup of noon", self.now)
        for record in list(self.kept.documents.values()):
            if isinstance(record, NodeRecord):
                self.kept.commit([PutDocument(doubt_node(record))])
        self.restart()

    def back(self, node: str, *reports: AttemptReport) -> list[str]:
        return self.tell(registered(node, an_inventory(), attempts=reports))

    def undrain(self, node: str) -> list[str]:
        self.tell(DrainAsked(OPERATOR, node, draining=False))
        return self.place()


@pytest.fixture
def story() -> Story:
    return Story(a_cluster([a_node("n1"), a_node("n2")]))


def test_what_was_launched_since_is_neither_ended_nor_launched_again_by_itself(
    story: Story,
) -> None:
    story.tell(a_submission(a_spec(cores=1)))
    story.back_up()
    (line,) = story.place()
    assert line.startswith("n1: start #1/1")
    story.restore()
    lines = story.back("n1", story.report(story.id(1), AttemptState.RUNNING))
    assert story.orders == []
    assert any("task.overtaken" in line for line in lines), lines
    story.back("n2")
    assert story.place() == []
    assert story.task(1).state is TaskState.QUEUED


def test_an_attempt_after_a_restore_has_a_number_of_its_own(story: Story) -> None:
    story.tell(a_submission(a_spec(cores=1)))
    story.back_up()
    story.place()
    story.restore()
    story.back("n1")
    story.back("n2")
    (line,) = story.undrain("n2")
    assert line.startswith(f"n2: start #1/{ATTEMPTS_APART + 1}")


def test_an_order_that_was_on_its_way_is_not_given_again(story: Story) -> None:
    story.tell(a_submission(a_spec(cores=1)))
    story.place()
    story.back_up()
    story.restore()
    story.back("n1")
    assert story.orders == []
    assert story.task(1).state is TaskState.LOST


def test_what_runs_since_before_the_backup_goes_on_and_ends(story: Story) -> None:
    story.run(a_submission(a_spec(cores=1)))
    story.back_up()
    story.restore()
    story.back("n1", story.report(story.id(1), AttemptState.RUNNING))
    assert story.orders == []
    assert story.task(1).state is TaskState.RUNNING
    story.hear(1, AttemptState.ENDED)
    assert story.task(1).state.is_final
