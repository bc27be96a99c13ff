"""Of books from a backup nothing is launched by itself, and no attempt's number is given again."""

from __future__ import annotations

import pytest

from kohaku_daemon.core.cluster.records import NodeRecord, TaskRecord
from kohaku_daemon.core.cluster.restoring import ATTEMPTS_APART, doubt_node, doubt_task
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.models.task import FINAL_STATES, Change, Claim, TaskState

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
    assert doubted.attempt == attempt + ATTEMPTS_APART


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
