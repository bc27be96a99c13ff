"""tasks.sqlite: batches, tasks, the diary and the audit log, which grow.

Knows: how records become rows, and how to find them again.
Does not know: what a state means beyond being final, who may read what, when to write.

One thread at a time reads; writes come from any thread, one after the other. What was
written is seen by reads that begin after ``write`` returned.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from msgspec.structs import astuple

from kohaku_daemon.core.cluster.records import AuditRecord, BatchRecord, EventRecord, TaskRecord
from kohaku_daemon.store import migrations
from kohaku_daemon.store.database import (
    Synchronous,
    Writer,
    open_reader,
    open_writer,
    translated,
)
from protocol.ids import BatchId, TaskId
from protocol.models.task import FINAL_STATES, Batch, TaskState

_encode: Final = msgspec.msgpack.Encoder().encode
_encode_json: Final = msgspec.json.Encoder().encode
_decode_batch: Final = msgspec.msgpack.Decoder(BatchRecord).decode
_decode_task: Final = msgspec.msgpack.Decoder(TaskRecord).decode
_decode_event: Final = msgspec.msgpack.Decoder(EventRecord).decode

#: Every state that a task may yet leave, ``lost`` among them.
LIVE_STATES: Final = tuple(state for state in TaskState if state not in FINAL_STATES)

#: Ids have 63 bits.
_ABOVE_ALL: Final = 2**63 - 1


class _Span(NamedTuple):
    """The ids of a batch's tasks, from the first to the last."""

    first: int
    last: int


_NO_TASKS: Final = _Span(0, -1)


class BatchRow(NamedTuple):
    """A batch as it is written. In the order of the table's columns."""

    id: int
    owner: str
    request_id: str
    name: str
    size: int
    first_task: int
    last_task: int
    created_at: float
    record: bytes


class TaskRow(msgspec.Struct, frozen=True, gc=False):
    """A task as it is written. In the order of the table's columns."""

    id: int
    batch: int
    owner: str
    node: str
    state: TaskState
    ended_at: float
    record: bytes


def batch_row(batch: BatchRecord) -> BatchRow:
    """Make the row of a batch.

    Its tasks are later found by their range of ids, so nothing else's ids may lie between
    its first and its last: ids of one submission are drawn together.
    """
    first = min((first for first, _ in batch.runs), default=0)
    last = max((first + count - 1 for first, count in batch.runs), default=0)
    return BatchRow(
        batch.id,
        batch.owner,
        batch.request_id,
        batch.spec.name,
        batch.count,
        first,
        last,
        batch.created_at,
        _encode(batch),
    )


def read_task(row: TaskRow) -> TaskRecord:
    """Give the record that a row was made of."""
    return _decode_task(row.record)


def task_row(task: TaskRecord) -> TaskRow:
    """Make the row of a task as it is now; the engine may change the task afterwards."""
    return TaskRow(
        task.id,
        task.batch,
        task.owner,
        task.node,
        task.state,
        task.ended_at if task.state in FINAL_STATES else 0.0,
        _encode(task),
    )


@dataclass(slots=True)
class Group:
    """What is written together or not at all."""

    batches: list[BatchRow] = field(default_factory=list)
    #: New tasks and changed ones. Of a task that is here twice, the last row counts.
    tasks: list[TaskRow] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)
    audits: list[AuditRecord] = field(default_factory=list)


#: Of a batch that is there, only what no column tells may have changed.
_PUT_BATCH: Final = """
    INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET record = excluded.record
"""
# All tasks of a group in one step of SQLite: while a step runs, Python's other threads do.
# ``executemany`` takes a step for each row and waits for the interpreter after each: with a
# busy event loop 128 rows took 200 ms, in one step they take 2.
# Not INSERT OR REPLACE: that deletes the row and touches every index.
_RENEW: Final = """
    ON CONFLICT (id) DO UPDATE SET
        node = excluded.node, state = excluded.state, ended_at = excluded.ended_at,
        record = excluded.record"""
#: Rows for which there is a statement each, by their number; 7 rows take 20 us less so.
_FEW: Final = 16
_PUT_FEW_TASKS: Final = [
    f"INSERT INTO tasks VALUES {', '.join(['(?, ?, ?, ?, ?, ?, ?)'] * count)} {_RENEW}"
    for count in range(_FEW + 1)
]
# More of them come as JSON for the columns and one blob with all records. ``true`` tells ON
# CONFLICT from a join's ON (https://www.sqlite.org/lang_upsert.html#parsing_ambiguity).
_PUT_TASKS: Final = f"""
    INSERT INTO tasks
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
        json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
        substr(:records, json_extract(value, '$[6]'), json_extract(value, '$[7]'))
    FROM json_each(:columns) WHERE true {_RENEW}"""
