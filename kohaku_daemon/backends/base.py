"""The interface of every backend, and the promises its tests check (tests/.../conformance.py).

A backend is the runner's hands: it does what it is told and reports facts. It takes no
decision about a task's life and knows neither host nor vault. All calls are made on the
runner's event loop and must not block it; each raises only ``BackendFailed``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kohaku_daemon.core.workload import Finding, Handle, Launch, Started
from protocol.errors import KohakuError
from protocol.models.node import BackendInfo, TaskReading
from protocol.models.task import Exit


class BackendFailed(KohakuError):
    """A backend could not do what it was asked. The message is for the task's owner."""


@dataclass(frozen=True, slots=True)
class TaskFolders:
    """Where a launch finds its files. The runner makes them before ``start`` and removes them."""

    #: The launch's own scratch folder: its working directory unless the spec names another.
    scratch: Path
    #: File its standard output is appended to.
    stdout: Path
    #: File its standard error is appended to.
    stderr: Path


#: Called once for a launch, on the event loop, when its end is known: exit, started, ended (UTC s).
OnExit = Callable[[Exit, float, float], None]


class Backend(Protocol):
    """What a task runs in."""

    @property
    def name(self) -> str:
        """Name in specs and configuration, such as ``process``."""

    async def open(self) -> BackendInfo:
        """Make ready and say what this machine allows. Called first, and only once if it works.

        While it says that it does not, it is called again from time to time, also with launches
        of an earlier run there that were adopted meanwhile.
        """

    async def close(self) -> None:
        """Let go of everything. Launches go on."""

    def plan(self, launch: Launch) -> Handle:
        """Make a handle, a new one at each call, of a launch that does not exist yet.

        Touches nothing: the handle goes to the vault first.
        """

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        """Start a launch.

        Raises:
            BackendFailed: It did not start, and never will under this handle.
        """

    async def adopt(self, handle: Handle) -> Finding:
        """Say what became of a launch started, or about to be, by an earlier run of the runner.

        After NEVER_STARTED a straggling start of that handle can no longer succeed.
        """

    def watch(self, handle: Handle, on_exit: OnExit) -> None:
        """Call ``on_exit`` when the launch ends, or has ended. After ``start`` or ``adopt``."""

    async def kill(self, handle: Handle, grace_s: float) -> None:
        """Ask the whole tree to end: SIGTERM, then after ``grace_s`` SIGKILL. Returns at once.

        Killing what has ended, or is being killed, does nothing; a paused tree is ended too.
        The end is told by ``on_exit`` as for any other, with the signal as the kernel saw it.
        """

    async def pause(self, handle: Handle) -> None:
        """Hold every process of the launch still. Idempotent."""

    async def resume(self, handle: Handle) -> None:
        """Let it go on. Idempotent."""

    async def remove(self, handle: Handle) -> None:
        """Remove what is left of an ended launch, but not ``folders``. Idempotent."""

    async def read(self, handle: Handle) -> TaskReading | None:
        """Read what a running launch uses; None if it has ended. ``task`` is from the handle."""
