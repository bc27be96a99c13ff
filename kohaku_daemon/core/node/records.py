"""What a runner remembers of launches, as it is stored in its vault.

Field names are the schema: add fields with defaults, never rename.
"""

from __future__ import annotations

import msgspec

from kohaku_daemon.core.workload import Handle, Launch
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.models.task import Exit


class LaunchRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One attempt at one task, from the order to the host's word that it knows the end.

    In the vault before the backend is asked to start it. Only the engine changes it.
    """

    launch: Launch
    #: None if no backend here could take it.
    handle: Handle | None = None
    state: AttemptState = AttemptState.ACCEPTED
    #: UTC seconds of the last change.
    at: float = 0.0
    started_at: float = 0.0
    exit: Exit | None = None
    #: Of one that has not begun, how far that is: never written for its own sake.
    note: str = ""
    #: Its end has been asked for; asked again after a restart.
    kill_asked: bool = False
    grace_s: float = 10.0
    #: It has reached its time limit and is being ended for that.
    timed_out: bool = False
    #: The host has the end for good. Kept a while so that a repeated order is refused.
    settled: bool = False

    @property
    def key(self) -> str:
        """Its name in the vault and on disk."""
        return self.launch.key

    def report(self) -> AttemptReport:
        """Say where it stands."""
        return AttemptReport(
            task=self.launch.task,
            attempt=self.launch.attempt,
            state=self.state,
            at=self.at,
            started_at=self.started_at,
            exit=self.exit,
            note=self.note,
        )
