"""What a retry has to know of tasks that have ended, gathered bit by bit: there may be 100,000.

Knows: which did not complete, in the order of their batch, and which were given another attempt
by the same request before.
Does not know: where the records come from, what is tried again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kohaku_daemon.core.cluster.records import TaskRecord
from protocol.ids import TaskId
from protocol.models.task import Cause, TaskState


@dataclass(slots=True)
class Places:
    """Some of a batch's tasks, in its order."""

    #: Where they are in it.
    places: list[int] = field(default_factory=list)
    #: Their ids, as runs of consecutive numbers.
    runs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, task: TaskRecord) -> None:
        """Take in one more."""
        self.places.append(task.index)
        first, count = self.runs[-1] if self.runs else (0, 0)
        if count and first + count == task.id:
            self.runs[-1] = (first, count + 1)
        else:
            self.runs.append((task.id, 1))

    def __len__(self) -> int:
        return len(self.places)


@dataclass(slots=True)
class EndedTasks:
    """Tasks of one batch that have ended, for the retry of this request id."""

    request_id: str
    every: Places = field(default_factory=Places)
    #: Those that did not complete.
    bad: Places = field(default_factory=Places)
    #: One of these never began, because what it had to wait for did not complete.
    in_vain: TaskId | None = None
    #: Those that were lost when this request came for the first time, and were tried again.
    requeued: list[TaskId] = field(default_factory=list)

    def take(self, records: Iterable[TaskRecord]) -> None:
        """Take in more of them, in the order of their ids."""
        for task in records:
            self.every.add(task)
            if self.request_id in task.retries_asked:
                self.requeued.append(task.id)
            if task.state is TaskState.COMPLETED:
                continue
            self.bad.add(task)
            if task.exit is not None and task.exit.cause is Cause.DEPENDENCY:
                self.in_vain = self.in_vain or task.id
