"""The open links to runners: which node is there, and the orders on their way to it.

Knows: one link a node, orders in sequence and in groups, as fast as the runner takes them.
Does not know: what orders mean. An order for a node without a link is dropped: when its
runner registers again, the engine says anew what has to be done.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import msgspec

from kohaku_daemon.wire import ItemSink, Served
from protocol.errors import TooLarge
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
    #: Where orders go, while the runner takes them.
    _sink: ItemSink | None = None
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, *orders: Order) -> None:
        """Let orders go out as soon as the runner takes them."""
        self._orders.extend(orders)
        sink = self._sink
        if sink is not None and sink.is_ready and not self._more.is_set():
            with suppress(TooLarge):  # an order that fits no message ends the stream: see below
                self._send_group(sink)
        if self._orders:
            self._more.set()

    async def pass_orders(self, sink: ItemSink) -> None:
        """Send orders in groups until cancelled."""
        self._sink = sink
        try:
            while True:
                await self._more.wait()
                await sink.ready()
                self._send_group(sink)
                if not self._orders:
                    self._more.clear()
        finally:
            self._sink = None

    def _send_group(self, sink: ItemSink) -> None:
        group: list[msgspec.Raw] = []
        left = _GROUP_BYTES
        for order in islice(self._orders, _GROUP):
            written = _encode(order)
            left -= len(written)
            if group and left < 0:
                break
            group.append(msgspec.Raw(written))
        sink.send_now(_WrittenOrders(group))
        for _ in group:
            self._orders.popleft()


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
