"""One launch's container, as the backend remembers it while the runner runs.

Knows: what was found out about it, and who wants to hear of its end. Does not know: engines.
Everything here can be found out again (``ContainerRecord``, the engine).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from kohaku_daemon.backends.base import OnExit
from kohaku_daemon.backends.docker.record import ContainerRecord
from kohaku_daemon.backends.process.group import Group
from kohaku_daemon.core.workload import Finding, Found, Started
from protocol.ids import TaskId
from protocol.models.task import Exit


@dataclass(slots=True, eq=False)
class KeptContainer:
    """What is remembered of one."""

    plan: str
    task: TaskId
    record: ContainerRecord
    #: Boot of the machine that it was planned in.
    boot: str
    #: Program and image, for people.
    command: str = "its program"
    where: str = "its image"
    #: Of the container; empty until it is made.
    id: str = ""
    started: Started | None = None
    #: UTC seconds; 0.0 if not known.
    started_at: float = 0.0
    #: Its start goes on; an end that is heard of meanwhile waits until it is over.
    is_starting: bool = False
    has_died: bool = False
    #: Set once it has ended.
    exit: Exit | None = None
    ended_at: float = 0.0
    on_exit: OnExit | None = None
    #: Somebody asked for its end: by the loop's clock, when SIGKILL is due.
    kill_at: float | None = None
    killer: asyncio.Task[None] | None = None
    group: Group | None = None
    #: When and what CPU seconds were read last, for the percentage.
    read_at: float = 0.0
    read_cpu_s: float = 0.0

    def end(self, exit_: Exit, ended_at: float) -> None:
        """Take note of its end, and tell it to whoever watches. Only the first counts."""
        if self.exit is not None:
            return
        self.exit, self.ended_at = exit_, ended_at
        self.group = None
        if self.killer is not None:
            self.killer.cancel()
        self._tell()

    def watch(self, on_exit: OnExit) -> None:
        """Have its end told, now or when it comes."""
        self.on_exit = on_exit
        if self.exit is not None:
            # Not before whoever asks has taken note that it did.
            asyncio.get_running_loop().call_soon(self._tell)

    @property
    def finding(self) -> Finding:
        """What became of it, once it has ended."""
        return Finding(
            found=Found.ENDED, exit=self.exit, started_at=self.started_at, ended_at=self.ended_at
        )

    def _tell(self) -> None:
        on_exit, self.on_exit = self.on_exit, None
        if on_exit is not None and self.exit is not None:
            on_exit(self.exit, self.started_at or self.ended_at, self.ended_at)
