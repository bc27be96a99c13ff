"""A batch becomes tasks, a piece at a time if it is large.

What makes a submission whole or nothing is that its batch is stored: from then on all its tasks
come to be, whatever happens. The last of them is stored with the batch and says how many before
it are missing (``TaskRecord.folded``), so that a host that was killed goes on where it was. It
is answered when all of them are there.

Knows: how a task begins, by the record of its batch alone.
Does not know: who may ask for what.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import islice, repeat

from kohaku_daemon.core.cluster.actions import SaveBatch, SaveTask
from kohaku_daemon.core.cluster.long_work import LongWork, Work
from kohaku_daemon.core.cluster.moves import Moves
from kohaku_daemon.core.cluster.records import BatchRecord, TaskRecord
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState, LiveBatch
from kohaku_daemon.core.task.lifecycle import TaskEvent
from protocol.ids import TaskId
from protocol.messages.task import Submitted
from protocol.models.task import Cause, Change, Exit, TaskState

#: Of a task to be made: its id, its place in the batch, the task it stands for.
_Seed = tuple[TaskId, int, TaskId | None]


class Making:
    """Makes the tasks of batches."""

    def __init__(self, state: ClusterState, scribe: Scribe, moves: Moves, works: LongWork) -> None:
        self._state = state
        self._scribe = scribe
        self._moves = moves
        self._works = works

    def make(self, batch: LiveBatch) -> Generator[None, None, Submitted]:
        """Hold and save a new batch with its tasks, and let them wait."""
        record = batch.record
        self._state.add_batch(batch)
        self._scribe.add(SaveBatch(record))
        if record.gang or record.count <= self._works.piece:
            for task in _unfold(record, 0, record.count):
                self._add(task, record)
            if batch.may_begin:
                self._state.enqueue_batch(batch, self._scribe.now)
        else:
            (last,) = _unfold(record, record.count - 1, record.count)
            last.folded = batch.folded = record.count - 1
            self._add(last, record)
            yield from self.go_on(batch, last)
        return Submitted(record.id, record.runs)

    def go_on(self, batch: LiveBatch, last: TaskRecord) -> Work:
        """Make the tasks that are missing before the last one, one in each step."""
        record, said_in = batch.record, None
        for task in _unfold(record, record.count - 1 - batch.folded, record.count - 1):
            self._add(task, record)
            last.folded = batch.folded = batch.folded - 1
            if said_in is not self._scribe.out:
                # Once for each commit: it is saved as it is when that begins.
                self._scribe.add(SaveTask(last, record))
                said_in = self._scribe.out
            if batch.may_begin:
                self._state.enqueue(task, self._scribe.now)
            if not batch.folded:
                self._complete(batch, last)
            yield
        return None

    def _complete(self, batch: LiveBatch, last: TaskRecord) -> None:
        """Let the last one wait as the others do, and do what had to wait for it."""
        if last.kill_asked_by:
            exit_ = Exit(Cause.KILLED, message="it was still waiting")
            self._moves.finish(last, TaskEvent.KILLED, exit_, self._scribe.now)
        elif batch.may_begin:
            self._state.enqueue(last, self._scribe.now)
        if batch.falls is not None:
            self._works.put(self.fall(batch))
        self._works.whole(batch.record.id)

    def fall(self, batch: LiveBatch) -> Work:
        """End the tasks of a batch that waits in vain."""
        yield from self._moves.bring_down(batch)
        return None

    def _add(self, task: TaskRecord, batch: BatchRecord) -> None:
        self._state.add_task(task)
        self._scribe.add(SaveTask(task, batch))


def _unfold(batch: BatchRecord, first: int, end: int) -> Iterator[TaskRecord]:
    """Give the tasks of a batch, from one position up to another, as they begin."""
    if batch.source is None:
        cause, by = "submitted", batch.owner
    else:
        cause, by = f"tries tasks of batch {batch.source} again", batch.by
    history = (Change(batch.created_at, TaskState.QUEUED, cause, by),)
    for name, place, stands_for in islice(_seeds(batch), first, end):
        yield TaskRecord(
            id=name,
            batch=batch.id,
            index=place,
            owner=batch.owner,
            created_at=batch.created_at,
            history=history,
            retry_of=stands_for,
        )


def _seeds(batch: BatchRecord) -> Iterator[_Seed]:
    places = batch.places or range(batch.size)
    replaced = batch.replaced() if batch.replaces else repeat(None)
    return zip(batch.ids(), places, replaced, strict=False)
