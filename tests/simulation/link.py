"""A connection between a runner and the host: in order, late, sometimes twice, until it is cut.

Every message is encoded and decoded on its way, as by the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec

from protocol.ids import NodeName
from protocol.messages.runner import Orders, Register, Registered, Report, Reported
from protocol.models.node import Readings
from tests.simulation.stage import Stage

Message = Register | Registered | Report | Reported | Orders | Readings
#: Given the link, the message, and the number of the call it makes or answers.
Receive = Callable[["Link", Message, int], None]


class Link:
    """One connection, as both its ends and the network between them see it."""

    def __init__(self, stage: Stage, node: NodeName, on_host: Receive, on_runner: Receive) -> None:
        self.node = node
        self.is_cut = False
        #: Called once at each end, a while after the cut.
        self.on_cut: list[Callable[[Link], None]] = []
        self._stage = stage
        self._ends = {"host": on_host, "runner": on_runner}
        self._last = {"host": 0.0, "runner": 0.0}

    def send(self, to: str, message: Message, call: int = 0) -> None:
        """Send to ``host`` or ``runner``."""
        if self.is_cut:
            return
        data = msgspec.msgpack.encode(message)
        stage = self._stage
        for _ in range(2 if stage.chance(0.02) else 1):
            delay_s = stage.random.uniform(0.001, 0.05)
            if stage.chance(0.02):
                delay_s += stage.random.choice([1.0, 5.0, 15.0, 45.0])
            at = max(self._last[to] + 1e-6, stage.now + delay_s)
            self._last[to] = at
            stage.after(at - stage.now, lambda: self._arrive(to, data, type(message), call))

    def cut(self, why: str) -> None:
        """Break it. What is on its way is lost; each end notices after a while."""
        if self.is_cut:
            return
        self.is_cut = True
        self._stage.tell(f"link of {self.node} cut: {why}")
        for notice in self.on_cut:
            delay_s = self._stage.random.choice([0.001, 0.1, 3.0])
            self._stage.after(delay_s, partial(notice, self))

    def _arrive(self, to: str, data: bytes, kind: type[Message], call: int) -> None:
        if not self.is_cut:
            self._ends[to](self, msgspec.msgpack.decode(data, type=kind), call)
