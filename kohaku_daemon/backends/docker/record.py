"""What the docker backend keeps of one launch on the node's own disk: a small folder.

Knows: its name, its files and what they decide. Does not know: containers.

``exit``
    What ``init`` writes of the program: begun, ended and how. It is mounted into the container.
``begun``
    Made, and on the disk for certain, before the engine is asked to start the container: where
    it is missing, the program never ran. It outlives the container, which anybody can remove.
``failed``
    Why the launch did not start and never will. It is empty for one that was given up.

The engine's own state cannot stand in for ``begun``: it says nothing once a container is gone.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.docker.init import STATUS_SIZE, Status, parse_status
from kohaku_daemon.core.workload import Handle

_NAME: Final = re.compile(r"[0-9]+-[0-9]+-[0-9a-f]{16}")
_BEGUN: Final = "begun"
_FAILED: Final = "failed"
#: Bytes of why a launch failed that are kept.
_LONGEST_FAILURE: Final = 4096


def name_launch(handle: Handle) -> str:
    """Give the name of a launch's folder and label, ``TASK-ATTEMPT-PLAN``.

    Raises:
        BackendFailed: It is not one of this backend's handles.
    """
    try:
        name = "{task}-{attempt}-{plan}".format(**handle.data)
    except KeyError:
        name = ""
    if not _NAME.fullmatch(name):
        raise BackendFailed(f"this is no handle of the docker backend: {handle.data}")
    return name


def list_names(root: Path) -> list[str]:
    """Name the launches that have a folder.

    Raises:
        OSError: That is not possible.
    """
    return [name for name in os.listdir(root) if _NAME.fullmatch(name)]


class ContainerRecord:
    """The folder of one launch. Its methods block as long as the disk does: for little."""

    def __init__(self, root: Path, name: str) -> None:
        self._folder = f"{root}/{name}"

    def __repr__(self) -> str:
        return f"ContainerRecord({self._folder!r})"

    @property
    def exit_file(self) -> str:
        """Path of the file that ``init`` writes."""
        return f"{self._folder}/exit"

    def make(self) -> None:
        """Make it, for a launch that shall start now. One that is there stays as it is.

        Raises:
            OSError: The disk is full or read-only.
        """
        with suppress(FileExistsError):
            os.mkdir(self._folder, 0o700)
        make_writable(self.exit_file)

    def mark_begun(self) -> None:
        """Have it on the disk that the program may run from now on.

        Raises:
            OSError: It cannot be.
        """
        _write(f"{self._folder}/{_BEGUN}", b"")
        # The names as well (man 2 fsync): of this file, and of the folder it is in.
        for folder in (self._folder, os.path.dirname(self._folder)):
            _sync(folder)

    @property
    def has_begun(self) -> bool:
        """Say whether the program may have run."""
        return os.path.exists(f"{self._folder}/{_BEGUN}")

    def fail(self, why: str = "") -> None:
        """Decide that the launch never starts.

        Raises:
            OSError: The disk is full or read-only.
        """
        with suppress(FileExistsError):
            os.mkdir(self._folder, 0o700)
        text = why.encode("utf-8", "surrogateescape")[:_LONGEST_FAILURE]
        _write(f"{self._folder}/{_FAILED}", text)

    @property
    def failure(self) -> str | None:
        """Why the launch never starts; empty if it was given up, None if it may start."""
        try:
            text = Path(self._folder, _FAILED).read_bytes()
        except OSError:
            return None
        return text.decode("utf-8", "replace")

    def read_status(self) -> Status | None:
        """Read what ``init`` has said; None if it has not yet."""
        try:
            file = os.open(self.exit_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return parse_status(os.read(file, STATUS_SIZE + 1))
        finally:
            os.close(file)

    def remove(self) -> None:
        """Remove it, if it is there.

        Raises:
            OSError: The disk is read-only.
        """
        with suppress(FileNotFoundError):
            shutil.rmtree(self._folder)


def make_writable(path: str) -> None:
    """Make a file that whoever gets at it may write, unless it is there: then let them.

    A container's user is a number of its image's choice. What keeps others away is the folder.

    Raises:
        OSError: The disk is full or read-only.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        os.fchmod(file, 0o666)  # what the process's umask took away
    finally:
        os.close(file)


def _write(path: str, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def _sync(folder: str) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
