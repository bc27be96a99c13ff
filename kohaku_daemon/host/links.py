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

import msgspec

from kohaku_daemon.wire import ItemSink, Served
from protocol.ids import NodeName
from protocol.messages.runner import Order

#: Orders in one group, and bytes of a group of more than one: it has to fit into a frame of
#: 256 KiB, and is small enough that a link is not busy with it for long.
_GROUP: Final = 128
_GROUP_BYTES: Final = 64 * 1024

_encode: Final = msgspec.msgpack.Encoder().encode


class _WrittenOrders(msgspec.Struct):
    """An ``Orders`` whose orders are written already."""

    orders: list[msgspec.Raw]


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
            await sink.send(_WrittenOrders(self._take_group()))
            if not self._orders:
                self._more.clear()

    def _take_group(self) -> list[msgspec.Raw]:
        group: list[msgspec.Raw] = []
        left = _GROUP_BYTES
        while self._orders and len(group) < _GROUP:
            written = _encode(self._orders[0])
            left -= len(written)
            if group and left < 0:
                break
            self._orders.popleft()
            group.append(msgspec.Raw(written))
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
