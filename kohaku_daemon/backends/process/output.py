"""What a program writes, on its way through pipes into files.

Knows: how to pass it on, whole and in order, and what to do when the disk is full.
Does not know: when the program ends. Standard library only.

A program is not given the files themselves. Scripts say ``> /dev/stderr`` and
``tee /dev/stderr`` a lot, which open again, with O_TRUNC, what is behind the descriptor: of a
file that cuts off all that was written before, of a pipe nothing. So the files only grow,
whatever a task does, as those expect who read them by offsets.

What comes is moved by ``splice``: the kernel takes it out of the pipe only as it writes it to
the file, so that a keeper that is killed meanwhile has neither lost nor doubled any. A file is
opened, and made if need be, when its first byte comes: most outputs stay silent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
from typing import Final

#: Bytes passed on at once: what a pipe holds by default (``man 7 pipe``).
_AT_ONCE: Final = 64 * 1024
#: Bytes that a pipe may hold at most, by default, if its program enlarges it.
_PIPE_MOST: Final = 1 << 20
#: Without O_APPEND, which ``splice`` refuses: nobody else writes to it.
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def open_pipe(uid: int) -> tuple[int, int]:
    """Make the pipe of one output: our end and the program's.

    Neither is passed on by ``exec``.

    Args:
        uid: User of the program, which may then open its end again; -1 for our own.

    Raises:
        OSError: There are no more descriptors.
    """
    source, sink = os.pipe()
    os.set_blocking(source, False)
    if uid >= 0:
        os.fchown(sink, uid, -1)
    return source, sink


class Output:
    """One output: our end of a pipe, and the file that what comes is appended to."""

    def __init__(self, path: str, source: int) -> None:
        """Begin to pass on.

        Args:
            path: Of the file, which is made if it is missing, and its folder.
            source: Our end of the pipe. It is closed by ``close``.
        """
        self.path = path
        self.source = source
        self._file = -1
        #: Whether all has come that ever will.
        self._is_over = False
        #: Bytes that the disk did not take since it last took any.
        self._lost = 0
        #: The same since the beginning, and why.
        self.lost = 0
        self.why_lost = ""

    def pass_on(self, events: int = select.POLLIN) -> bool:
        """Append what has come, at most 64 KiB; say whether anything had, or more may come.

        Args:
            events: What ``epoll`` has just said of our end of the pipe.
        """
        try:
            self._is_over = not (events & select.POLLIN and self._move() > 0)
        except BlockingIOError:
            return True
        return not self._is_over

    def finish(self) -> None:
        """Append what is left: nobody is there any more who could write."""
        if not self._is_over:
            with contextlib.suppress(BlockingIOError):
                for _ in range(_PIPE_MOST // _AT_ONCE):
                    if not self._move():
                        break
        if self._lost:
            self._append(b"")

    def close(self) -> None:
        """Close the pipe and the file."""
        os.close(self.source)
        if self._file >= 0:
            os.close(self._file)

    def _move(self) -> int:
        """Append at most 64 KiB of what has come; give how much it was, 0 if no more can come.

        Raises:
            BlockingIOError: Nothing has come.
        """
        if self._file < 0 and not self._has_come():
            return 0
        if not self._lost:
            try:
                if self._file < 0:
                    self._file = self._open()
                os.lseek(self._file, 0, os.SEEK_END)
                return os.splice(self.source, self._file, _AT_ONCE)
            except BlockingIOError:
                raise
            except OSError as error:
                self.why_lost = error.strerror or str(error)
        # The disk refuses it, or its file system does not know how: take it out and see.
        data = os.read(self.source, _AT_ONCE)
        if data:
            self._append(data)
        return len(data)

    def _has_come(self) -> bool:
        """Say whether there is something to append; not, if no more can come.

        Raises:
            BlockingIOError: Nothing has come yet.
        """
        (count,) = struct.unpack("i", fcntl.ioctl(self.source, termios.FIONREAD, b"\0" * 4))
        if count:
            return True
        poll = select.poll()
        poll.register(self.source, select.POLLIN)
        events = dict(poll.poll(0)).get(self.source, 0)
        if events & select.POLLIN:
            return True
        if events & select.POLLHUP:
            return False
        raise BlockingIOError

    def _append(self, data: bytes) -> None:
        """Append all, or drop what the disk does not take: the program must not stand still."""
        if self._lost:
            note = f"\n[kohaku: {self._lost} bytes are missing here: {self.why_lost}]\n"
            if self._write(note.encode()):
                self._lost += len(data)
                self.lost += len(data)
                return
        self._lost = len(self._write(data))
        self.lost += self._lost

    def _write(self, data: bytes) -> bytes:
        """Append; give what could not be."""
        try:
            if self._file < 0:
                self._file = self._open()
            os.lseek(self._file, 0, os.SEEK_END)
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self.why_lost = error.strerror or str(error)
        return data

    def _open(self) -> int:
        try:
            return os.open(self.path, _FLAGS, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            return os.open(self.path, _FLAGS, 0o600)
