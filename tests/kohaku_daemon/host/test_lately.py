"""Ends of the last hour: what the host found at its start, what came since, what is too old."""

from __future__ import annotations

from kohaku_daemon.host.lately import LATELY_S, Lately
from protocol.models.task import TaskState

NOW = 1_800_000_000.0


def test_what_was_stored_and_what_came_since_are_counted_together() -> None:
    minute = int(NOW) // 60
    lately = Lately([(minute - 5, TaskState.FAILED, 3), (minute - 5, TaskState.KILLED, 1)])
    lately.add(TaskState.FAILED, NOW - 300)
    lately.add(TaskState.COMPLETED, NOW)
    assert lately.counts(NOW) == {
        TaskState.FAILED: 4,
        TaskState.KILLED: 1,
        TaskState.COMPLETED: 1,
    }


def test_what_is_older_than_an_hour_is_forgotten_to_the_minute() -> None:
    lately = Lately()
    # A runner that was away tells of an end long ago.
    lately.add(TaskState.COMPLETED, NOW - LATELY_S - 61)
    lately.add(TaskState.FAILED, NOW - LATELY_S + 1)
    assert lately.counts(NOW) == {TaskState.FAILED: 1}
    assert lately.counts(NOW + 61) == {}
    assert not lately._minutes
