"""What can happen to a runner, as data."""

from __future__ import annotations

from dataclasses import dataclass

from kohaku_daemon.core.workload import Finding, Handle, Launch, Started
from protocol.ids import TaskId
from protocol.messages.runner import AttemptReport
from protocol.models.task import Exit


@dataclass(frozen=True, slots=True)
class StartOrdered:
    """The host wants an attempt launched."""

    launch: Launch
    #: As its backend planned it; None with the reason in ``problem`` if no backend can.
    handle: Handle | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class KillOrdered:
    """The host wants an attempt ended, or never begun."""

    task: TaskId
    attempt: int
    grace_s: float


@dataclass(frozen=True, slots=True)
class PauseOrdered:
    """The host wants an attempt held still."""

    task: TaskId
    attempt: int


@dataclass(frozen=True, slots=True)
class ResumeOrdered:
    """The host wants a held attempt to go on."""

    task: TaskId
    attempt: int


@dataclass(frozen=True, slots=True)
class LaunchStarted:
    """A backend has started a launch."""

    key: str
    started: Started


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """A backend could not start a launch."""

    key: str
    message: str


@dataclass(frozen=True, slots=True)
class LaunchExited:
    """A launch has ended. Times are UTC seconds."""

    key: str
    exit: Exit
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class LaunchHeld:
    """A backend has paused or resumed a launch."""

    key: str
    paused: bool


@dataclass(frozen=True, slots=True)
class LaunchRefused:
    """A backend could not pause, resume or end a launch."""

    key: str
    message: str


@dataclass(frozen=True, slots=True)
class LaunchFound:
    """After a restart: what became of a launch. ``fresh`` is a new handle to start it under."""

    key: str
    finding: Finding
    fresh: Handle | None


@dataclass(frozen=True, slots=True)
class ReportsTaken:
    """The host has committed these reports."""

    reports: tuple[AttemptReport, ...]


NodeEvent = (
    StartOrdered
    | KillOrdered
    | PauseOrdered
    | ResumeOrdered
    | LaunchStarted
    | LaunchFailed
    | LaunchExited
    | LaunchHeld
    | LaunchRefused
    | LaunchFound
    | ReportsTaken
)
