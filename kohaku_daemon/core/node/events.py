"""What can happen to a runner, as data."""

from __future__ import annotations

import msgspec

from kohaku_daemon.core.workload import Finding, Handle, Launch, Started
from protocol.ids import TaskId
from protocol.messages.runner import AttemptReport
from protocol.models.task import Exit


class StartOrdered(msgspec.Struct, frozen=True):
    """The host wants an attempt launched."""

    launch: Launch
    #: As its backend planned it; None with the reason in ``problem`` if no backend can.
    handle: Handle | None
    problem: str = ""


class KillOrdered(msgspec.Struct, frozen=True):
    """The host wants an attempt ended, or never begun."""

    task: TaskId
    attempt: int
    grace_s: float


class PauseOrdered(msgspec.Struct, frozen=True):
    """The host wants an attempt held still."""

    task: TaskId
    attempt: int


class ResumeOrdered(msgspec.Struct, frozen=True):
    """The host wants a held attempt to go on."""

    task: TaskId
    attempt: int


class LaunchStarted(msgspec.Struct, frozen=True):
    """A backend has started a launch."""

    key: str
    started: Started


class LaunchFailed(msgspec.Struct, frozen=True):
    """A backend could not start a launch."""

    key: str
    message: str


class LaunchBrokeOff(msgspec.Struct, frozen=True):
    """A backend was lost while it started a launch: it may have, or may still."""

    key: str
    note: str


class LaunchLetGo(msgspec.Struct, frozen=True):
    """The shell has let go of a launch before its start was tried; it will not be."""

    key: str


class LaunchProgressed(msgspec.Struct, frozen=True):
    """There is something new to say of a launch that has not begun."""

    key: str
    note: str


class LaunchExited(msgspec.Struct, frozen=True):
    """A launch has ended. Times are UTC seconds."""

    key: str
    exit: Exit
    started_at: float
    ended_at: float


class LaunchHeld(msgspec.Struct, frozen=True):
    """A backend has paused or resumed a launch."""

    key: str
    paused: bool


class LaunchRefused(msgspec.Struct, frozen=True):
    """A backend could not pause, resume or end a launch."""

    key: str
    message: str


class LaunchFound(msgspec.Struct, frozen=True):
    """What became of a launch, after a restart or a start that broke off.

    ``fresh`` is a new handle to start it under.
    """

    key: str
    finding: Finding
    fresh: Handle | None


class DeadlinePassed(msgspec.Struct, frozen=True):
    """A launch has run for as long as it may."""

    key: str


class ReportsTaken(msgspec.Struct, frozen=True):
    """The host has committed these reports. It has taken this run of the runner in, then."""

    reports: tuple[AttemptReport, ...]


NodeEvent = (
    StartOrdered
    | KillOrdered
    | PauseOrdered
    | ResumeOrdered
    | LaunchStarted
    | LaunchFailed
    | LaunchBrokeOff
    | LaunchLetGo
    | LaunchProgressed
    | LaunchExited
    | LaunchHeld
    | LaunchRefused
    | LaunchFound
    | DeadlinePassed
    | ReportsTaken
)
