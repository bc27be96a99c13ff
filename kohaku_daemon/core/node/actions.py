"""What the runner's shell is told to do.

The shell first commits every ``Remember`` and ``Forget`` that came together, and only then
carries out the rest: nothing is started or reported that the vault does not know of.
"""

from __future__ import annotations

from dataclasses import dataclass

from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle, Launch
from protocol.messages.runner import AttemptReport


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep a launch in the vault, as it is when the commit begins."""

    record: LaunchRecord


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop a launch from the vault."""

    key: str


@dataclass(frozen=True, slots=True)
class StartLaunch:
    """Have the backend start it; comes back as LaunchStarted or LaunchFailed."""

    launch: Launch
    handle: Handle


@dataclass(frozen=True, slots=True)
class AdoptLaunch:
    """Have the backend find it; comes back as LaunchFound."""

    launch: Launch
    handle: Handle


@dataclass(frozen=True, slots=True)
class WatchLaunch:
    """Have the backend tell its end; comes back as LaunchExited."""

    key: str
    handle: Handle


@dataclass(frozen=True, slots=True)
class KillLaunch:
    """Have the backend end it."""

    key: str
    handle: Handle
    grace_s: float


@dataclass(frozen=True, slots=True)
class PauseLaunch:
    """Have the backend hold it still; comes back as LaunchHeld."""

    key: str
    handle: Handle


@dataclass(frozen=True, slots=True)
class ResumeLaunch:
    """Have the backend let it go on; comes back as LaunchHeld."""

    key: str
    handle: Handle


@dataclass(frozen=True, slots=True)
class RemoveLaunch:
    """Have the backend and the shell remove what it left behind, its output excepted."""

    launch: Launch
    handle: Handle


@dataclass(frozen=True, slots=True)
class SendReport:
    """Tell the host, if the link is open; comes back as ReportsTaken."""

    report: AttemptReport


NodeAction = (
    Remember
    | Forget
    | StartLaunch
    | AdoptLaunch
    | WatchLaunch
    | KillLaunch
    | PauseLaunch
    | ResumeLaunch
    | RemoveLaunch
    | SendReport
)