_PUT_EVENT: Final = "INSERT INTO events VALUES (?, ?)"
_PUT_AUDIT: Final = """
    INSERT INTO audit (at, actor, role, address, method, subject, outcome)
    VALUES (?, ?, ?, ?, ?, ?, ?)"""

# A batch has a lower id than its tasks: this leaves out those of the newest batch.
_OLD_TASKS: Final = """
    SELECT id, batch FROM tasks
    WHERE ended_at > 0 AND ended_at < ? AND id < (SELECT max(id) FROM batches)
    ORDER BY ended_at LIMIT ?"""
_DROP_BATCH: Final = """
    DELETE FROM batches WHERE id = ? AND NOT EXISTS (
        SELECT 1 FROM tasks WHERE tasks.id BETWEEN first_task AND last_task)"""
_OLDEST_EVENTS: Final = """
    SELECT id, record FROM events WHERE id < (SELECT max(id) FROM events) ORDER BY id LIMIT ?"""
# SQLite itself remembers the highest id of this table.
_DROP_AUDITS: Final = """
    DELETE FROM audit WHERE id IN (SELECT id FROM audit ORDER BY id LIMIT ?) AND at < ?"""


class TaskStore:
    """The open file."""

    def __init__(self, path: Path, writer: Writer, reader: sqlite3.Connection) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader
        self._writing = threading.Lock()

    def __repr__(self) -> str:
        return f"TaskStore({str(self._path)!r})"

    @classmethod
    def open(cls, path: Path, *, synchronous: Synchronous = "FULL") -> TaskStore:
        """Open the file, make it if it is missing, bring its schema up to date.

        Raises:
            Unsupported: A newer version of the program wrote the file.
            Unavailable: The file cannot be opened, or is no database.
        """
        writer = open_writer(path, migrations.TASKS, synchronous=synchronous)
        try:
            reader = open_reader(path)
        except BaseException:
            writer.close()
            raise
        return cls(path, writer, reader)

    def close(self) -> None:
        """Close the file once a write that is under way is done."""
        with self._writing:
            self._reader.close()
            with translated(self._path):
                self._writer.close()

    def write(self, group: Group) -> None:
        """Write a group in one transaction; on return it is on the disk.

        Raises:
            Unavailable: The disk is full or failed. Nothing of the group was kept, and the
                same group may be tried again.
        """
        events = [(event.id, _encode(event)) for event in group.events]
        audits = [
            (audit.at, audit.actor, audit.role, audit.address, audit.method, audit.subject,
             audit.outcome)
            for audit in group.audits
        ]  # fmt: skip
        if not (group.batches or events or audits):
            # A transaction of its own, as nearly every group: each statement more is a wait for
            # the event loop's thread to let go of the interpreter.
            with self._writing, self._writer.statement():
                self._put_tasks(group.tasks)
            return
        with self._writing, self._writer.transaction():
            self._writer.executemany(_PUT_BATCH, group.batches)
            self._put_tasks(group.tasks)
            self._writer.executemany(_PUT_EVENT, events)
            self._writer.executemany(_PUT_AUDIT, audits)

    def _put_tasks(self, tasks: Sequence[TaskRow]) -> None:
        if len(tasks) > _FEW:
            self._writer.execute(_PUT_TASKS, _pack(tasks))
        elif tasks:
            values: list[object] = []
            for row in tasks:
                values += astuple(row)
            self._writer.execute(_PUT_FEW_TASKS[len(tasks)], values)

    def prune(
        self, *, tasks_before: float, events_before: float, audits_before: float, limit: int
    ) -> int:
        """Delete what is older than these times (UTC seconds); give how many rows went.

        Of tasks, the diary and the audit log at most ``limit`` rows each, so that no commit
        waits long: ask again until none went. Tasks go by their end, so live ones stay; a
        batch goes with the last of its tasks. The newest of all stay, whatever their age:
        ids that were given are not given again.

        Raises:
            Unavailable: The disk is full or failed. Nothing was deleted.
        """
        with self._writing, self._writer.transaction():
            return (
                self._prune_tasks(tasks_before, limit)
                + self._prune_events(events_before, limit)
                + self._writer.execute(_DROP_AUDITS, (limit, audits_before)).rowcount
            )

    def _prune_tasks(self, before: float, limit: int) -> int:
        found = self._writer.execute(_OLD_TASKS, (before, limit)).fetchall()
        self._writer.executemany("DELETE FROM tasks WHERE id = ?", [(task,) for task, _ in found])
        self._writer.executemany(_DROP_BATCH, {(batch,) for _, batch in found})
        return len(found)

    def _prune_events(self, before: float, limit: int) -> int:
        found = self._writer.execute(_OLDEST_EVENTS, (limit,)).fetchall()
        old = [(event,) for event, record in found if _decode_event(record).at < before]
        self._writer.executemany("DELETE FROM events WHERE id = ?", old)
        return len(old)

    # Everything below reads. Raises: Unavailable, if the disk fails or the file is damaged.

    def live_tasks(self) -> Iterator[TaskRecord]:
        """Give every task that is not final, oldest first. Finish it before another read."""
        rows = self._rows(
            f"SELECT record FROM tasks WHERE state IN ({_marks(LIVE_STATES)}) ORDER BY id",
            LIVE_STATES,
        )
        for (record,) in rows:
            yield _decode_task(record)

    def task(self, task: TaskId) -> TaskRecord | None:
        """Give one task."""
        record = self._value("SELECT record FROM tasks WHERE id = ?", (task,))
        return None if record is None else _decode_task(record)

    def ended(self, tasks: Iterable[TaskId]) -> list[TaskRecord]:
        """Give those of some tasks that have ended, by id."""
        final = tuple(FINAL_STATES)
        rows = self._rows(
            f"SELECT record FROM tasks WHERE state IN ({_marks(final)})"
            " AND id IN (SELECT value FROM json_each(?)) ORDER BY id",
            (*final, json.dumps(list(tasks))),
        )
        return [_decode_task(record) for (record,) in rows]

    def standing(self, name: int) -> TaskState | None:
        """Give a task's state. Of a batch give COMPLETED if all of it completed, else the end
        that is not, else QUEUED for one that is under way. None if there is neither.
        """
        state = self._value("SELECT state FROM tasks WHERE id = ?", (name,))
        if state is not None:
            return TaskState(state)
        span = self._span(BatchId(name))
        if span == _NO_TASKS:
            return None
        counts = self._counts(span)
        bad = [state for state in counts if state.is_final and state is not TaskState.COMPLETED]
        if bad:
            return bad[0]
        return TaskState.COMPLETED if counts.keys() == {TaskState.COMPLETED} else TaskState.QUEUED

    def batch(self, batch: BatchId) -> BatchRecord | None:
        """Give one batch."""
        record = self._value("SELECT record FROM batches WHERE id = ?", (batch,))
        return None if record is None else _decode_batch(record)

    def batches(self, ids: Iterable[BatchId]) -> dict[BatchId, BatchRecord]:
        """Give batches by id; unknown ones are left out."""
        rows = self._rows(
            "SELECT record FROM batches WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(ids)),),
        )
        records = (_decode_batch(record) for (record,) in rows)
        return {record.id: record for record in records}

    def by_request(self, owner: str, request_id: str) -> BatchRecord | None:
        """Give the batch that this request of this client made, if it was made."""
        record = self._value(
            "SELECT record FROM batches WHERE owner = ? AND request_id = ?", (owner, request_id)
        )
        return None if record is None else _decode_batch(record)

    def page(
        self,
        *,
        states: Sequence[TaskState] = (),
        batch: BatchId | None = None,
        node: str = "",
        owner: str = "",
        before: TaskId | None = None,
        after: TaskId | None = None,
        limit: int = 100,
    ) -> list[TaskRecord]:
        """Give at most ``limit`` tasks that pass every filter, newest first.

        ``before`` leaves out that task and all newer ones, ``after`` that task and all older
        ones, and turns the order round; empty filters pass everything.
        """
        conditions: list[str] = []
        values: dict[str, object] = {"limit": limit}
        if batch is not None:
            span = self._span(batch)
            conditions.append("id BETWEEN :first AND :last")
            values |= {"first": span.first, "last": span.last}
        if node:
            # The index holds only tasks that have a node; SQLite uses it where that is spelled out.
            conditions.append("node = :node AND node <> ''")
            values["node"] = node
        if owner:
            conditions.append("owner = :owner")
            values["owner"] = owner
        if before is not None:
            conditions.append("id < :before")
            values["before"] = before
        if after is not None:
            conditions.append("id > :after")
            values["after"] = after
        order = "DESC" if after is None else "ASC"
        if not states and owner:
            states = tuple(TaskState)  # one step down each branch of the index (owner, state, id)
        rows = self._rows(
            f"SELECT record FROM tasks WHERE id IN ({_first(states, conditions, values, order)})"
            f" ORDER BY id {order} LIMIT :limit",
            values,
        )
        return [_decode_task(record) for (record,) in rows]

    def batch_summary(self, batch: BatchId) -> Batch | None:
        """Give one batch with its tasks counted by state, without reading its rows of variables."""
        found = self._summaries(f"{_SUMMARY} WHERE id = :batch", {"batch": batch})
        return found[0] if found else None

    def batch_page(
        self, *, owner: str = "", before: BatchId | None = None, limit: int = 100
    ) -> list[Batch]:
        """Give at most ``limit`` batches with their tasks counted by state, newest first."""
        of_owner = "owner = :owner AND" if owner else ""
        return self._summaries(
            f"{_SUMMARY} WHERE {of_owner} id < :before ORDER BY id DESC LIMIT :limit",
            {"owner": owner, "before": _ABOVE_ALL if before is None else before, "limit": limit},
        )

    def ends_since(self, since: float) -> list[tuple[int, TaskState, int]]:
        """Count tasks that ended at ``since`` (UTC seconds) or later: minute, state, how many."""
        # Left to itself SQLite walks (state, id) for the grouping, which is every task there is.
        rows = self._rows(
            "SELECT CAST(ended_at / 60 AS INTEGER) AS minute, state, count(*)"
            " FROM tasks INDEXED BY tasks_by_end"
            " WHERE ended_at >= ? AND ended_at > 0 GROUP BY minute, state",
            (since,),
        )
        return [(minute, TaskState(state), count) for minute, state, count in rows]

    def events(self, *, before: int | None = None, limit: int = 100) -> list[EventRecord]:
        """Give at most ``limit`` lines of the diary, newest first."""
        rows = self._rows(
            "SELECT record FROM events WHERE id < ? ORDER BY id DESC LIMIT ?",
            (_ABOVE_ALL if before is None else before, limit),
        )
        return [_decode_event(record) for (record,) in rows]

    def last_event_id(self) -> int:
        """Give the id of the newest line of the diary, or 0."""
        return int(self._value("SELECT max(id) FROM events", ()) or 0)

    def highest_id(self) -> int:
        """Give the highest id of any task or batch, or 0: new ids must be above it."""
        return int(
            self._value(
                "SELECT max(ifnull((SELECT max(id) FROM tasks), 0),"
                " ifnull((SELECT max(id) FROM batches), 0))",
                (),
            )
        )

    def _summaries(self, sql: str, values: dict[str, object]) -> list[Batch]:
        return [
            Batch(
                id=batch,
                owner=owner,
                name=name,
                size=size,
                created_at=created_at,
                states={state.value: count for state, count in self._counts(_Span(*span)).items()},
            )
            for batch, owner, name, size, created_at, *span in self._rows(sql, values)
        ]

    def _counts(self, span: _Span) -> dict[TaskState, int]:
        # One walk of (state, id) for each state: 100,000 tasks in 3 ms. Walking the table
        # itself takes ten times as long.
        rows = self._rows(
            f"SELECT state, count(*) FROM tasks WHERE state IN ({_marks(tuple(TaskState))})"
            " AND id BETWEEN ? AND ? GROUP BY state",
            (*TaskState, *span),
        )
        return {TaskState(state): count for state, count in rows}

    def _span(self, batch: BatchId) -> _Span:
        for row in self._rows("SELECT first_task, last_task FROM batches WHERE id = ?", (batch,)):
            return _Span(*row)
        return _NO_TASKS

    def _value(self, sql: str, values: Sequence[object]) -> Any:
        with translated(self._path):
            row = self._reader.execute(sql, values).fetchone()
        return None if row is None else row[0]

    def _rows(
        self, sql: str, values: Sequence[object] | dict[str, object]
    ) -> Iterator[tuple[Any, ...]]:
        with translated(self._path):
            yield from self._reader.execute(sql, values)


