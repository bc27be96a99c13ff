"""What the shell offers when Tab is pressed on a name or an id.

Knows: which names are worth offering, and how long a person waits for Tab.
Does not know: shells; Typer does.

It is quick, silent and fails closed: whatever goes wrong, nothing is offered and nothing is
printed, for a message in the middle of a half-typed line helps nobody.

It is a door, too. Typer's script for zsh evaluates what is offered, and its quoting lets a
backslash before ``$(`` through (0.28 and 0.29): the name of somebody's task would run as a
command in the shell of whoever pressed Tab. So only letters that no shell knows get out.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final

import typer

from kohaku_tui.cli.reach import AGENT

if TYPE_CHECKING:
    from protocol.client import Cluster

#: Seconds after which Tab gives up.
PATIENCE_S: Final = 1.0
#: How many ids are offered: more cannot be chosen from by eye.
_MOST_IDS: Final = 50

#: What a value may be made of, and what a description is reduced to.
_SAFE_VALUE: Final = re.compile(r"[A-Za-z0-9_.:-]+")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_., =/%+-]+")

#: A value and the few words shown beside it.
Offer = tuple[str, str]


def complete_nodes(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the names of nodes."""
    from kohaku_tui.format import node_state

    async def look(cluster: Cluster) -> list[Offer]:
        return [(node.name, node_state(node)) for node in await cluster.nodes()]

    return _offer(ctx, incomplete, look)


def complete_tasks(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the ids of the newest tasks."""
    from kohaku_tui.format import task_state, task_title

    async def look(cluster: Cluster) -> list[Offer]:
        newest = cluster.tasks(most=_MOST_IDS)
        return [(str(task.id), f"{task_state(task)} {task_title(task)}") async for task in newest]

    return _offer(ctx, incomplete, look)


def complete_batches(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the ids of the newest batches."""
    from kohaku_tui.format import counts_text
    from protocol.messages.task import ListBatches
    from protocol.methods import BATCH_LIST

    async def look(cluster: Cluster) -> list[Offer]:
        answer = await cluster.call(BATCH_LIST, ListBatches(limit=_MOST_IDS))
        return [(str(batch.id), counts_text(batch.states)) for batch in answer.batches]

    return _offer(ctx, incomplete, look)


def complete_environments(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the names of environments."""

    async def look(cluster: Cluster) -> list[Offer]:
        return [
            (one.name, f"{one.state} from {one.source}") for one in await cluster.environments()
        ]

    return _offer(ctx, incomplete, look)


def complete_contexts(incomplete: str) -> list[Offer]:
    """Offer the names of saved contexts."""
    try:
        from protocol.contexts import load

        return _choose([(saved.name, saved.url) for saved in load().contexts], incomplete)
    except Exception:
        return []


def complete_methods(incomplete: str) -> list[Offer]:
    """Offer the methods of the protocol."""
    from protocol.methods import METHODS, Door

    callable_here = (method for method in METHODS.values() if method.door is not Door.RUNNER)
    return _choose([(method.name, method.summary) for method in callable_here], incomplete)


def _offer(
    ctx: typer.Context, incomplete: str, look: Callable[[Cluster], Awaitable[list[Offer]]]
) -> list[Offer]:
    try:
        offers = _look_quickly(ctx.params.get("context") or "", look)
    except Exception:
        return []
    return _choose(offers, incomplete)


def _choose(offers: Iterable[Offer], incomplete: str) -> list[Offer]:
    """Give the offers that begin so, made of harmless letters only."""
    return [
        (value, " ".join(_UNSAFE.sub(" ", told).split()))
        for value, told in offers
        if value.startswith(incomplete) and _SAFE_VALUE.fullmatch(value)
    ]


def _look_quickly(context: str, look: Callable[[Cluster], Awaitable[list[Offer]]]) -> list[Offer]:
    import asyncio

    from protocol.client import connect

    async def visit() -> list[Offer]:
        async with (
            asyncio.timeout(PATIENCE_S),
            connect(context=context or None, agent=AGENT, patience_s=0.0) as cluster,
        ):
            return await look(cluster)

    return asyncio.run(visit())
