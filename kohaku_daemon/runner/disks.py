"""Whether the disks that a runner writes to take anything.

Knows: how a file system is asked and tried, in which words it is told what is wrong with it.
Does not know: who is told, what comes of it. Blocks on the disk; run it in a thread.

A disk that is full or broken is told before a launch needs it: each launch that is ordered to
such a node would fail, and the next one too, until the queue is empty.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

#: Bytes, and share of the disk, of which the smaller must be free: enough for the records of
#: a launch and for its end.
_LEAST: Final = 64 * 2**20
_LEAST_SHARE: Final = 0.01
#: Bytes written to see whether a disk takes any: a block.
_TRIAL: Final = b"\0" * 4096


class Disks:
    """The folders a runner writes to, by what they are for."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        """Watch ``folders``: what each is for, as it is told to people, and where it is."""
        self._folders = folders
        #: What was wrong at the last look, one sentence a disk. Stable while it lasts.
        self.troubles: tuple[str, ...] = ()

    def look(self) -> None:
        """See how the disks are now."""
        found = [
            f"{trouble}: nowhere to keep {' and '.join(uses)}"
            for uses, folder in self._by_disk()
            if (trouble := _try(folder))
        ]
        self.troubles = tuple(found)

    def _by_disk(self) -> Iterable[tuple[list[str], Path]]:
        """Give each file system once: what it is for, and a folder on it."""
        disks: dict[int, tuple[list[str], Path]] = {}
        for use, folder in self._folders.items():
            there = folder if folder.is_dir() else folder.parent
            disks.setdefault(there.stat().st_dev, ([], there))[0].append(use)
        return disks.values()


def _try(folder: Path) -> str:
    """Say what is wrong with the file system of a folder; nothing if it is well."""
    stat = os.statvfs(folder)
    free, whole = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    if stat.f_flag & os.ST_RDONLY:
        return f"{folder} is read-only"
    if free < min(_LEAST, whole * _LEAST_SHARE):
        return f"the disk of {folder} is full"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_TRIAL)
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    return ""
