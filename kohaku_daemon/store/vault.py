"""The KohakuVault: a runner's local state, a SQLite file of keys and values.

Knows: how to keep bytes under text keys through any crash, and that only one runner does.
Does not know: what the bytes mean.

One thread at a time reads; writes come from any thread, one after the other.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Final

from kohaku_daemon.store import migrations
from kohaku_daemon.store.database import Writer, open_reader, open_writer, translated
from protocol.errors import Conflict, Unavailable

#: Keys that are set by one statement, which is a transaction of its own: each statement lets go
#: of the interpreter's lock and has to wait until a busy event loop gives it back.
_AT_ONCE: Final = 32


class Vault:
    """The open file."""

    def __init__(self, path: Path, lock: int, writer: Writer, reader: sqlite3.Connection) -> None:
        self._path = path
        self._lock = lock
        self._writer = writer
        self._reader = reader
        self._writing = threading.Lock()

    def __repr__(self) -> str:
        return f"Vault({str(self._path)!r})"

    @classmethod
    def open(cls, path: Path) -> Vault:
        """Open the file for this process alone; make it if it is missing.

        The lock is on ``PATH.lock`` beside it, which stays: SQLite's own locks come and go
        with transactions. The kernel lets go of it when the process ends, however it ends.

        Raises:
            Conflict: Another runner has it open.
            Unsupported: A newer version of the program wrote the file.
            Unavailable: The file cannot be opened, or is no database.
        """
        lock = _lock(path)
        try:
            writer = open_writer(path, migrations.VAULT)
            try:
                reader = open_reader(path)
            except BaseException:
                writer.close()
                raise
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock, writer, reader)

    def close(self) -> None:
        """Close the file once a write that is under way is done, and let go of the lock."""
        with self._writing:
            try:
                self._reader.close()
                with translated(self._path):
                    self._writer.close()
            finally:
                os.close(self._lock)

    def get(self, key: str) -> bytes | None:
        """Give the value of one key.

        Raises:
            Unavailable: The disk failed or the file is damaged.
        """
        with translated(self._path):
            row = self._reader.execute("SELECT value FROM kv WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def items(self, prefix: str = "") -> Iterator[tuple[str, bytes]]:
        """Give keys that begin with ``prefix`` and their values, in the order of keys.

        Raises:
            Unavailable: The disk failed or the file is damaged.
        """
        with translated(self._path):
            # From the prefix on, until a key no longer begins with it: keys sort as UTF-8.
            for key, value in self._reader.execute(
                "SELECT key, value FROM kv WHERE key >= ? ORDER BY key", (prefix,)
            ):
                if not key.startswith(prefix):
                    return
                yield key, value

    def write(self, puts: Mapping[str, bytes], drops: Iterable[str] = ()) -> None:
        """Set and forget keys in one transaction; on return it is on the disk.

        A key in both is set. To forget one that is not there changes nothing.

        Raises:
            Unavailable: The disk is full or failed. Nothing of it was kept.
        """
        gone = [(key,) for key in drops]
        with self._writing:
            if not gone and 0 < len(puts) <= _AT_ONCE:
                with self._writer.statement():
                    self._writer.execute(_render_put(len(puts)), [*chain(*puts.items())])
                return
            with self._writer.transaction():
                self._writer.executemany("DELETE FROM kv WHERE key = ?", gone)
                self._writer.executemany(_render_put(1), puts.items())


@cache
def _render_put(count: int) -> str:
    """Give the statement that sets so many keys."""
    rows = ", ".join(["(?, ?)"] * count)
    update = "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
    return f"INSERT INTO kv VALUES {rows} {update}"


def _lock(path: Path) -> int:
    """Take the lock and write our process id into it; give its file descriptor."""
    beside = path.with_name(f"{path.name}.lock")
    try:
        lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(
            f"cannot open {beside}: {error.strerror}",
            hint="let this program write its data folder",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 20, 0).decode(errors="replace")
        os.close(lock)
        raise Conflict(
            f"the vault {path} is in use by process {holder or 'unknown'}",
            hint="stop that runner first, or give this one a data folder of its own",
            details={"pid": int(holder)} if holder.isdecimal() else {},
        ) from error
    except OSError as error:
        os.close(lock)
        raise Unavailable(f"cannot lock {beside}: {error.strerror}") from error
    return lock
