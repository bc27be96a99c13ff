"""The host's door for runners in a simulation: joining, registering, orders, reports.

As in ``kohaku_daemon.host.runners`` and ``links``: one link a node, a second runner with the
same credential is refused while the first is heard, and what comes on a link that was
replaced is still taken until that link is closed.

Knows: links and who is at their other end.
Does not know: what is committed when (``host``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kohaku_daemon.core.cluster.actions import CloseLink, SendOrder
from kohaku_daemon.core.cluster.events import (
    ClusterEvent,
    JoinAsked,
    RunnerBeat,
    RunnerGone,
    RunnerRegistered,
    RunnerReported,
)
from protocol.errors import Conflict, ErrorBody, KohakuError, Unauthenticated
from protocol.ids import NodeName, TaskId
from protocol.messages.runner import (
    AttemptReport,
    HeartbeatTaken,
    Join,
    Joined,
    Order,
    Orders,
    Register,
    Registered,
    Report,
    Reported,
)
from protocol.models.node import Readings
from tests.simulation.disk import HEARTBEAT_S
from tests.simulation.host import Host
from tests.simulation.link import Link, Message
from tests.simulation.stage import Stage

_ALIVE_HEARTBEATS = 3


@dataclass(slots=True, eq=False)
class Visitor:
    """One connection as the host sees it."""

    link: Link
    credential: str
    #: Empty until its credential is that of a node.
    node: NodeName
    instance: str = ""
    heard_at: float = 0.0
    #: It is, or was, its node's link.
    has_registered: bool = False
    #: Orders are passed on.
    takes_orders: bool = False
    orders: list[Order] = field(default_factory=list)


class Door:
    """Where runners come in."""

    def __init__(self, stage: Stage, host: Host) -> None:
        self.links: dict[NodeName, Visitor] = {}
        self._stage = stage
        self._random = stage.chance()
        self._host = host
        self._visitors: dict[Link, Visitor] = {}
        host.on_order = self._pass_on
        host.on_death = self._shut

    def hello(self, credential: str) -> NodeName | None:
        """Say which node's credential this is, if it is one's."""
        assert self._host.engine is not None
        for node in self._host.engine.state.fleet.nodes.values():
            if node.record.credential == credential:
                return node.name
        return None

    def accept(self, link: Link, credential: str, node: NodeName | None) -> None:
        """Take a connection of a runner that has said hello, of no node yet if it will join."""
        self._visitors[link] = Visitor(link, credential, node or NodeName(""))
        link.on_closed["host"] = self._closed

    def receive(self, link: Link, message: Message, call: int) -> None:
        """Take what a runner says."""
        visitor = self._visitors.get(link)
        if self._host.engine is None or visitor is None:
            return
        match message:
            case Join():
                self._join(visitor, message, call)
            case Register():
                self._register(visitor, message, call)
            case Report(reports) if visitor.has_registered:
                self._ask(visitor, RunnerReported(visitor.node, reports), Reported(), call)
            case Readings() if visitor.has_registered:
                visitor.heard_at = self._stage.now
                self._host.tell(RunnerBeat(visitor.node, message))
                link.send("runner", HeartbeatTaken(), call)
            case _:
                raise AssertionError(f"a runner said {message}")

    # Calls --------------------------------------------------------------------------

    def _ask(
        self,
        visitor: Visitor,
        event: ClusterEvent,
        answer: Message,
        call: int,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        def reply(value: object) -> None:
            if isinstance(value, KohakuError):
                self._refuse(visitor, value, call)
            else:
                visitor.link.send("runner", answer, call)
                then()

        self._host.ask(event, reply, patient=not isinstance(event, JoinAsked))

    def _refuse(self, visitor: Visitor, error: KohakuError, call: int) -> None:
        self._stage.tell("the host refuses {}: {}", visitor.link.node, error.message)
        visitor.link.send("runner", ErrorBody(error.code, error.message), call)

    def _join(self, visitor: Visitor, message: Join, call: int) -> None:
        def joined() -> None:
            visitor.node = NodeName(message.node)
            visitor.credential = message.credential

        event = JoinAsked(
            message.token, message.node, message.credential, message.labels, "10.0.0.1"
        )
        answer = Joined(NodeName(message.node), "simulated")
        self._ask(visitor, event, answer, call, joined)

    def _register(self, visitor: Visitor, message: Register, call: int) -> None:
        assert self._host.engine is not None
        name = visitor.node
        node = self._host.engine.state.fleet.nodes.get(name)
        if node is None or node.record.credential != visitor.credential:
            self._refuse(visitor, Unauthenticated("its node was removed"), call)
            return
        before = self.links.get(name)
        if before is not None and self._is_second(visitor, message, before):
            self._refuse(visitor, Conflict("another runner is connected already"), call)
            return
        visitor.instance, visitor.heard_at = message.instance, self._stage.now
        visitor.has_registered = True
        self.links[name] = visitor
        if before is not None and before is not visitor:
            old = before.link
            self._soon(lambda: old.close("host", "its runner has connected again"))
        event = RunnerRegistered(
            name, "10.0.0.1", message.inventory, message.attempts, self._ended(message.attempts)
        )

        def registered() -> None:
            visitor.takes_orders = True
            self._flush(visitor)

        self._ask(visitor, event, Registered(name, HEARTBEAT_S), call, registered)

    def _is_second(self, visitor: Visitor, message: Register, before: Visitor) -> bool:
        silent_s = self._stage.now - before.heard_at
        return (
            before is not visitor
            and before.instance != message.instance
            and silent_s < _ALIVE_HEARTBEATS * HEARTBEAT_S
        )

    def _ended(self, attempts: tuple[AttemptReport, ...]) -> frozenset[TaskId]:
        assert self._host.engine is not None
        live, stored = self._host.engine.state.tasks, self._host.disk.tasks
        return frozenset(
            report.task
            for report in attempts
            if report.task not in live
            and (record := stored.get(report.task)) is not None
            and record.state.is_final
        )

    # Orders and ends ----------------------------------------------------------------

    def _pass_on(self, action: SendOrder | CloseLink) -> None:
        visitor = self.links.get(action.node)
        if visitor is None:
            return
        match action:
            case SendOrder(_, order):
                visitor.orders.append(order)
                if visitor.takes_orders and len(visitor.orders) == 1:
                    self._soon(lambda: self._flush(visitor))
            case CloseLink(node, reason):
                del self.links[node]
                self._soon(lambda: visitor.link.close("host", reason))

    def _flush(self, visitor: Visitor) -> None:
        if visitor.orders:
            visitor.link.send("runner", Orders(tuple(visitor.orders)))
            visitor.orders.clear()

    def _closed(self, link: Link) -> None:
        visitor = self._visitors.pop(link, None)
        if visitor is not None and self.links.get(visitor.node) is visitor:
            del self.links[visitor.node]
            self._host.tell(RunnerGone(visitor.node, "its connection closed"))

    def _shut(self) -> None:
        visitors, self._visitors, self.links = self._visitors, {}, {}
        for link in visitors:
            link.close("host", "the host died")

    def _soon(self, act: Callable[[], None]) -> None:
        self._stage.after(0.0001 + 0.02 * self._random.random(), act)
