"""Finds out what became of launches: when they are looked for, and when their ends are heard of.

Knows: whom to ask in which order, and what is known when there is no answer.
Does not know: how starts are made so that it can be found out (``starting``), words (``verdict``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

from kohaku_daemon.backends.base import BackendAway, BackendFailed
from kohaku_daemon.backends.docker.engine import Containers
from kohaku_daemon.backends.docker.facts import ContainerFacts
from kohaku_daemon.backends.docker.init import Stage, Status
from kohaku_daemon.backends.docker.keeping import Keeping
from kohaku_daemon.backends.docker.kept import KeptContainer
from kohaku_daemon.backends.docker.starting import give_up
from kohaku_daemon.backends.docker.verdict import judge
from kohaku_daemon.clock import Clock
from kohaku_daemon.core.workload import Finding, Found
from kohaku_daemon.dockerd.connection import Dockerd
from kohaku_daemon.supervise import spawn
from protocol.models.task import Cause, Exit

_log = logging.getLogger(__name__)

#: Seconds before the engine went away within which it may have had a hand in an end: dockerd
#: gives containers 10 s, and stops to answer only then.
_STOPPING_S: Final = 15.0
#: Seconds it has to take a connection, when it may be stopping.
_STOPPING_ASK_S: Final = 1.0


class Fates:
    """What becomes of the containers of one runner."""

    def __init__(
        self, node: str, dockerd: Dockerd, containers: Containers, keeping: Keeping, clock: Clock
    ) -> None:
        self._node = node
        self._dockerd = dockerd
        self._containers = containers
        self._keeping = keeping
        self._clock = clock
        #: Of this boot of the machine; empty until it is known.
        self.boot = ""
        #: UTC seconds when the engine went away last, and when it was back.
        self._gone_at = 0.0
        self._back_at = 0.0
        self._jobs: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Let go of what is being found out."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    # One that is looked for -----------------------------------------------------------

    async def find(self, kept: KeptContainer) -> Finding:
        """Say what became of a launch that is not being started.

        Raises:
            BackendFailed: The disk does not let it be decided.
            BackendAway: The engine does not answer now.
        """
        failure = kept.record.failure
        if failure:
            return self._close_case(kept, Exit(Cause.START_FAILED, message=failure))
        if failure is not None:
            return Finding(found=Found.NEVER_STARTED)
        facts, was_unstarted = await self._containers.find(kept.plan), False
        if facts is not None and facts.status == "created":
            # Without force: of this and of a start that is on its way only one succeeds.
            was_unstarted = await self._containers.remove(facts.id)
            facts = None if was_unstarted else await self._containers.inspect(facts.id)
        if facts is None:
            return await self._find_missing(kept, was_unstarted=was_unstarted)
        self._keeping.register(kept, facts.id)
        status = kept.record.read_status()
        kept.started_at = _began_at(status) or facts.started_at
        if facts.is_alive:
            state = Found.PAUSED if facts.is_paused else Found.RUNNING
            return Finding(found=state, started_at=kept.started_at)
        return self._close_case(kept, self._judge(kept, facts), facts.finished_at)

    async def _find_missing(self, kept: KeptContainer, *, was_unstarted: bool) -> Finding:
        """Say what became of a launch that has no container, or had one that was not started.

        The engine's word for that is good as long as the machine runs. What it had not written
        when the power went is another matter.
        """
        status, has_begun = kept.record.read_status(), kept.record.has_begun
        is_sure = was_unstarted and kept.boot == self.boot
        if status is None and (is_sure or not has_begun):
            await give_up(self._containers, kept, "")
            return Finding(found=Found.NEVER_STARTED)
        kept.started_at = _began_at(status)
        return self._close_case(kept, self._judge(kept, None))

    def _close_case(self, kept: KeptContainer, exit_: Exit, finished_at: float = 0.0) -> Finding:
        status = kept.record.read_status()
        said_at = (status.ended_at_ns or 0) / 1e9 if status is not None else 0.0
        kept.end(exit_, said_at or finished_at or self._clock.now())
        return kept.finding

    def _judge(self, kept: KeptContainer, facts: ContainerFacts | None) -> Exit:
        status = kept.record.read_status()
        return judge(
            facts,
            status,
            command=kept.command,
            where=kept.where,
            node=self._node,
            has_restarted=kept.boot != self.boot,
            suspicion=self._suspect(kept, facts),
        )

    def _suspect(self, kept: KeptContainer, facts: ContainerFacts | None) -> str:
        """Say what may have ended a container that was ended by a signal; empty if nobody knows."""
        if kept.kill_at is not None:
            return ""
        ended_at = facts.finished_at if facts is not None else 0.0
        was_gone = self._gone_at - _STOPPING_S <= ended_at <= max(self._back_at, self._gone_at)
        if self._gone_at and was_gone:
            return (
                f"Docker was stopped or restarted on {self._node}, which ends containers unless"
                " live-restore is set there"
            )
        # The kernel ends the first process of a container only if told to from outside.
        is_whole = (status := kept.record.read_status()) is None or status.stage is Stage.BEGUN
        return f"somebody on {self._node} ended its container" if kept.started and is_whole else ""

    # Ends that are heard of -----------------------------------------------------------

    def take_end(self, container: str) -> None:
        """Take note that the first process of a container may have ended."""
        kept = self._keeping.find_container(container)
        if kept is None:
            return
        kept.has_died = True
        if not kept.is_starting and kept.exit is None:
            self._spawn(self._finish(kept), f"end of {kept.plan}")

    async def _finish(self, kept: KeptContainer) -> None:
        """Find out how a container ended that is said to have, and tell it."""
        try:
            facts = await self._containers.inspect(kept.id)
        except BackendAway:
            return  # all are looked at when it is back
        except BackendFailed as error:
            _log.error("cannot find out how %s ended: %s", kept.plan, error)
            return
        if facts is not None and facts.is_alive:
            return
        if self._is_unexplained(kept) and not await self._dockerd.accepts(_STOPPING_ASK_S):
            self.note_gone()
        if kept.exit is None:
            finished_at = facts.finished_at if facts is not None else 0.0
            self._close_case(kept, self._judge(kept, facts), finished_at)

    def _is_unexplained(self, kept: KeptContainer) -> bool:
        """Say whether something that nobody here asked for ended it, as an engine that stops."""
        status = kept.record.read_status()
        by_signal = status is None or status.signal is not None or status.stage is Stage.BEGUN
        return by_signal and kept.kill_at is None and self._back_at >= self._gone_at

    async def look_at_all(self) -> None:
        """Find the ends that no event told of: the engine's events are heard from now on."""
        listed = {one.id: one for one in await self._containers.list_ours()}
        self._back_at = self._clock.now()
        for kept in self._keeping:
            found = listed.get(kept.id)
            if kept.id and (found is None or not found.is_alive):
                self.take_end(kept.id)

    def note_gone(self) -> None:
        """Take note that the engine does not answer any more."""
        self._gone_at = self._clock.now()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        job = spawn(work, name=name)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)


def _began_at(status: Status | None) -> float:
    return (status.began_at_ns or 0) / 1e9 if status is not None else 0.0