def _pack(tasks: Sequence[TaskRow]) -> dict[str, object]:
    """Give rows as the values of ``_PUT_TASKS``; a record is its place from 1, and its size."""
    columns = []
    place = 1
    for row in tasks:
        size = len(row.record)
        columns.append(
            (row.id, row.batch, row.owner, row.node, row.state, row.ended_at, place, size)
        )
        place += size
    return {
        "columns": _encode_json(columns).decode(),
        "records": b"".join([row.record for row in tasks]),
    }


_SUMMARY: Final = "SELECT id, owner, name, size, created_at, first_task, last_task FROM batches"


def _first(
    states: Sequence[TaskState], conditions: Sequence[str], values: dict[str, object], order: str
) -> str:
    """Write the search for the first ids: one arm for each state, as each has its own order.

    With ``state IN (...)`` SQLite would read and sort every task in those states.
    """
    arms = [list(conditions)] if not states else []
    for number, state in enumerate(states):
        values[f"state{number}"] = state.value
        arms.append([f"state = :state{number}", *conditions])
    wheres = (" AND ".join(arm or ["true"]) for arm in arms)
    return " UNION ALL ".join(
        f"SELECT * FROM (SELECT id FROM tasks WHERE {where} ORDER BY id {order} LIMIT :limit)"
        for where in wheres
    )


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))
