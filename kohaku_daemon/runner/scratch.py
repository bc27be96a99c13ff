"""Scratch folders of launches, one each.

Knows: making and removing them, whatever a task has left inside. Blocks; run it in a thread.
Does not know: launches. A folder that is still there is the mark that a launch has not been
cleaned up.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class ScratchFolders:
    """``ROOT/KEY`` for the launch called KEY."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, key: str) -> Path:
        """Say where a launch's folder is, or would be."""
        return self._root / key

    def make(self, key: str) -> Path:
        """Make a launch's folder, for the runner's user alone.

        Raises:
            OSError: The disk is full or read-only.
        """
        folder = self.path(key)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def remove(self, key: str) -> None:
        """Remove a launch's folder with all that is in it. Removing it again does nothing.

        Raises:
            OSError: Something in it cannot be removed.
        """
        folder = self.path(key)
        if folder.is_dir():
            _open_folders(folder)
            shutil.rmtree(folder)

    def list_keys(self) -> list[str]:
        """Name the launches that still have a folder."""
        return [entry.name for entry in self._root.iterdir()] if self._root.is_dir() else []


def _open_folders(root: Path) -> None:
    """Let us into folders that a task has closed to its own user, ``chmod 0`` or such."""
    if os.geteuid() == 0:
        return  # root is let in anyway
    root.chmod(0o700)
    for folder, inside, _ in os.walk(root):
        for name in inside:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
