"""Submitting, reading and steering tasks and batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from protocol.ids import BatchId, NamedBatch, NamedTask, TaskId
from protocol.messages.page import PageLimit
from protocol.models.target import Target
from protocol.models.task import Batch, Explanation, Task, TaskSpec, TaskState

#: Tasks one submission may make.
LARGEST_BATCH = 100_000


class SubmitTask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Make one task, or a batch of them.

    At most one of ``targets``, ``array`` and ``rows`` says how many: a task per target,
    ``array`` tasks told apart by ``KOHAKU_TASK_INDEX``, or a task per row of variables.
    """

    #: Chosen by the client, 8 to 64 characters; the same one again gives the same tasks.
    request_id: str
    spec: TaskSpec
    targets: tuple[Target, ...] = ()
    #: 1 to 100000; 0 for no array.
    array: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_BATCH)] = 0
    rows: tuple[dict[str, str], ...] = ()
    #: Tasks and batches, at most 100, all of which must complete before any of these begins.
    #: If one ends otherwise, these fail without having begun.
    after: tuple[NamedTask, ...] = ()
    #: All tasks of the batch, at most 1024, begin together, or none.
    gang: bool = False


class Submitted(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tasks made, or made earlier by the same request."""

    batch: BatchId
    #: Ids in the order of the batch, as runs of consecutive numbers: (first, count).
    runs: tuple[tuple[int, int], ...]
    #: True if this request id had been answered before.
    repeated: bool = False

    def ids(self) -> Iterator[TaskId]:
        """Give every task id in the order of the batch."""
        for first, count in self.runs:
            yield from map(TaskId, range(first, first + count))


class RetryTask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Try again: one task, or every task of a batch that did not complete. Name one of the two.

    A lost task gets a new attempt. An end stays as it is written, so a task that ended is
    made anew: the same spec and place in its batch, under a new id in a new batch.
    """

    #: As of a submission: the same one again gives the same tasks, and takes up what has been
    #: lost meanwhile.
    request_id: str
    task: NamedTask | None = None
    batch: NamedBatch | None = None


class Retried(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is tried again."""

    #: The new tasks, in the order of those they stand for; None if none of these had ended.
    submitted: Submitted | None = None
    #: Lost tasks that wait for a new attempt; at most 1000 are named.
    requeued: tuple[TaskId, ...] = ()


class ListTasks(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A page of tasks, newest first.

    Rows leave out ``spec.env`` and ``spec.mounts`` and cut commands to 256 characters;
    ``task.show`` has all.
    """

    #: Only these states; empty for all.
    states: tuple[TaskState, ...] = ()
    batch: NamedBatch | None = None
    node: str = ""
    owner: str = ""
    #: Only tasks with a smaller id: the last id of the page before.
    before: NamedTask | None = None
    #: 1 to 500.
    limit: PageLimit = 100
    #: Only tasks with a larger id, and the oldest first: 0, then the last id of the page before.
    #: So a batch is read in the order of its tasks.
    after: NamedTask | None = None


class TaskPage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A page of tasks."""

    tasks: tuple[Task, ...]
    #: There are older ones, or newer ones if these were asked for.
    more: bool = False


class OneTask(msgspec.Struct, frozen=True):
    """Names one task."""

    task: NamedTask


class OneBatch(msgspec.Struct, frozen=True):
    """Names one batch."""

    batch: NamedBatch


class TaskResult(msgspec.Struct, frozen=True):
    """One task."""

    task: Task


class ExplainResult(msgspec.Struct, frozen=True):
    """Why a task is where it is."""

    explanation: Explanation


class WaitTasks(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answered when all named tasks are over (final or lost), or the time is up.

    At most 1000 tasks; for more, name their batch.
    """

    tasks: tuple[NamedTask, ...] = ()
    batch: NamedBatch | None = None
    #: Seconds the host may hold the answer, 0 to 60; ask again with the same words.
    hold_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 30.0


class WaitResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far the awaited tasks are."""

    done: bool
    #: Tasks that are not over.
    left: int = 0


class SteerTasks(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Kill, pause or resume tasks: named ones, or all of a batch. At most 1000 names.

    If the host is stopped meanwhile, a part of a large batch may be done; the same again does
    the rest.
    """

    tasks: tuple[NamedTask, ...] = ()
    batch: NamedBatch | None = None


class SteerResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of each: asked, or why not."""

    #: How many tasks will change.
    asked: int
    #: Tasks left as they are, with the reason; at most 100 are named.
    refused: tuple[tuple[TaskId, str], ...] = ()


class ListBatches(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A page of batches, newest first."""

    owner: str = ""
    before: NamedBatch | None = None
    #: 1 to 500.
    limit: PageLimit = 100


class BatchPage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A page of batches."""

    batches: tuple[Batch, ...]
    more: bool = False


class BatchResult(msgspec.Struct, frozen=True):
    """One batch."""

    batch: Batch
