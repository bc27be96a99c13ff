"""Opening SQLite files the way all of the store does, and its errors in our words.

Knows: pragmas, file modes, transactions, what each kind of SQLite error asks a person to do.
Does not know: any table.

One connection writes and another reads, so that the event loop reads while a writer thread
waits for the disk (https://www.sqlite.org/wal.html: readers do not block the writer, nor it them).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from kohaku_daemon.store.migrations import SqlStep, migrate_database
from protocol.errors import Unavailable

#: FULL keeps every commit through a power cut; NORMAL may lose the last ones then, though
#: never by a crash of the program (https://www.sqlite.org/pragma.html#pragma_synchronous).
Synchronous = Literal["FULL", "NORMAL"]

_BUSY_S: Final = 5.0
#: The write-ahead log is cut back to this after a checkpoint, so that one burst does not
#: leave a large file behind for ever. Bytes.
_KEPT_LOG: Final = 16 * 2**20

_HINTS: Final = {
    "SQLITE_FULL": "free some space on its file system; nothing of this change was kept",
    "SQLITE_IOERR": "look at the disk and the kernel log (dmesg); nothing of this change was kept",
    "SQLITE_READONLY": "let this program write the file and its folder",
    "SQLITE_CANTOPEN": "let this program read and write the file and its folder",
    "SQLITE_BUSY": "another process holds it open for writing: find it with fuser",
    "SQLITE_CORRUPT": "stop the daemon and restore the file from a backup",
    "SQLITE_NOTADB": "stop the daemon and restore the file from a backup",
}


def open_writer(
    path: Path, steps: Sequence[SqlStep], *, synchronous: Synchronous = "FULL"
) -> sqlite3.Connection:
    """Open for writing, make the file if it is missing (mode 0600), bring its schema up to date.

    Raises:
        Unsupported: A newer version of the program wrote the file.
        Unavailable: The file cannot be opened, or is no database.
    """
    try:
        # SQLite would make it readable for all; its -wal and -shm files take the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise Unavailable(
            f"cannot open {path}: {error.strerror}", hint=_HINTS["SQLITE_CANTOPEN"]
        ) from error
    with translated(path):
        connection = _connect(path)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {synchronous}")
            connection.execute(f"PRAGMA journal_size_limit = {_KEPT_LOG}")
            migrate_database(connection, steps, path)
        except BaseException:
            connection.close()
            raise
    return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """Open a second connection that can only read.

    Raises:
        Unavailable: The file cannot be opened.
    """
    with translated(path):
        connection = _connect(path)
        connection.execute("PRAGMA query_only = ON")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Commit what the block does, or nothing of it.

    Raises:
        Unavailable: SQLite could not; the connection is usable again.
    """
    with translated(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            # A full disk may have ended the transaction already
            # (https://www.sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction).
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn what SQLite says of the file into Unavailable. Broken constraints are bugs and pass."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.NotSupportedError):
        raise
    except sqlite3.DatabaseError as error:
        # Extended codes have a suffix: SQLITE_IOERR_WRITE.
        name = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        raise Unavailable(
            f"the store {path} failed: {error}",
            hint=_HINTS.get(name, ""),
            details={"store": str(path), "sqlite": name},
        ) from error


def _connect(path: Path) -> sqlite3.Connection:
    # Each connection is used by one thread at a time, but not always by the one that opened it.
    return sqlite3.connect(
        path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=256
    )
