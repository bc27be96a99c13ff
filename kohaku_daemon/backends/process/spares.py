"""The records' folder: a record is made for a launch, and made empty again for another one.

Knows: how, and that an emptied record waits under a name that is no launch's.
Does not know: what is in a record (``record``), or when nobody can come back to one: that is for
the caller to say, for whoever still has it open would write into another launch's.

A new file costs 60 us on ext4 while one task after the other lets go of one, and a spare 20 us,
for the reason that ``runner.scratch`` gives.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.process.record import make_record

_SPARE: Final = "spare-"
#: As many as are kept: some more than launches end within a moment.
_MOST: Final = 512


class RecordFolder:
    """Makes and removes the records of one backend."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._spares: list[str] = []
        self._numbers = itertools.count(1)

    def open(self) -> None:
        """Find the spares that an earlier run has left. Makes the folder if it is missing.

        Raises:
            OSError: That is not possible.
        """
        # Tasks may pass through it, as the trial does, but list nothing.
        self._root.mkdir(parents=True, exist_ok=True)
        self._root.chmod(0o711)
        names = [name for name in os.listdir(self._root) if name.startswith(_SPARE)]
        last = max((int(name.removeprefix(_SPARE)) for name in names), default=0)
        self._numbers = itertools.count(last + 1)
        self._spares = [f"{self._root}/{name}" for name in names]

    def make(self, path: str) -> None:
        """Make the empty record of a launch; one that is there stays as it is.

        Raises:
            OSError: The disk is full or read-only.
        """
        # Nobody else makes records, so one that is not there now is not there later.
        if self._spares and not os.path.lexists(path):
            with contextlib.suppress(OSError):  # somebody has cleaned up here
                os.rename(self._spares.pop(), path)
                return
        make_record(path)

    def list_names(self) -> list[str]:
        """Give the names of all records, and of what else is in the folder.

        Raises:
            OSError: That is not possible.
        """
        return os.listdir(self._root)

    def remove(self, path: str) -> None:
        """Remove the record of a launch, if there is one.

        Raises:
            OSError: That is not possible.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def recycle(self, path: str) -> None:
        """Remove the record of a launch that nobody can come back to: it may serve another.

        Raises:
            OSError: That is not possible.
        """
        if len(self._spares) >= _MOST:
            self.remove(path)
            return
        with contextlib.suppress(FileNotFoundError):
            # Opened for it, and not ``truncate``: that would have ext4 write the next launch's
            # lines to the disk when they are closed (``auto_da_alloc`` in man 5 ext4).
            os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC))
            spare = f"{self._root}/{_SPARE}{next(self._numbers)}"
            os.rename(path, spare)
            self._spares.append(spare)
