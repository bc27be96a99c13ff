"""What a program writes, on its way through pipes into files.

Knows: how to pass it on, whole and in order, and what to do when the disk is full.
Does not know: when the program ends. Standard library only.

A program is not given the files themselves. Scripts say ``> /dev/stderr`` and
``tee /dev/stderr`` a lot, which open again, with O_TRUNC, what is behind the descriptor: of a
file that cuts off all that was written before, of a pipe nothing. So the files only grow,
whatever a task does, as those expect who read them by offsets.
"""

from __future__ import annotations

import os
from typing import Final

#: Bytes passed on at once: what a pipe holds by default (``man 7 pipe``).
_AT_ONCE: Final = 64 * 1024
#: Bytes that a pipe may hold at most, by default, if its program enlarges it.
_PIPE_MOST: Final = 1 << 20


class Output:
    """One output: a pipe for the program, and the file that what comes is appended to."""

    def __init__(self, path: str, uid: int) -> None:
        """Open both; neither is passed on by ``exec``.

        Args:
            path: Of the file, which is made if it is missing.
            uid: User of the program, which may then open its end again; -1 for our own.

        Raises:
            OSError: The file cannot be opened, or there are no more descriptors.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o640)
        #: Our end and the program's.
        self.source, self.sink = os.pipe()
        os.set_blocking(self.source, False)
        if uid >= 0:
            os.fchown(self.sink, uid, -1)
        #: Bytes that the disk did not take since it last took any, and why.
        self._lost = 0
        self._why = ""

    def leave(self) -> None:
        """Let go of the program's end, once the program has it."""
        os.close(self.sink)

    def pass_on(self) -> bool:
        """Append what has come, at most 64 KiB; say whether anything had, or more may come."""
        try:
            data = os.read(self.source, _AT_ONCE)
        except BlockingIOError:
            return True
        if data:
            self._append(data)
        return bool(data)

    def finish(self) -> None:
        """Append what is left, and close: nobody is there any more who could write."""
        for _ in range(_PIPE_MOST // _AT_ONCE):
            if not self.pass_on():
                break
        self._append(b"")
        os.close(self.source)
        os.close(self._file)

    def _append(self, data: bytes) -> None:
        """Append all, or drop what the disk does not take: the program must not stand still."""
        if self._lost:
            note = f"\n[kohaku: {self._lost} bytes are missing here: {self._why}]\n"
            if self._write(note.encode()):
                self._lost += len(data)
                return
        self._lost = len(self._write(data))

    def _write(self, data: bytes) -> bytes:
        """Append; give what could not be."""
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._why = error.strerror or str(error)
        return data
