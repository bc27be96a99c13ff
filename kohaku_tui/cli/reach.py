"""From a command to the cluster and back.

Knows: that a command is one coroutine over one connection.
Does not know: where contexts are kept, how the client connects.

The client and asyncio are loaded here and not before: ``--help``, ``--version`` and usage
errors need neither.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from protocol.client import Cluster

T = TypeVar("T")

#: What the host's log calls us.
AGENT: Final = "kohaku"


def ask_cluster(context: str, work: Callable[[Cluster], Awaitable[T]]) -> T:
    """Run ``work`` over a connection to the context's host and give what it gives.

    An empty ``context`` is the current one, or what KOHAKU_HOST and KOHAKU_TOKEN say.

    Raises:
        Unavailable: No host is known, or it cannot be reached.
        Unauthenticated: The host does not take the token.
    """
    from protocol.client import connect

    return _visit(connect(context=context or None, agent=AGENT), work)


def ask_host(url: str, token: str, work: Callable[[Cluster], Awaitable[T]]) -> T:
    """Run ``work`` over a connection to a host that no context names yet. Raises as above."""
    from protocol.client import connect

    return _visit(connect(url, token, agent=AGENT), work)


def _visit(unconnected: Cluster, work: Callable[[Cluster], Awaitable[T]]) -> T:
    import asyncio

    async def visit() -> T:
        async with unconnected as cluster:
            return await work(cluster)

    return asyncio.run(visit())
