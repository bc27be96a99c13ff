"""Folders of cgroups, and whose they are: those of runners that are no more are removed.

A runner that is killed leaves its folder, ``kohaku/SITE`` of ``cgroups``. While it lives it holds
a lock on what is in there (``man 2 flock``), which ends with the process, however that ends. So
whoever comes next sees what belongs to nobody. What keepers still run in cannot be removed: the
kernel removes a group only if nothing is in it and below it.

Knows: locks and removal. Does not know: what a site is made of.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

#: Descriptors by which the calling process holds folders.
_held: dict[Path, int] = {}


def hold(folder: Path) -> None:
    """Hold a folder until ``let_go``, or the end of the calling process.

    Raises:
        OSError: It is not there (FileNotFoundError): another one has just removed it.
    """
    let_go(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Waits for one who is about to remove it, and who does not wait for anybody.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(2, "it is another one now", str(folder))
    except BaseException:  # whatever it was, none is left open
        os.close(descriptor)
        raise
    _held[folder] = descriptor


def let_go(folder: Path) -> None:
    """Hold a folder no longer; nothing, if it is not held."""
    descriptor = _held.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


def remove_deserted(sites: Path, held: str) -> None:
    """Remove the sites in which nothing runs, and that no living runner holds.

    Args:
        sites: The folder they are in.
        held: Name of the folder in each of them that its runner holds.
    """
    for site in _list_folders(sites):
        with contextlib.suppress(OSError), _alone_in(site / held):
            with contextlib.suppress(FileNotFoundError):  # its runner was killed as it made it
                (site / held).rmdir()
            site.rmdir()


def _list_folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [parent / entry.name for entry in entries if entry.is_dir()]
    except OSError:  # nobody has made it yet
        return []


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """See to it that nobody holds a folder, and that nobody can before we are done.

    Raises:
        OSError: Somebody does.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
