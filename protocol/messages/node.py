"""Reading and steering nodes, and letting new ones in."""

from __future__ import annotations

import msgspec

from protocol.models.node import Node


class ListNodes(msgspec.Struct, frozen=True, omit_defaults=True):
    """A page of nodes, by name."""

    #: Only nodes whose names come after this one: the last name of the page before.
    after: str = ""


class NodeList(msgspec.Struct, frozen=True, omit_defaults=True):
    """A page of nodes, as many as one message holds."""

    nodes: tuple[Node, ...]
    more: bool = False


class OneNode(msgspec.Struct, frozen=True):
    """Names one node."""

    node: str


class RemoveNode(msgspec.Struct, frozen=True, omit_defaults=True):
    """Take a node out of the cluster and revoke its runner's credential."""

    node: str
    #: Also while tasks are on it; they end as ``killed`` in the books and are not followed up.
    force: bool = False


class LabelNode(msgspec.Struct, frozen=True, omit_defaults=True):
    """Set and unset labels."""

    node: str
    set: dict[str, str] = msgspec.field(default_factory=dict)
    unset: tuple[str, ...] = ()


class NodeResult(msgspec.Struct, frozen=True):
    """One node, as it is after the call."""

    node: Node


class MakeJoinToken(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Make a token that lets runners join."""

    #: How many runners may join with it.
    uses: int = 1
    #: Seconds it lasts, at most 30 days.
    lasts_s: float = 3600.0
    #: If set, only a runner of this name may use it.
    node: str = ""


class JoinToken(msgspec.Struct, frozen=True):
    """Shown once; the host keeps its digest only."""

    token: str
    expires_at: float
    uses: int
