"""From a file of any earlier version to this one, step by step.

Knows: the schema of every version of every file of the store, and the way from each to the next.
Does not know: what is read and written once a file is up to date.

Step N of a list leads from version N-1 to N; version 0 is an empty file. To change a schema,
add one step at the end of its list and one sample file of the version before it to
``tests/kohaku_daemon/store/samples``. A step is never changed once released.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from protocol.errors import Unsupported

SqlStep = Callable[[sqlite3.Connection], None]
#: TinyDB's own layout: tables by name, in them documents by number.
Tables = dict[str, dict[str, dict[str, Any]]]
DocumentStep = Callable[[Tables], None]
S = TypeVar("S", SqlStep, DocumentStep)


def _tasks_1(connection: sqlite3.Connection) -> None:
    """Tasks, batches, diary and audit log.

    What is searched for has a column; all the rest is in ``record``, as MessagePack of
    ``core.cluster.records``. The audit log has columns only: an admin reads it with sqlite3.

    Measured with 100,000 tasks, written three times in groups of 200 at synchronous=FULL: 4.0 us
    a row without an index, 6.5 with one each for state, owner and node, 8.4 with these, which
    find one owner's tasks in one state at once however many others there are.
    """
    for statement in (
        """CREATE TABLE batches (
            id INTEGER PRIMARY KEY,
            owner TEXT NOT NULL,
            request_id TEXT NOT NULL,
            name TEXT NOT NULL,
            size INTEGER NOT NULL,
            first_task INTEGER NOT NULL,
            last_task INTEGER NOT NULL,
            created_at REAL NOT NULL,
            record BLOB NOT NULL
        )""",
        "CREATE UNIQUE INDEX batches_by_request ON batches (owner, request_id)",
        "CREATE INDEX batches_by_owner ON batches (owner, id)",
        """CREATE TABLE tasks (
            id INTEGER PRIMARY KEY,
            batch INTEGER NOT NULL,
            owner TEXT NOT NULL,
            node TEXT NOT NULL,
            state TEXT NOT NULL,
            ended_at REAL NOT NULL,
            record BLOB NOT NULL
        )""",
        "CREATE INDEX tasks_by_state ON tasks (state, id)",
        "CREATE INDEX tasks_by_owner ON tasks (owner, state, id)",
        "CREATE INDEX tasks_by_node ON tasks (node, id) WHERE node <> ''",
        "CREATE INDEX tasks_by_end ON tasks (ended_at, state) WHERE ended_at > 0",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY,
            record BLOB NOT NULL
        )""",
        """CREATE TABLE audit (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            at REAL NOT NULL,
            actor TEXT NOT NULL,
            role TEXT NOT NULL,
            address TEXT NOT NULL,
            method TEXT NOT NULL,
            subject TEXT NOT NULL,
            outcome TEXT NOT NULL
        )""",
    ):
        connection.execute(statement)


def _vault_1(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE kv (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")


def _cluster_1(tables: Tables) -> None:
    tables.update({"nodes": {}, "tokens": {}, "join_tokens": {}})


def _cluster_2(tables: Tables) -> None:
    tables.update({"environments": {}, "registries": {}})


TASKS: Final[tuple[SqlStep, ...]] = (_tasks_1,)
VAULT: Final[tuple[SqlStep, ...]] = (_vault_1,)
CLUSTER: Final[tuple[DocumentStep, ...]] = (_cluster_1, _cluster_2)


def migrate_database(connection: sqlite3.Connection, steps: Sequence[SqlStep], path: Path) -> None:
    """Bring a database up to date, each step and its number in one transaction.

    ``connection`` is in autocommit mode (``isolation_level=None``). The version is SQLite's
    ``user_version``.

    Raises:
        Unsupported: A newer version of the program wrote the file.
        sqlite3.Error: A step failed; the file is as the step before left it.
    """
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    for version, step in _missing(found, steps, path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            step(connection)
            connection.execute(f"PRAGMA user_version = {version}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def migrate_tables(tables: Tables, found: int, steps: Sequence[DocumentStep], path: Path) -> int:
    """Bring documents up to date in place and give the version they have then.

    Raises:
        Unsupported: A newer version of the program wrote the file.
    """
    for _, step in _missing(found, steps, path):
        step(tables)
    return len(steps)


def check_known(found: int, steps: Sequence[SqlStep] | Sequence[DocumentStep], path: Path) -> None:
    """Refuse a file of a version that has no step here.

    Raises:
        Unsupported: A newer version of the program wrote the file.
    """
    if not 0 <= found <= len(steps):
        raise Unsupported(
            f"{path} has schema version {found}; this program knows versions up to {len(steps)}",
            hint="start the version of KohakuRiver that wrote it, or a newer one; "
            "nothing in it was changed",
            details={"found": found, "known": len(steps)},
        )


def _missing(found: int, steps: Sequence[S], path: Path) -> list[tuple[int, S]]:
    check_known(found, steps, path)
    return list(enumerate(steps, start=1))[found:]
