"""What committed changes are passed on to: runners, watchers, waiters."""

from __future__ import annotations

from kohaku_daemon.core.cluster.records import EventRecord
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.core.cluster.views import brief_task
from kohaku_daemon.host.handlers.cluster import show_event
from kohaku_daemon.host.links import Links
from kohaku_daemon.host.subscriptions import Hub
from kohaku_daemon.host.waiting import WaitingRoom
from kohaku_daemon.supervise import spawn
from protocol.ids import NodeName
from protocol.messages.runner import Order
from protocol.models.node import Node
from protocol.models.task import Task
from protocol.session import CloseCode


class Outside:
    """Carries out what the loop releases (``host.loop.World``)."""

    def __init__(self, state: ClusterState, links: Links, hub: Hub, waiting: WaitingRoom) -> None:
        self._state = state
        self._links = links
        self._hub = hub
        self._waiting = waiting

    def send_order(self, node: NodeName, order: Order) -> None:
        """Pass an order to a runner if its link is open."""
        link = self._links.get(node)
        if link is not None:
            link.put(order)

    def close_link(self, node: NodeName, reason: str) -> None:
        """Close a runner's link."""
        link = self._links.get(node)
        if link is not None:
            self._links.drop(link)
            is_gone = node not in self._state.fleet.nodes
            code = CloseCode.REPLACED if is_gone else CloseCode.NORMAL
            spawn(link.served.close(code, reason), name=f"close {node}'s link")

    def task_changed(self, task: Task) -> None:
        """Show a task."""
        self._hub.put_task(brief_task(task))
        self._waiting.task_changed(task)

    def node_changed(self, name: NodeName, node: Node | None) -> None:
        """Show a node, or that it is no more."""
        self._hub.put_node(name, node)

    def readings_changed(self, node: Node) -> None:
        """Show a node's readings."""
        self._hub.put_readings(node)

    def event_told(self, event: EventRecord) -> None:
        """Show a line of the diary."""
        self._hub.put_event(show_event(event))
