"""Nodes: reading, steering, letting new ones in."""

from __future__ import annotations

import secrets
from typing import cast

from kohaku_daemon.core.access.tokens import TokenKind, make_token, token_digest, token_prefix
from kohaku_daemon.core.cluster.events import DrainAsked, JoinTokenAsked, LabelAsked, RemoveAsked
from kohaku_daemon.host.handlers.rows import fit
from kohaku_daemon.host.parts import Call
from protocol.messages.node import (
    JoinToken,
    LabelNode,
    ListNodes,
    MakeJoinToken,
    NodeList,
    NodeResult,
    OneNode,
    RemoveNode,
)
from protocol.models.node import Node


async def list_nodes(call: Call, params: ListNodes) -> NodeList:
    """Give a page of nodes."""
    nodes = call.parts.state.fleet.nodes
    rows = await call.parts.loop.read(
        lambda: [nodes[name].view() for name in sorted(nodes) if name > params.after]
    )
    count = fit(rows)
    return NodeList(tuple(rows[:count]), more=count < len(rows))


async def show(call: Call, params: OneNode) -> NodeResult:
    """Give one node."""
    fleet = call.parts.state.fleet
    return NodeResult(await call.parts.loop.read(lambda: fleet.find(params.node).view()))


async def drain(call: Call, params: OneNode) -> NodeResult:
    """Let a node finish and give it nothing new."""
    return NodeResult(
        cast("Node", await call.ask(DrainAsked(call.actor, params.node, draining=True)))
    )


async def undrain(call: Call, params: OneNode) -> NodeResult:
    """Give a node work again."""
    return NodeResult(
        cast("Node", await call.ask(DrainAsked(call.actor, params.node, draining=False)))
    )


async def label(call: Call, params: LabelNode) -> NodeResult:
    """Set and unset labels."""
    event = LabelAsked(call.actor, params.node, params.set, params.unset)
    return NodeResult(cast("Node", await call.ask(event)))


async def remove(call: Call, params: RemoveNode) -> NodeResult:
    """Take a node out of the cluster."""
    event = RemoveAsked(call.actor, params.node, params.force)
    return NodeResult(cast("Node", await call.ask(event)))


async def join_token(call: Call, params: MakeJoinToken) -> JoinToken:
    """Make a token that lets runners join."""
    token = make_token(TokenKind.JOIN, secrets.token_bytes(32))
    event = JoinTokenAsked(
        call.actor,
        digest=token_digest(token),
        prefix=token_prefix(token),
        uses=params.uses,
        lasts_s=params.lasts_s,
        node=params.node,
    )
    expires_at = cast("float", await call.ask(event))
    return JoinToken(token, expires_at, params.uses)
