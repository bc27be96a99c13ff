"""The interface of every backend, and the promises its tests check (tests/.../conformance.py).

A backend is the runner's hands: it does what it is told and reports facts. It takes no
decision about a task's life and knows neither host nor vault. All calls are made on the
runner's event loop and must not block it; each raises only ``BackendFailed`` or, where what it
runs on may be gone for a while, ``BackendAway``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kohaku_daemon.core.workload import Finding, Handle, Launch, Started
from protocol.errors import KohakuError
from protocol.ids import TaskId
from protocol.models.node import BackendInfo, TaskReading
from protocol.models.task import Exit


class BackendFailed(KohakuError):
    """A backend could not do what it was asked. The message is for the task's owner."""


class BackendAway(KohakuError):
    """What a backend runs on cannot be asked at the moment, such as a daemon that is down.

    Nothing is known of what was asked: it may have been done, or may still be.
    """


class BackendAbsent(KohakuError):
    """There is nothing on this machine for a backend to work with. Raised by ``open`` only.

    No fault: a machine without Docker is as good as any other. The message says what is missing.
    """


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

#: Takes how far a preparation is, for people: a few words such as ``preparing 43 %``.
OnProgress = Callable[[str], None]


class Backend(Protocol):
    """What a task runs in."""

    @property
    def name(self) -> str:
        """Name in specs and configuration, such as ``process``."""

    async def open(self) -> BackendInfo:
        """Make ready and say what this machine allows. Called first.

        Called again from time to time while it does not work, and once a ``trouble`` is over: also
        with launches there that were adopted or started before. Other calls may come meanwhile,
        also if it never worked.

        Raises:
            BackendAbsent: There is nothing here for it to work with.
        """

    async def close(self) -> None:
        """Let go of everything. Launches go on."""

    @property
    def trouble(self) -> str:
        """Why it can start nothing at this moment, for people; empty if it can.

        Read every second: what it remembers, not what it would have to ask for. It is of an
        open backend; one that ``open`` found not to work says so by its info.
        """

    async def prepare(self, launch: Launch, on_progress: OnProgress) -> None:
        """Bring what a launch needs, such as an image, to this machine. Before ``start``.

        May take minutes and may be cancelled at any moment. Called any number of times, also
        for what is there already, and for several launches at once: those that need the same
        thing share one effort. ``on_progress`` is called on the event loop, as often as it likes.

        Raises:
            BackendFailed: It will never work.
            BackendAway: It may work later.
        """

    def plan(self, launch: Launch) -> Handle:
        """Make a handle, a new one at each call, of a launch that does not exist yet.

        Touches nothing: the handle goes to the vault first.
        """

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        """Start a launch.

        Raises:
            BackendFailed: It did not start, and never will under this handle.
            BackendAway: It may have started, or may still start: ``adopt`` tells.
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

        Raises:
            BackendAway: It may not have been told. The runner asks again.
        """

    async def pause(self, handle: Handle) -> None:
        """Hold every process of the launch still. Idempotent."""

    async def resume(self, handle: Handle) -> None:
        """Let it go on. Idempotent."""

    async def remove(self, handle: Handle) -> None:
        """Remove what is left of an ended launch, but not ``folders``. Idempotent."""

    async def read(self, handle: Handle) -> TaskReading | None:
        """Read what a running launch uses; None if it has ended. ``task`` is from the handle."""

    async def tidy(self, wanted: Collection[Handle]) -> None:
        """Remove what is left on this machine of launches of this node that nobody wants.

        Those are the ones whose handle is not in ``wanted``, which has every handle that was
        planned before this call and is not removed; what still runs of them is ended. What is
        planned from the call on, up to its end, is wanted, too. Called once the host has taken
        this run of the runner in, and from time to time. What belongs to others is not touched.
        """

    def owner(self, pid: int, cgroup: str) -> TaskId | None:
        """Name the task that a process of this machine belongs to; None if it is none of ours.

        ``cgroup`` is the text of ``/proc/PID/cgroup``.
        """
