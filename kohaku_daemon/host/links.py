"""The open links to runners: which node is there, and the orders on their way to it.

Knows: one link a node, orders in sequence and in groups, as fast as the runner takes them.
Does not know: what orders mean. An order for a node without a link is dropped: when its
runner registers again, the engine says anew what has to be done.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from kohaku_daemon.wire import ItemSink, Served
from protocol.ids import NodeName
from protocol.messages.runner import Order, Orders, OrderStart

#: Orders in one group, and characters of commands and variables in one: a group has to fit
#: into a frame of 256 KiB, and one order alone may have 160 KiB of them.
_GROUP: Final = 128
_GROUP_CHARACTERS: Final = 64 * 1024


@dataclass(slots=True, eq=False)
class RunnerLink:
    """One runner's connection."""

    node: NodeName
    served: Served
    #: Of that run of the runner, from ``runner.register``.
    instance: str = ""
    #: ``asyncio``'s clock, at the last sign of life.
    heard_at: float = 0.0
    _orders: deque[Order] = field(default_factory=deque)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, order: Order) -> None:
        """Let an order go out as soon as the runner takes it."""
        self._orders.append(order)
        self._more.set()

    async def pass_orders(self, sink: ItemSink) -> None:
        """Send orders in groups until cancelled."""
        while True:
            await self._more.wait()
            await sink.ready()
            await sink.send(Orders(tuple(self._take_group())))
            if not self._orders:
                self._more.clear()

    def _take_group(self) -> list[Order]:
        group: list[Order] = []
        characters = 0
        while self._orders and len(group) < _GROUP:
            characters += _weight(self._orders[0])
            if group and characters > _GROUP_CHARACTERS:
                break
            group.append(self._orders.popleft())
        return group


@dataclass(slots=True)
class Links:
    """All open links, by node."""

    _open: dict[NodeName, RunnerLink] = field(default_factory=dict)

    def get(self, node: NodeName) -> RunnerLink | None:
        """Give a node's link, if it is open."""
        return self._open.get(node)

    def put(self, link: RunnerLink) -> RunnerLink | None:
        """Take a link as its node's only one; give the one it replaces."""
        before = self._open.get(link.node)
        self._open[link.node] = link
        return before if before is not link else None

    def drop(self, link: RunnerLink) -> bool:
        """Let a link go; say whether it was still its node's."""
        if self._open.get(link.node) is not link:
            return False
        del self._open[link.node]
        return True

    def __len__(self) -> int:
        return len(self._open)


def _weight(order: Order) -> int:
    if not isinstance(order, OrderStart):
        return 64
    env = sum(len(key) + len(value) for key, value in order.spec.env.items())
    return 256 + env + sum(map(len, order.spec.command)) + 6 * len(order.claim.cores)
