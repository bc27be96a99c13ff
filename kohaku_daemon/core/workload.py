"""What the core and the backends say to each other about one launch, as plain data.

Knows: how a launch is described, found again, and how it ended.
Does not know: how any backend does it.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from protocol.ids import BatchId, TaskId
from protocol.models.environment import WantedImage
from protocol.models.task import Claim, Exit, TaskSpec


class Launch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt at one task: all a backend needs to start it."""

    task: TaskId
    attempt: int
    batch: BatchId
    index: int = 0
    size: int = 1
    spec: TaskSpec
    claim: Claim = Claim()
    #: None for what the node itself is.
    image: WantedImage | None = None
    #: Who submitted it is an operator.
    trusted: bool = False
    #: Host names of the machines of its batch by index, as far as they are known.
    hosts: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of this launch for files, cgroups and labels: ``TASK-ATTEMPT``."""
        return f"{self.task}-{self.attempt}"


class Handle(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a backend finds a launch again after a restart of the runner.

    Opaque to everyone else, storable, and written to the vault **before** the start is
    tried: what it names may therefore not exist yet, and a backend must be able to tell.
    """

    backend: str
    #: Version of ``data``'s layout.
    version: int = 1
    data: dict[str, str | int] = msgspec.field(default_factory=dict)


class Found(StrEnum):
    """What became of a launch while nobody looked."""

    #: It never began and, from this answer on, never will under this handle.
    NEVER_STARTED = "never_started"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer of ``adopt``."""

    found: Found
    #: Set if ENDED.
    exit: Exit | None = None
    #: UTC seconds when the program started and ended; 0.0 if it did not, or is not known.
    started_at: float = 0.0
    ended_at: float = 0.0


class Started(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer of ``start``."""

    #: UTC seconds.
    started_at: float
    #: What isolation and limits this launch was given, and which it was not, for people.
    note: str = ""
