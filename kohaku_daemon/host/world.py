"""What committed changes are passed on to: runners, watchers, waiters, the workshop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from kohaku_daemon.core.cluster.records import EventRecord
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.host.environments import Workshop
from kohaku_daemon.host.handlers.cluster import show_event
from kohaku_daemon.host.lately import Lately
from kohaku_daemon.host.links import Links
from kohaku_daemon.host.subscriptions import Hub, TaskChange
from kohaku_daemon.host.waiting import WaitingRoom
from kohaku_daemon.supervise import spawn
from protocol.ids import NodeName, TaskId
from protocol.messages.runner import Order
from protocol.models.environment import Environment
from protocol.models.node import Node
from protocol.session import CloseCode

_log = logging.getLogger(__name__)


class Outside:
    """Carries out what the loop releases (``host.loop.World``)."""

    def __init__(
        self,
        state: ClusterState,
        links: Links,
        hub: Hub,
        waiting: WaitingRoom,
        lately: Lately,
        workshop: Workshop,
    ) -> None:
        self._state = state
        self._links = links
        self._hub = hub
        self._waiting = waiting
        self._lately = lately
        self._workshop = workshop

    def send_orders(self, node: NodeName, orders: Sequence[Order]) -> None:
        """Pass orders to a runner if its link is open."""
        link = self._links.get(node)
        if link is not None:
            link.put(*orders)

    def close_link(self, node: NodeName, reason: str) -> None:
        """Close a runner's link."""
        link = self._links.get(node)
        if link is not None:
            self._links.drop(link)
            is_gone = node not in self._state.fleet.nodes
            code = CloseCode.REPLACED if is_gone else CloseCode.NORMAL
            spawn(link.served.close(code, reason), name=f"close {node}'s link")

    def wants_nodes(self) -> bool:
        """Say whether somebody would see nodes that changed."""
        return self._hub.wants_nodes()

    def tasks_changed(self, tasks: Mapping[TaskId, TaskChange]) -> None:
        """Show tasks that changed."""
        self._hub.put_tasks(tasks)
        for row, _ in tasks.values():
            if row.ended_at:
                self._lately.add(row.state, row.ended_at)
        self._waiting.tasks_changed(
            (task, batch.id, row.state) for task, (row, batch) in tasks.items()
        )

    def nodes_changed(
        self, nodes: Mapping[NodeName, Node | None], readings: Iterable[Node]
    ) -> None:
        """Show nodes that changed, None for one that is no more, and readings."""
        for name, node in nodes.items():
            self._hub.put_node(name, node)
        for node in readings:
            self._hub.put_readings(node)

    def nodes_skipped(self) -> None:
        """Note that nodes changed while nobody wanted them."""
        self._hub.skip_nodes()

    def environments_changed(self, environments: Mapping[str, Environment | None]) -> None:
        """Show environments that changed, None for one that is no more, and work on them."""
        self._workshop.changed(environments)

    def event_told(self, event: EventRecord) -> None:
        """Show a line of the diary, and log it: who reads the log has the ids to search for."""
        facts = {"event": event.kind, "node": event.node, "task": event.task, "actor": event.actor}
        _log.info(event.text, extra={name: fact for name, fact in facts.items() if fact})
        self._hub.put_event(show_event(event))
