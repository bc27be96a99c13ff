"""What an engine says of a container, as far as it matters to a launch.

Knows: the layout of its answers (Docker Engine API 1.41, ContainerInspect).
Does not know: what follows from it (``verdict``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

#: States in which a container has processes, or may have them at once.
ALIVE: Final = frozenset({"running", "paused", "restarting"})


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """One container at one moment."""

    id: str
    #: ``created``, ``running``, ``paused``, ``exited``, ``dead``, ``removing``.
    status: str
    #: Of its first process, while it is alive; else 0.
    pid: int = 0
    exit_code: int = 0
    oom_killed: bool = False
    #: Why the engine could not start it.
    error: str = ""
    #: UTC seconds; 0.0 for never.
    started_at: float = 0.0
    finished_at: float = 0.0

    @property
    def is_alive(self) -> bool:
        """Say whether it runs or is paused."""
        return self.status in ALIVE

    @property
    def is_paused(self) -> bool:
        """Say whether it is held still."""
        return self.status == "paused"

    @property
    def has_run(self) -> bool:
        """Say whether the engine remembers that its first process was started."""
        return self.started_at > 0


def parse_container(told: Mapping[str, Any]) -> ContainerFacts:
    """Read the answer to ``/containers/ID/json``."""
    state = told["State"]
    return ContainerFacts(
        id=str(told["Id"]),
        status=str(state["Status"]),
        pid=int(state["Pid"]),
        exit_code=int(state["ExitCode"]),
        oom_killed=bool(state["OOMKilled"]),
        error=str(state["Error"]),
        started_at=_parse_time(str(state["StartedAt"])),
        finished_at=_parse_time(str(state["FinishedAt"])),
    )


def _parse_time(text: str) -> float:
    """Read a time as Go writes it; its zero is the year 1."""
    return max(0.0, datetime.fromisoformat(text).timestamp()) if text else 0.0
