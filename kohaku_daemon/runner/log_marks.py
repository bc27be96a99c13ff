"""Which outputs were removed to make room, so that none of them passes for an empty one.

Knows: how the newest of these marks are kept in one small file.
Does not know: what is removed, and when (``logs``). Blocks on the disk; run it in a thread.

The file is one line a launch, the newest last; a line that was cut off ends with no word and
counts for nothing. It may lack its last lines after a power cut:
then such an output passes for one that was never written, and nothing else is wrong. A disk that
takes no line takes it later, as output is removed most of all where it is full.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

#: Marks in memory: twice the settled launches of which a runner still knows that they were here
#: (``core.node.engine``); of an older one without output it says that it is not here anyway.
MOST: Final = 20_000
#: Lines of the file above which it is written anew, without those that are forgotten.
_MOST_LINES: Final = 2 * MOST


#: What a whole line ends with.
_WORD: Final = " removed"


class Marks:
    """The marks of one folder of outputs."""

    def __init__(self, path: Path, is_key: Callable[[str], object]) -> None:
        """Read ``path``, which may be missing; lines that have no key are passed over."""
        self._path = path
        #: In the order they were removed.
        self._keys: dict[str, None] = {}
        self._unwritten: list[str] = []
        self._lines = 0
        with suppress(OSError):  # without them, all that is left is what is there
            lines = path.read_text("ascii", errors="replace").splitlines()
            self._lines = len(lines)
            keys = [line.removesuffix(_WORD) for line in lines if line.endswith(_WORD)]
            self._keys = dict.fromkeys(key for key in keys if is_key(key))
            self._forget_oldest()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def drop(self, key: str) -> None:
        """Forget a mark: a launch of that name begins, as in another cluster. Asks no disk."""
        self._keys.pop(key, None)

    def add(self, keys: Iterable[str]) -> None:
        """Mark outputs; they count from now on, whether or not the file takes them yet.

        Raises:
            OSError: The disk is full or failed. The next call tries again.
        """
        new = [key for key in keys if key not in self._keys]
        self._keys.update(dict.fromkeys(new))
        self._unwritten += new
        self._forget_oldest()
        if self._lines + len(self._unwritten) > _MOST_LINES:
            self._write_anew()
        elif self._unwritten:
            self._append()
        self._unwritten = []

    def _forget_oldest(self) -> None:
        while len(self._keys) > MOST:
            del self._keys[next(iter(self._keys))]

    def _append(self) -> None:
        # It begins with the end of a line: the one before may have been cut off by a full disk.
        with self._path.open("ab") as file:
            file.write(b"\n" + _render(self._unwritten))
        self._lines += len(self._unwritten) + 1

    def _write_anew(self) -> None:
        aside = self._path.with_name(f"{self._path.name}.new")
        keys = list(self._keys)
        try:
            aside.write_bytes(_render(keys))
            os.replace(aside, self._path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        self._lines = len(keys)


def _render(keys: Iterable[str]) -> bytes:
    return "".join(f"{key}{_WORD}\n" for key in keys).encode()
