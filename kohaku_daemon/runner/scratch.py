"""Scratch folders of launches, one each.

Knows: making and removing them, whatever a task has left inside; that an empty one can serve
again. Blocks; run it in a thread.
Does not know: launches. A folder that is still there under a launch's name is the mark that
the launch has not been cleaned up.

Folders that come back empty are kept as spares and given out again under another name. On
ext4 that costs 20 us, and a new one 100 us: it passes over all inodes that were let go in
the last five seconds (``recently_deleted`` in the kernel's fs/ext4/ialloc.c), and one task
after the other lets go of one.
"""

from __future__ import annotations

import array
import errno
import fcntl
import itertools
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

_SPARE: Final = "spare-"
#: As many as are kept. A task that leaves files costs a removal anyway.
_MOST_SPARES: Final = 512
_MODE: Final = 0o700

#: ``linux/fs.h`` on 64-bit machines: the attributes that lsattr shows.
_GET_FLAGS: Final = 0x80086601
#: Those that a file system sets by itself: extents, index, inline data.
_OWN_FLAGS: Final = 0x80000 | 0x1000 | 0x10000000


class ScratchFolders:
    """``ROOT/KEY`` for the launch called KEY. Threads may share it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        names = os.listdir(root) if root.is_dir() else []
        spares = [name for name in names if name.startswith(_SPARE)]
        numbers = (int(name.removeprefix(_SPARE)) for name in spares)
        self._numbers = itertools.count(max(numbers, default=0) + 1)
        #: Only ever appended to and popped from, which no two threads do at once.
        self._spares = [os.path.join(root, name) for name in spares]

    def make(self, key: str) -> Path:
        """Make a launch's folder, for the runner's user alone.

        Raises:
            OSError: The disk is full or read-only.
        """
        folder = self._root / key
        # IndexError: there is none. OSError: somebody has cleaned up here, or the launch has one.
        with suppress(IndexError, OSError):
            os.rename(self._spares.pop(), folder)
            return folder
        folder.mkdir(mode=_MODE, parents=True, exist_ok=True)
        return folder

    def remove(self, key: str) -> None:
        """Remove a launch's folder with all that is in it. Removing it again does nothing.

        Raises:
            OSError: Something in it cannot be removed.
        """
        folder = f"{self._root}/{key}"
        try:
            if self._spare(folder):
                return
        except FileNotFoundError:
            return
        _open_folders(folder)
        shutil.rmtree(folder)

    def list_keys(self) -> list[str]:
        """Name the launches that still have a folder."""
        if not self._root.is_dir():
            return []
        return [name for name in os.listdir(self._root) if not name.startswith(_SPARE)]

    def _spare(self, folder: str) -> bool:
        """Keep a folder for another launch, if nothing of this one is in it or on it."""
        if len(self._spares) >= _MOST_SPARES or not _is_as_new(folder):
            return False
        spare = f"{self._root}/{_SPARE}{next(self._numbers)}"
        os.rename(folder, spare)
        self._spares.append(spare)
        return True


def _is_as_new(folder: str) -> bool:
    """Make a folder ours again, and say whether it is empty and without any attribute.

    What the task may still have open of it is of no use then: the folder is closed to its
    user, and nothing is inherited by what comes into it, as from a default ACL.

    Raises:
        FileNotFoundError: It is gone.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.open(folder, flags)
    except PermissionError:  # a task under our own user has closed it
        return False
    try:
        found = os.fstat(file)
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(file, os.geteuid(), os.getegid())
        if stat.S_IMODE(found.st_mode) != _MODE:
            os.fchmod(file, _MODE)
        return not os.listdir(file) and not _is_marked(file)
    finally:
        os.close(file)


def _is_marked(file: int) -> bool:
    """Say whether a folder has attributes that its owner may have given it."""
    try:
        # What a security module has put there is no user's work.
        if any(not name.startswith("security.") for name in os.listxattr(file)):
            return True
        found = array.array("i", [0])
        fcntl.ioctl(file, _GET_FLAGS, found)
        return bool(found[0] & ~_OWN_FLAGS)
    except OSError as error:
        # A file system that knows no such thing has none.
        return error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP)


def _open_folders(root: str) -> None:
    """Let us into folders that a task has closed to its own user, ``chmod 0`` or such."""
    if os.geteuid() == 0:
        return  # root is let in anyway
    os.chmod(root, _MODE)
    for folder, inside, _ in os.walk(root):
        for name in inside:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                os.chmod(path, _MODE)
