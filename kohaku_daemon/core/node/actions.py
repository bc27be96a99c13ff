"""What the runner's shell is told to do.

The shell first commits every ``Remember`` and ``Forget`` that came together, and only then
carries out the rest: nothing is started or reported that the vault does not know of. What is
remembered ``later`` holds nothing up but a ``RemoveLaunch``; ``ledger`` has the exact rule.
"""

from __future__ import annotations

import msgspec

from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle, Launch
from protocol.messages.runner import AttemptReport


class Remember(msgspec.Struct, frozen=True):
    """Keep a launch in the vault, as it is when the commit begins."""

    record: LaunchRecord
    #: It may share a later commit, within moments: what it says can be found out again.
    later: bool = False

    @property
    def key(self) -> str:
        """Of the launch."""
        return self.record.key


class Forget(msgspec.Struct, frozen=True):
    """Drop a launch from the vault."""

    key: str


class StartLaunch(msgspec.Struct, frozen=True):
    """Have the backend bring what it needs, then start it.

    Comes back as LaunchStarted, LaunchFailed or LaunchBrokeOff, and meanwhile LaunchProgressed.
    """

    launch: Launch
    handle: Handle

    @property
    def key(self) -> str:
        """Of the launch."""
        return self.launch.key


class LetGo(msgspec.Struct, frozen=True):
    """Do not start it if its start has not been tried; comes back as LaunchLetGo if it was not."""

    key: str


class AdoptLaunch(msgspec.Struct, frozen=True):
    """Have the backend find it; comes back as LaunchFound."""

    launch: Launch
    handle: Handle

    @property
    def key(self) -> str:
        """Of the launch."""
        return self.launch.key


class WatchLaunch(msgspec.Struct, frozen=True):
    """Have the backend tell its end; comes back as LaunchExited."""

    key: str
    handle: Handle


class KillLaunch(msgspec.Struct, frozen=True):
    """Have the backend end it."""

    key: str
    handle: Handle
    grace_s: float


class PauseLaunch(msgspec.Struct, frozen=True):
    """Have the backend hold it still; comes back as LaunchHeld."""

    key: str
    handle: Handle


class ResumeLaunch(msgspec.Struct, frozen=True):
    """Have the backend let it go on; comes back as LaunchHeld."""

    key: str
    handle: Handle


class SetDeadline(msgspec.Struct, frozen=True):
    """Have time told: comes back as DeadlinePassed after so many seconds of a steady clock."""

    key: str
    #: None if it is of no interest any more.
    in_s: float | None


class RemoveLaunch(msgspec.Struct, frozen=True):
    """Have the backend and the shell remove what it left behind, its output excepted."""

    launch: Launch
    handle: Handle

    @property
    def key(self) -> str:
        """Of the launch."""
        return self.launch.key


class SendReport(msgspec.Struct, frozen=True):
    """Tell the host, if the link is open; comes back as ReportsTaken."""

    report: AttemptReport

    @property
    def key(self) -> str:
        """Of the launch."""
        return f"{self.report.task}-{self.report.attempt}"


NodeAction = (
    Remember
    | Forget
    | StartLaunch
    | LetGo
    | AdoptLaunch
    | WatchLaunch
    | KillLaunch
    | PauseLaunch
    | ResumeLaunch
    | SetDeadline
    | RemoveLaunch
    | SendReport
)
