"""One output of a launch being read, while it may grow at its end and lose its middle.

Knows: where reading begins and where it stands, how a dropped range looks to the reader.
Does not know: other outputs, when to look again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from kohaku_daemon.runner.log_holes import Hole, Holes
from protocol.messages.stream import LogChunk, Source
from protocol.units import render_size

#: Bytes of output in one message: with what is around them they fit a data frame of 64 KiB.
_CHUNK: Final = 48 * 1024
#: Bytes read in one go.
_AT_ONCE: Final = 16 * _CHUNK
#: Bytes searched for line ends in one go, and in all: a program may write none.
_BLOCK: Final = 64 * 1024
_LINES_WITHIN: Final = 64 * 2**20


class OutputReader:
    """Reads one output from somewhere to its end. One thread at a time.

    An output that is not there is empty; it is read once somebody makes it.
    """

    def __init__(self, source: Source, path: Path, holes: Holes, cap: int) -> None:
        """Open the output, if it is there."""
        self.source = source
        #: Offset of the first byte that was not given.
        self.position = 0
        self._path = path
        self._holes = holes
        self._cap = cap
        self._limit: int | None = None
        self._open: int | None = None
        if self._find() is not None:
            holes.find(path)

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            os.close(self._open)

    def _find(self) -> int | None:
        """Give the descriptor of the file, if there is one by now."""
        if self._open is None:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            with suppress(FileNotFoundError):
                self._open = os.open(self._path, flags)
        return self._open

    @property
    def dropped(self) -> int:
        """How many bytes are no more."""
        hole = self._holes.newest(self._path)
        return 0 if hole is None else hole.end - hole.start

    def begin(self, offset: int, tail_lines: int, *, stop_at_end: bool) -> None:
        """Go to ``offset``, negative from the end, or on to the last ``tail_lines`` lines.

        With ``stop_at_end`` what is written from now on is not given.
        """
        file = self._find()
        size = 0 if file is None else os.fstat(file).st_size
        self.position = offset if offset >= 0 else max(size + offset, 0)
        if tail_lines > 0:
            self.position = max(self.position, self._find_lines(tail_lines, size))
        if stop_at_end:
            self._limit = size

    def read(self) -> list[LogChunk]:
        """Give the next chunks, none at the end.

        Raises:
            OSError: The disk failed.
        """
        if self._limit == 0 or self._find() is None:
            return []
        hole = self._holes.newest(self._path)
        if hole is not None and hole.start <= self.position < hole.end:
            return [self._leap(hole)]
        end = self.position + _AT_ONCE
        if self._limit is not None:
            end = min(end, self._limit)
        if hole is not None and self.position < hole.start:
            end = min(end, hole.start)
        if end <= self.position:
            return []
        data = self._pread(end - self.position, self.position)
        now = self._holes.newest(self._path)
        if now is not None and now != hole and _overlap(now, self.position, len(data)):
            # It was punched meanwhile, perhaps before the reading: these may be zeros.
            return self.read()
        return self._give(data)

    def _pread(self, count: int, offset: int) -> bytes:
        file = self._find()
        return b"" if file is None else os.pread(file, count, offset)

    def _give(self, data: bytes) -> list[LogChunk]:
        start, self.position = self.position, self.position + len(data)
        return [
            LogChunk(self.source, start + at, data[at : at + _CHUNK])
            for at in range(0, len(data), _CHUNK)
        ]

    def _leap(self, hole: Hole) -> LogChunk:
        """Pass what is left of a hole, and say so."""
        mid_line = self.position > 0 and self._pread(1, self.position - 1) != b"\n"
        text = (
            f"{chr(10) if mid_line else ''}[kohaku: {render_size(hole.end - self.position)}"
            f" dropped here: the output is capped at {render_size(self._cap)},"
            " see log_cap of the runner]\n"
        ).encode()
        self.position = hole.end
        return LogChunk(self.source, hole.end - len(text), text)

    def _find_lines(self, count: int, size: int) -> int:
        """Give the offset of the last ``count`` lines, searching backwards.

        It goes no further than to a hole, and begins with that one then.
        """
        hole = self._holes.newest(self._path)
        bottom = max(0 if hole is None else hole.end, size - _LINES_WITHIN)
        # The end of the last line is not the beginning of another.
        left = count + (size > 0 and self._pread(1, size - 1) == b"\n")
        for start, block in self._backwards(bottom, size):
            ends = block.count(b"\n")
            if ends >= left:
                at = len(block)
                for _ in range(left):
                    at = block.rindex(b"\n", 0, at)
                return start + at + 1
            left -= ends
        return bottom if hole is None or bottom > hole.end else hole.start

    def _backwards(self, bottom: int, top: int) -> Iterator[tuple[int, bytes]]:
        while top > bottom:
            start = max(top - _BLOCK, bottom)
            yield start, self._pread(top - start, start)
            top = start


def _overlap(hole: Hole, start: int, length: int) -> bool:
    return hole.start < start + length and start < hole.end
