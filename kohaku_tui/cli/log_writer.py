"""Output of tasks onto our own stdout and stderr.

Knows: that a pipe gets every byte as it was and a terminal gets only what cannot drive it;
that whoever reads us may be slow.
Does not know: where the output comes from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from kohaku_tui.sanitize import OutputCleaner
from protocol.messages.stream import LogChunk, LogEnd, Source
from protocol.units import render_size

if TYPE_CHECKING:
    import asyncio

#: A pipe that polls writable takes as much without blocking (pipe(7), PIPE_BUF on Linux).
_ATOMIC: Final = 4096

STDOUT: Final = 1
STDERR: Final = 2


class LogWriter:
    """Writes chunks of each source to a file descriptor, in order and without loss.

    It never blocks the event loop: with a stopped pager at the other end the connection stays
    alive and Ctrl-C works.
    """

    def __init__(self, places: Mapping[Source, int]) -> None:
        """Write each source to the file descriptor in ``places``."""
        self._places = dict(places)
        self._cleaners = {source: OutputCleaner() for source, fd in places.items() if os.isatty(fd)}

    async def write(self, chunk: LogChunk) -> None:
        """Write one chunk.

        Raises:
            BrokenPipeError: Nobody reads any more.
        """
        cleaner = self._cleaners.get(chunk.source)
        data = chunk.data if cleaner is None else cleaner.feed(chunk.data).encode()
        await write_all(self._places[chunk.source], data)

    async def finish(self) -> None:
        """Write what was held back, and switch colours off."""
        for source, cleaner in self._cleaners.items():
            await write_all(self._places[source], cleaner.finish().encode())


def end_notes(end: LogEnd) -> list[str]:
    """Say what is missing of an output that has ended, a line for each thing."""
    notes = []
    if end.dropped:
        notes.append(f"{render_size(end.dropped)} of output were dropped: the task's log is full")
    if end.error:
        code, message = end.error
        notes.append(f"the output ends early: {message} ({code})")
    return notes


async def write_all(fd: int, data: bytes) -> None:
    """Write bytes as they are, without blocking the event loop.

    Raises:
        BrokenPipeError: Nobody reads any more.
    """
    sys.stdout.flush()
    left = memoryview(data)
    while left:
        size = _ATOMIC if await _writable(fd) else len(left)
        left = left[os.write(fd, left[:size]) :]


async def _writable(fd: int) -> bool:
    """Wait until ``fd`` takes bytes without blocking; False if it is a file, which always does."""
    import asyncio

    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    try:
        loop.add_writer(fd, _set_done, ready)
    except PermissionError:  # epoll does not take regular files (epoll_ctl(2), EPERM)
        return False
    try:
        await ready
    finally:
        loop.remove_writer(fd)
    return True


def _set_done(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
