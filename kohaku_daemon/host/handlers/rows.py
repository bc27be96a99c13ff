"""Rows of tasks and nodes as a reader may see them, in pages that fit into a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

import msgspec

from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.core.cluster.records import BatchRecord, TaskRecord
from kohaku_daemon.core.cluster.views import brief_task, redact_task, view_task
from kohaku_daemon.host.parts import Parts
from protocol.errors import NotFound
from protocol.ids import BatchId, TaskId
from protocol.models.task import Task

V = TypeVar("V")

#: Of 256 KiB that a frame may have; the rest is for what wraps the rows.
PAGE_BYTES: Final = 192 * 1024

_encoder: Final = msgspec.msgpack.Encoder()


def fit(rows: Sequence[V], *, limit: int = PAGE_BYTES) -> int:
    """Say how many of the first rows fit into a frame; at least one, if there is one."""
    left = limit
    for count, row in enumerate(rows):
        left -= len(_encoder.encode(row))
        if left < 0:
            return max(count, 1)
    return len(rows)


def batch_records(parts: Parts, ids: Iterable[BatchId]) -> dict[BatchId, BatchRecord]:
    """Give batches from memory, or from the store."""
    found: dict[BatchId, BatchRecord] = {}
    missing = []
    for batch in dict.fromkeys(ids):
        live = parts.state.batches.get(batch)
        if live is not None:
            found[batch] = live.record
        else:
            missing.append(batch)
    if missing:
        found.update(parts.store.batches(missing))
    return found


def brief_rows(parts: Parts, actor: Actor, records: Sequence[TaskRecord]) -> list[Task]:
    """Show stored tasks as rows. One that is deleted just now, with its batch, is left out."""
    batches = batch_records(parts, (record.batch for record in records))
    return [
        redact_task(brief_task(view_task(record, batches[record.batch])), actor)
        for record in records
        if record.batch in batches
    ]


async def stored_task(parts: Parts, task: TaskId) -> TaskRecord:
    """Give a task as it is committed.

    Raises:
        NotFound: There is none.
    """
    await parts.loop.settled()
    record = parts.store.task(task)
    if record is None:
        raise _no_task(parts, task)
    return record


async def known_batch(parts: Parts, batch: BatchId) -> BatchRecord:
    """Give a batch.

    Raises:
        NotFound: There is none.
    """
    live = parts.state.batches.get(batch)
    if live is not None:
        return live.record
    await parts.loop.settled()
    record = parts.store.batch(batch)
    if record is None:
        raise no_batch(parts, batch)
    return record


def no_batch(parts: Parts, batch: BatchId) -> NotFound:
    """Make the error of a batch that does not exist; of a task it says that it is one."""
    hint = "see them with: kohaku batch list"
    if parts.store.task(TaskId(batch)) is not None:
        hint = f"{batch} is a task: kohaku task show {batch}"
    return NotFound(f"there is no batch {batch}", hint=hint)


def _no_task(parts: Parts, task: TaskId) -> NotFound:
    hint = "see them with: kohaku task list"
    if parts.store.batch_summary(BatchId(task)) is not None:
        hint = f"{task} is a batch: kohaku batch show {task}"
    return NotFound(f"there is no task {task}", hint=hint)
