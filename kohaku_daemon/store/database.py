"""Opening SQLite files the way all of the store does, and its errors in our words.

Knows: pragmas, file modes, transactions, what each kind of SQLite error asks a person to do,
what the kernel makes of pages that a disk did not take, how a file is looked at and copied
without changing it.
Does not know: any table.

One connection writes and another reads, so that the event loop reads while a writer thread
waits for the disk (https://www.sqlite.org/wal.html: readers do not block the writer, nor it them).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from kohaku_daemon.store.migrations import SqlStep, check_known, migrate_database
from protocol.errors import Unavailable

#: FULL keeps every commit through a power cut; NORMAL may lose the last ones then, though
#: never by a crash of the program (https://www.sqlite.org/pragma.html#pragma_synchronous).
Synchronous = Literal["FULL", "NORMAL"]

_BUSY_S: Final = 5.0
#: Bytes of a file's header.
_HEADER: Final = 100
#: The write-ahead log is cut back to this after a checkpoint, so that one burst does not
#: leave a large file behind for ever. Bytes.
_KEPT_LOG: Final = 16 * 2**20

#: What to do about a file that cannot be trusted any more. A vault is in no backup: an old one
#: would not know what was launched since.
DAMAGED_HINT: Final = (
    "it was left as it is; of a host: move its data folder aside and bring a backup back with "
    "kohakud restore; of a runner: move the file aside and let the runner join anew"
)

_HINTS: Final = {
    "SQLITE_FULL": "free some space on its file system; nothing of this change was kept",
    "SQLITE_IOERR": "look at the disk and the kernel log (dmesg); nothing of this change was kept",
    "SQLITE_READONLY": "let this program write the file and its folder",
    "SQLITE_CANTOPEN": "let this program read and write the file and its folder",
    "SQLITE_BUSY": "another process holds it open for writing: find it with fuser",
    "SQLITE_CORRUPT": DAMAGED_HINT,
    "SQLITE_NOTADB": DAMAGED_HINT,
}

#: The same for people who may not read the log: no paths, no words of SQLite.
_REASONS: Final = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_IOERR": "the disk fails",
    "SQLITE_READONLY": "the disk cannot be written",
    "SQLITE_CANTOPEN": "a file cannot be opened",
    "SQLITE_BUSY": "another process holds a file",
    "SQLITE_CORRUPT": "a file is damaged",
    "SQLITE_NOTADB": "a file is damaged",
}


class Writer(sqlite3.Connection):
    """The connection that writes. What it could not write may be written again.

    SQLite writes the same bytes again to the same place, which is not enough: the kernel takes
    pages that it failed to write for written, and ext4 then also forgets that their place on
    the disk holds nothing yet. The second write succeeds, and what was written is there until
    memory runs short; then zeros are read (https://lwn.net/Articles/752063/ tells of the first
    half, tests/system/test_disks.py shows the second). So after a failure the kernel is made
    to forget these pages, and the next write begins from what the disk has.

    Not noticed is a checkpoint that fails between two commits that do not.
    """

    _path: Path
    #: The main file, once it was needed here. Closed last: that would take SQLite's locks away
    #: (https://www.sqlite.org/howtocorrupt.html, 2.2).
    _file: int | None = None

    @contextmanager
    def statement(self) -> Iterator[None]:
        """Let the block execute one statement, a transaction of its own.

        Raises:
            Unavailable: SQLite could not; nothing was kept, and the same may be tried again.
        """
        with translated(self._path):
            try:
                yield
            except sqlite3.OperationalError:
                self._forget_pages()
                raise

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block does, or nothing of it. Raises as ``statement``."""
        with self.statement():
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already
                # (https://www.sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction).
                if self.in_transaction:
                    self.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file, after every other connection of this process to it."""
        super().close()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _forget_pages(self) -> None:
        with suppress(OSError):  # as when files are open to the limit: then it is as it was
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            _forget(self._file)
            # The log holds no locks: they are on the index beside it.
            log = os.open(f"{self._path}-wal", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _forget(log)
            finally:
                os.close(log)


def _forget(fd: int) -> None:
    """Have the kernel forget the pages of a file that it takes for written."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def open_writer(
    path: Path, steps: Sequence[SqlStep], *, synchronous: Synchronous = "FULL"
) -> Writer:
    """Open for writing, make the file if it is missing (mode 0600), bring its schema up to date.

    A file that is refused is left as it is, byte by byte.

    Raises:
        Unsupported: A newer version of the program wrote the file.
        Unavailable: The file cannot be opened, is no database, or is damaged.
    """
    _make(path)
    examine(path, steps)
    with translated(path):
        connection = _connect(path, kind=Writer)
        assert isinstance(connection, Writer)
        connection._path = path
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


