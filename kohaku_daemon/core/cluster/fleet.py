"""The nodes: who belongs to the cluster, who is there, who is given work.

Knows: joining, registering, silence, draining, labels, removal of one node.
Does not know: the tasks on it; the engine brings both together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.cluster.records import JoinTokenRecord, NodeRecord, Remnant
from kohaku_daemon.core.placement.place import Site
from protocol.errors import Conflict, NotFound, Unauthenticated
from protocol.ids import NodeName, TaskId
from protocol.messages.runner import AttemptReport
from protocol.models.node import Inventory, Node, NodeState, Readings

#: A link that is open but silent for this many heartbeats counts as down.
MISSED_HEARTBEATS: Final = 5
#: Seconds that a join token is remembered after it has expired.
_REMEMBER_TOKENS_S: Final = 7 * 86400.0


@dataclass(slots=True)
class FleetNode:
    """One node of the cluster."""

    record: NodeRecord
    site: Site
    state: NodeState = NodeState.OFFLINE
    #: UTC seconds since it is offline; meaningless while online.
    offline_since: float = 0.0
    seen_at: float = 0.0
    readings: Readings | None = None
    #: Attempts that run here although the books have given them up: they hold what no claim
    #: tells of, so the node gets nothing until they have ended, as they are ordered to.
    unwanted: set[tuple[TaskId, int]] = field(default_factory=set)

    @property
    def name(self) -> NodeName:
        """Its name."""
        return self.record.name

    @property
    def troubles(self) -> tuple[str, ...]:
        """What its runner says is wrong with it."""
        return () if self.readings is None else self.readings.troubles

    @property
    def is_online(self) -> bool:
        """Whether its runner is there."""
        return self.state is NodeState.ONLINE

    def find_remnant(self, report: AttemptReport) -> Remnant | None:
        """Give the remnant that a report is about, if it is about one."""
        for remnant in self.record.remnants:
            if (remnant.task, remnant.attempt) == (report.task, report.attempt):
                return remnant
        return None

    def close_or_open(self) -> None:
        """Tell placement whether this node takes work, and if not why."""
        if not self.is_online:
            self.site.closed = f"the node is {self.state}"
        elif self.record.draining:
            self.site.closed = "the node is draining"
        elif self.unwanted:
            count = len(self.unwanted)
            tasks = f"{count} task{'s' if count > 1 else ''}"
            self.site.closed = f"the node still runs {tasks} that it was told to end"
        elif self.troubles:
            self.site.closed = f"the node is in trouble: {'; '.join(self.troubles)}"
        else:
            self.site.closed = ""

    def view(self) -> Node:
        """Show it to people."""
        return Node(
            name=self.name,
            state=self.state,
            draining=self.record.draining,
            labels=self.record.labels,
            inventory=self.record.inventory,
            claimed=self.site.books.claimed(),
            readings=self.readings if self.is_online else None,
            seen_at=self.seen_at,
            joined_at=self.record.joined_at,
        )


@dataclass(slots=True)
class Fleet:
    """All nodes and the tokens that let more in."""

    nodes: dict[NodeName, FleetNode] = field(default_factory=dict)
    join_tokens: dict[str, JoinTokenRecord] = field(default_factory=dict)

    def load(self, records: Iterable[NodeRecord], now: float) -> None:
        """Take the nodes of a store. All are offline until their runners register."""
        for record in records:
            self._add(record, now)

    @property
    def sites(self) -> dict[NodeName, Site]:
        """The nodes as placement sees them."""
        return {name: node.site for name, node in self.nodes.items()}

    def find(self, name: str) -> FleetNode:
        """Give a node.

        Raises:
            NotFound: With the names there are, the nearest first.
        """
        node = self.nodes.get(NodeName(name))
        if node is None:
            raise NotFound(f"no node is called {name!r}", hint=self._hint(name))
        return node

    def admit(
        self, token_digest: str, name: NodeName, credential: str, labels: dict[str, str], now: float
    ) -> tuple[FleetNode, JoinTokenRecord | None]:
        """Let a runner in as a new node, and give the token as it is after its use.

        A runner that asks again because the answer was lost is let in again, and the token
        is not used up twice: then there is no token to store.

        Raises:
            Unauthenticated: The token is unknown, used up, expired or for another name.
            Conflict: The name belongs to another runner, or the credential to another name.
        """
        there = self.nodes.get(name)
        if there is not None and there.record.credential == credential:
            return there, None
        token = self._usable_token(token_digest, name, now)
        if there is not None:
            raise Conflict(
                f"a node called {name} is in the cluster already",
                hint=f"give this runner another name, or first: kohaku node remove {name}",
            )
        for other in self.nodes.values():
            if other.record.credential == credential:
                raise Conflict(
                    f"this runner's credential is that of node {other.name}",
                    hint="a copied machine needs its own: remove its copy of the runner's data",
                )
        record = NodeRecord(name=name, credential=credential, joined_at=now, labels=labels)
        token = replace(token, uses_left=token.uses_left - 1)
        self.join_tokens[token_digest] = token
        return self._add(record, now), token

    def online(self, node: FleetNode, inventory: Inventory, now: float) -> None:
        """A runner has registered."""
        node.record = replace(node.record, inventory=inventory)
        node.state = NodeState.ONLINE
        node.seen_at = now
        node.unwanted.clear()
        # Faults stay until the next heartbeat: a new link repairs no GPU.
        node.site.books.refit(inventory)
        node.close_or_open()

    def offline(self, node: FleetNode, now: float) -> None:
        """A runner has gone, or fallen silent."""
        node.state = NodeState.OFFLINE
        node.offline_since = now
        node.readings = None
        node.close_or_open()

    def set_clock(self, by_s: float, now: float) -> None:
        """Carry what was measured over to a clock that was set ``by_s`` seconds ahead, or back.

        Else a node that was heard a moment ago would count as silent for hours, or one that
        has gone would not for as long. ``now`` is by the new clock. What was measured by that
        already shows by its sense: after a step ahead, being later than now when carried over;
        after one back, not being later than now as it is.
        """
        for node in self.nodes.values():
            node.seen_at = _carry(node.seen_at, by_s, now)
            node.offline_since = _carry(node.offline_since, by_s, now)

    def drop_old_tokens(self, now: float) -> list[str]:
        """Forget join tokens that have expired long ago; give their digests.

        Until then whoever tries one is told what is wrong with it.
        """
        gone = [
            digest
            for digest, token in self.join_tokens.items()
            if token.expires_at + _REMEMBER_TOKENS_S <= now
        ]
        for digest in gone:
            del self.join_tokens[digest]
        return gone

    def _add(self, record: NodeRecord, now: float) -> FleetNode:
        node = FleetNode(record, Site(record.name, labels=record.labels), offline_since=now)
        node.site.books.refit(record.inventory)
        for remnant in record.remnants:
            node.site.books.restore_remnant(remnant.task, remnant.attempt, remnant.claim)
        node.close_or_open()
        self.nodes[record.name] = node
        return node

    def _usable_token(self, digest: str, name: NodeName, now: float) -> JoinTokenRecord:
        hint = "make a new one with: kohaku node join-token"
        token = self.join_tokens.get(digest)
        if token is None:
            raise Unauthenticated("the join token is not known here", hint=hint)
        if token.uses_left <= 0:
            raise Unauthenticated(f"the join token {token.prefix}... is used up", hint=hint)
        if token.expires_at <= now:
            raise Unauthenticated(f"the join token {token.prefix}... has expired", hint=hint)
        if token.node and token.node != name:
            raise Unauthenticated(
                f"the join token {token.prefix}... is for node {token.node}, not {name}", hint=hint
            )
        return token

    def _hint(self, name: str) -> str:
        if not self.nodes:
            return "no node has joined yet; let one in with: kohaku node join-token"
        # To compare a name of 200,000 characters takes 13 ms: no node has such a one.
        near = difflib.get_close_matches(name[:200], self.nodes, n=1)
        if near:
            return f"did you mean {near[0]}? all nodes: kohaku node list"
        return "see all nodes with: kohaku node list"


def _carry(at: float, by_s: float, now: float) -> float:
    if not at or (by_s < 0 and at <= now):
        return at
    return min(at + by_s, now)
