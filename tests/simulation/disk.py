"""The host's two stores: what is left of it after a crash, and what may never happen to it.

Documents and tasks are written one after the other, so a crash can fall between. What is read
back has been encoded and decoded. Each write of a task is compared with what was there.

Knows: what is committed, and that history only grows by legal moves.
Does not know: when anything is committed (``host``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.fleet import Fleet
from kohaku_daemon.core.cluster.long_work import PIECE
from kohaku_daemon.core.cluster.records import (
    BatchRecord,
    Document,
    DocumentChange,
    DropDocument,
    EventRecord,
    JoinTokenRecord,
    NodeRecord,
    PutDocument,
    TaskRecord,
)
from kohaku_daemon.core.cluster.recovery import restore_engine
from kohaku_daemon.core.cluster.state import ClusterState
from protocol.ids import BatchId, TaskId, UserName
from protocol.models.task import TaskState
from protocol.snowflake import SnowflakeSource
from tests.simulation.stage import promise
from tests.simulation.truth import Truth
from tests.support.playbook import document_key

#: Seconds until tasks of a silent node are lost: short, so that it happens.
LOST_AFTER_S: Final = 10.0
HEARTBEAT_S: Final = 2.0

_ENDS: Final = "completed failed killed oom_killed"
#: Which state may follow which: written down once more, not taken from the core.
_MOVES: Final[Mapping[str, frozenset[str]]] = {
    state: frozenset(after.split())
    for state, after in {
        "": "queued",
        "queued": "assigned killed failed",
        "assigned": f"preparing running paused lost queued {_ENDS}",
        "preparing": f"running paused lost queued {_ENDS}",
        "running": f"paused lost queued {_ENDS}",
        "paused": f"running lost queued {_ENDS}",
        "lost": f"preparing running paused queued {_ENDS}",
    }.items()
}

_encode: Final = msgspec.msgpack.Encoder().encode
_decode_task: Final = msgspec.msgpack.Decoder(TaskRecord).decode


class Disk:
    """What is committed."""

    def __init__(self, truth: Truth) -> None:
        self.batches: dict[BatchId, BatchRecord] = {}
        self.by_request: dict[tuple[UserName, str], BatchRecord] = {}
        self.tasks: dict[TaskId, TaskRecord] = {}
        #: Tasks in the order in which they were first placed, and how many were when accepted.
        self.placed: dict[TaskId, int] = {}
        self.accepted: dict[TaskId, int] = {}
        self.documents: dict[tuple[type[Document], str], Document] = {}
        #: Nothing can be written at present.
        self.is_full = False
        self._last_event = 0
        self.truth = truth
        #: Tasks that the host works on in one go.
        self.piece = PIECE

    def write_documents(self, changes: Iterable[DocumentChange]) -> None:
        """Keep what is small."""
        for change in changes:
            match change:
                case PutDocument(record):
                    data = _encode(record)
                    again = msgspec.msgpack.decode(data, type=type(record))
                    self.documents[document_key(record)] = again
                case DropDocument(kind, key):
                    self.documents.pop((kind, key), None)

    def write_tasks(
        self, batches: Iterable[BatchRecord], tasks: Iterable[bytes], events: Iterable[EventRecord]
    ) -> None:
        """Keep what grows, all at once. Tasks come as they were when the group was closed."""
        gangs: dict[BatchId, None] = {}
        for batch in batches:
            again = msgspec.msgpack.decode(_encode(batch), type=BatchRecord)
            self.batches[batch.id] = again
            self.by_request[batch.owner, batch.request_id] = again
        for data in tasks:
            task = _decode_task(data)
            before = self.tasks.get(task.id)
            _check_step(before, task)
            if task.attempt == 1 and (before is None or before.attempt == 0):
                self.placed[task.id] = len(self.placed)
            self.accepted.setdefault(task.id, len(self.placed))
            self.tasks[task.id] = task
            if self.batches[task.batch].gang:
                gangs[task.batch] = None
        for gang in gangs:
            self._check_gang(self.batches[gang])
        for event in events:
            promise(event.id > self._last_event, "the diary", "line {} comes again", event.id)
            self._last_event = event.id

    def tasks_of(self, batch: BatchRecord) -> list[TaskRecord]:
        """Give the tasks of a batch, as far as they are made."""
        return [self.tasks[one] for one in batch.ids() if one in self.tasks]

    def ended_records(self, tasks: Iterable[TaskId]) -> tuple[TaskRecord, ...]:
        """Give those that have ended."""
        return tuple(self.tasks[task] for task in tasks if self.tasks[task].state.is_final)

    def standing(self, name: int) -> TaskState | None:
        """Give how a task stands, or a batch: not complete if one of its tasks is not."""
        task = self.tasks.get(TaskId(name))
        if task is not None:
            return task.state
        batch = self.batches.get(BatchId(name))
        if batch is None:
            return None
        states = [one.state for one in self.tasks_of(batch)]
        unwell = [one for one in states if one.is_final and one is not TaskState.COMPLETED]
        if unwell:
            return unwell[0]
        is_whole = len(states) == batch.count and set(states) == {TaskState.COMPLETED}
        return TaskState.COMPLETED if is_whole else TaskState.QUEUED

    def _check_gang(self, batch: BatchRecord) -> None:
        begun = [task for task in self.tasks_of(batch) if task.attempt]
        promise(
            len(begun) in {0, batch.count},
            "a gang begins together",
            "{} of {} of batch {} have a place",
            len(begun),
            batch.count,
            batch.id,
        )

    def ended(self) -> dict[TaskId, TaskState]:
        """Give the tasks that have ended."""
        return {task.id: task.state for task in self.tasks.values() if task.state.is_final}

    def boot(self, engine: type[ClusterEngine], now: float) -> ClusterEngine:
        """Make the engine that a host starts with."""
        documents = self.documents.values()
        tokens = {one.digest: one for one in documents if isinstance(one, JoinTokenRecord)}
        state = ClusterState("simulated", fleet=Fleet(join_tokens=tokens))
        state.fleet.load((one for one in documents if isinstance(one, NodeRecord)), now)
        booted = engine(
            state,
            SnowflakeSource(0, max([0, *self.batches, *self.tasks])),
            last_event=self._last_event,
            heartbeat_s=HEARTBEAT_S,
            lost_after_s=LOST_AFTER_S,
            piece=self.piece,
        )
        live = [
            _decode_task(_encode(task))
            for _, task in sorted(self.tasks.items())
            if not task.state.is_final
        ]
        batches = [self.batches[number] for number in sorted({task.batch for task in live})]
        restore_engine(booted, batches, live, self.standing, now)
        return booted


def _check_step(before: TaskRecord | None, after: TaskRecord) -> None:
    """Compare a task with what was stored of it."""
    known = before.history if before is not None else ()
    promise(
        after.history[: len(known)] == known,
        "history only grows",
        "{} had {} and has {}",
        after.id,
        known,
        after.history,
    )
    if before is not None and before.state.is_final:
        promise(after == before, "an end is final", "{} was {} and is {}", after.id, before, after)
    state, attempt = (known[-1].state, known[-1].attempt) if known else ("", 0)
    for change in after.history[len(known) :]:
        promise(
            change.state == state or change.state in _MOVES.get(state, ()),
            "moves are legal",
            "{} went from {} to {}",
            after.id,
            state,
            change.state,
        )
        promise(change.attempt >= attempt, "attempts count up", "{}: {}", after.id, after.history)
        state, attempt = change.state, change.attempt
    promise(after.state == state, "history tells the state", "{}: {}", after.id, after)