def examine(path: Path, steps: Sequence[SqlStep]) -> int:
    """Look whether a file is whole and of a version we know; give its version, 0 for an empty one.

    Only read: a connection that may write would already carry the write-ahead log over into
    the file when it is closed. ``quick_check`` walks every page: 45 ms for 100,000 tasks.

    Raises:
        Unsupported: A newer version of the program wrote the file.
        Unavailable: The file cannot be opened, is no database, or is damaged.
    """
    # A start that was killed while it made the file left a journal, which only a writer may undo.
    begun = path.with_name(f"{path.name}-journal").exists()
    with translated(path), closing(_connect(path, "rw" if begun else "ro")) as connection:
        found: int = connection.execute("PRAGMA user_version").fetchone()[0]
        check_known(found, steps, path)
        complaint = _find_damage(connection, path)
    if complaint:
        raise Unavailable(
            f"the store {path} is damaged: {' '.join(complaint.split())}",
            hint=DAMAGED_HINT,
            details={"store": str(path), "sqlite": "SQLITE_CORRUPT"},
        )
    return found


def _find_damage(connection: sqlite3.Connection, path: Path) -> str:
    """Say what is wrong with a file; nothing if it is whole."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        return " ".join(found.split())
    log = path.with_name(f"{path.name}-wal")
    if not log.exists() or log.stat().st_size == 0:
        # SQLite reads a last page that was cut as if zeros followed. With a log a file may be
        # short: the log has what is missing.
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (page,) = connection.execute("PRAGMA page_size").fetchone()
        size = path.stat().st_size
        # A file of one byte passes for an empty one
        # (https://www.sqlite.org/fileformat.html: the header alone has 100).
        if size < pages * page or 0 < size < _HEADER:
            return f"it has {size} bytes and should have {max(pages, 1) * page}"
    return ""


def copy_database(source: Path, target: Path) -> None:
    """Copy a database as it stands at one instant, while others may write it.

    The copy is one file, without a log beside it, and on the disk. It is made in one read
    transaction, which holds nobody up (https://www.sqlite.org/backup.html: with all pages in
    one step nothing is begun anew).

    Raises:
        Unavailable: The source cannot be read, or the target not be written.
    """
    _make(target)
    with (
        translated(source),
        closing(_connect(source, "ro")) as original,
        translated(target),  # of a disk that is full it is told which one
        closing(_connect(target)) as copy,
    ):
        original.backup(copy)
    sync(target)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (``man 2 fsync``)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
            details={"store": str(path), "sqlite": name, "reason": _REASONS.get(name, "")},
        ) from error


def _make(path: Path) -> None:
    """Make the file if it is missing, for our user only: SQLite would let everybody read it.

    Its -wal and -shm files take the same mode.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise Unavailable(
            f"cannot open {path}: {error.strerror}", hint=_HINTS["SQLITE_CANTOPEN"]
        ) from error


def _connect(
    path: Path,
    mode: Literal["rw", "ro"] = "rw",
    *,
    kind: type[sqlite3.Connection] = sqlite3.Connection,
) -> sqlite3.Connection:
    # A URI, and not a path, so that a file that is not there is never made by looking at it.
    # Each connection is used by one thread at a time, but not always by the one that opened it.
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=_BUSY_S,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
        factory=kind,
    )
