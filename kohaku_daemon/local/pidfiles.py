"""Which process a pid file means, without mistaking a stranger for it.

Knows: a daemon holds a POSIX record lock on its pid file for as long as it lives. The
kernel tells who holds the lock, and lets go of it with the process however that ends: a
number left in a file, or used again by another process, proves nothing. Unlike ``flock``,
a record lock is not inherited by the children a daemon forks, so a task that outlives its
runner does not pass for it. Its price: a process that opens and closes the file it holds,
be it only to ask, lets go of it (fcntl(2)); ask about others only.
Does not know: what the daemons do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from protocol.errors import Conflict, Forbidden, KohakuError, TimedOut

#: ``struct flock`` of fcntl(2) with 64-bit offsets: type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("@hhqqi4x")


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Be the one process that ``path`` means, and write this process's number into it.

    Raises:
        Conflict: Another process is. ``what`` names it in the message.
    """
    fd = _lock(path, what)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def holder(path: Path) -> int | None:
    """Give the number of the process that ``path`` means, None if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _locked_by(fd)
    finally:
        os.close(fd)


class Ending:
    """The end of one process: asked for once, then waited for.

    Holds the process by a pidfd, so that a number used again is never signalled.
    """

    def __init__(self, path: Path, pid: int, fd: int) -> None:
        self.pid = pid
        self._path = path
        self._fd = fd

    @classmethod
    def begin(cls, path: Path) -> Ending | None:
        """Send SIGTERM to the process that ``path`` means; None if there is none.

        Raises:
            Forbidden: It belongs to somebody else.
        """
        pid = holder(path)
        if pid is None:
            return None
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        ending = cls(path, pid, fd)
        if holder(path) != pid:
            # It ended between the two looks, and its number may be another's by now.
            ending.close()
            return None
        ending._signal(signal.SIGTERM)
        return ending

    @classmethod
    def begin_of_child(cls, path: Path, pid: int) -> Ending:
        """Send SIGTERM to a child of this process that has not taken its pid file yet."""
        ending = cls(path, pid, os.pidfd_open(pid))
        ending._signal(signal.SIGTERM)
        return ending

    def finish(self, timeout_s: float) -> bool:
        """Wait for the end, by SIGKILL if it does not come within ``timeout_s``.

        Gives True if it ended by itself.

        Raises:
            TimedOut: Even SIGKILL did not end it: it hangs in the kernel.
        """
        try:
            if self._ends_within(timeout_s):
                return True
            self._signal(signal.SIGKILL)
            if not self._ends_within(10.0):
                raise TimedOut(
                    f"process {self.pid} does not end, not even by SIGKILL",
                    hint="it waits in the kernel, perhaps for a disk or a network file system",
                )
            return False
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the process."""
        os.close(self._fd)

    def _ends_within(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            self.close()
            raise Forbidden(
                f"process {self.pid} of {self._path} belongs to another user",
                hint="stop it as that user",
            ) from None


def _lock(path: Path, what: str) -> int:
    while True:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise KohakuError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = _locked_by(fd)
            os.close(fd)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise KohakuError(f"cannot lock {path}: {error.strerror}") from error
            raise Conflict(
                f"{what} already runs as process {pid}", hint=f"to stop it first: kill {pid}"
            ) from None
        if _is_at(path, fd):
            return fd
        # The one before us removed its file between our open and our lock.
        os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def _locked_by(fd: int) -> int | None:
    # The question is asked as if for a write lock on the whole file.
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else pid
