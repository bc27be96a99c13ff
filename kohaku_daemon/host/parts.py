"""The host's parts in one place, and one call as its handler sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kohaku_daemon.clock import Clock
from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import ClusterEvent
from kohaku_daemon.core.cluster.records import AuditRecord
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.host.config import HostConfig
from kohaku_daemon.host.gate import Gate
from kohaku_daemon.host.lately import Lately
from kohaku_daemon.host.links import Links
from kohaku_daemon.host.loop import HostLoop
from kohaku_daemon.host.refusals import Refusals
from kohaku_daemon.host.subscriptions import Hub
from kohaku_daemon.host.waiting import WaitingRoom
from kohaku_daemon.store.tasks import TaskStore

if TYPE_CHECKING:
    from kohaku_daemon.host.environments import Workshop
    from kohaku_daemon.host.relay import Relay
    from kohaku_daemon.host.shells import Shells
    from kohaku_daemon.host.streams import Streams


@dataclass(frozen=True, slots=True)
class Parts:
    """What handlers work with."""

    config: HostConfig
    clock: Clock
    engine: ClusterEngine
    store: TaskStore
    loop: HostLoop
    hub: Hub
    waiting: WaitingRoom
    lately: Lately
    links: Links
    gate: Gate
    streams: Streams
    relay: Relay
    workshop: Workshop
    shells: Shells
    refusals: Refusals
    #: UTC seconds.
    started_at: float

    @property
    def state(self) -> ClusterState:
        """The engine's memory, to be read only."""
        return self.engine.state


@dataclass(frozen=True, slots=True)
class Call:
    """One call: who makes it, and the line it leaves in the audit log."""

    parts: Parts
    actor: Actor
    audit: AuditRecord | None = None

    async def ask(self, event: ClusterEvent) -> object:
        """Have the engine handle a request.

        Raises:
            KohakuError: The engine refused it.
        """
        return await self.parts.loop.ask(event, self.audit)
