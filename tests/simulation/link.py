"""A connection between a runner and the host: each way in order, late, until it is cut.

Every message is encoded and decoded on its way, as by the wire. Within one connection nothing
overtakes anything, as TCP has it; a connection that was cut may still deliver what was on its
way, long after the next one was opened.

Knows: the two ends and the network between them.
Does not know: what is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import msgspec

from protocol.errors import ErrorBody
from protocol.ids import NodeName
from protocol.messages.runner import (
    HeartbeatTaken,
    Join,
    Joined,
    Orders,
    Register,
    Registered,
    Report,
    Reported,
)
from protocol.models.node import Readings
from tests.simulation.stage import Stage

Message = (
    Join | Joined | Register | Registered | Report | Reported | Orders | Readings
    | HeartbeatTaken | ErrorBody
)  # fmt: skip
#: Given the link, the message, and the number of the call it makes or answers.
Receive = Callable[["Link", Message, int], None]

_encode: Final = msgspec.msgpack.Encoder().encode
_DECODERS: Final[dict[type[Any], msgspec.msgpack.Decoder[Any]]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (Join, Joined, Register, Registered, Report, Reported, Orders, Readings,
                 HeartbeatTaken, ErrorBody)
}  # fmt: skip
#: Kinds that the network may deliver twice in a row: repeating one changes nothing.
_REPEATABLE: Final = (Orders, Report)


@dataclass(slots=True)
class Weather:
    """How the way between one machine and the host is at present."""

    random: Random
    #: Added to each message, at most, by the end it goes to.
    slow_s: dict[str, float] = field(default_factory=lambda: {"host": 0.0, "runner": 0.0})
    repeats: bool = False
    #: Nothing can be dialled.
    apart: bool = False


class Link:
    """One connection."""

    def __init__(
        self, stage: Stage, node: NodeName, weather: Weather, ends: dict[str, Receive]
    ) -> None:
        self.node = node
        self.weather = weather
        #: Called once at each end when it notices the end of the connection.
        self.on_closed: dict[str, Callable[[Link], None]] = {}
        self._stage = stage
        self._ends = ends
        self._open = {"host": True, "runner": True}
        self._last = {"host": 0.0, "runner": 0.0}
        self._is_cut = False
        self._lost = False

    def send(self, to: str, message: Message, call: int = 0) -> None:
        """Send to ``host`` or ``runner``; from an end that is closed nothing goes out."""
        if self._is_cut or not self._open["runner" if to == "host" else "host"]:
            return
        kind = type(message)
        data = _encode(message)
        stage, weather = self._stage, self.weather
        times = 2 if weather.repeats and kind in _REPEATABLE else 1
        for _ in range(times):
            delay_s = 0.001 + 0.03 * weather.random.random()
            if weather.slow_s[to]:
                delay_s += weather.slow_s[to] * weather.random.random()
            at = max(self._last[to] + 1e-6, stage.now + delay_s)
            self._last[to] = at
            stage.after(at - stage.now, lambda: self._arrive(to, data, kind, call))

    def close(self, end: str, why: str) -> None:
        """End it at one end, which knows at once; the other learns of it after all that came."""
        if not self._open[end]:
            return
        self._open[end] = False
        other = "runner" if end == "host" else "host"
        if not self._is_cut:
            self._is_cut = True
            self._stage.tell("the link of {} is closed by the {}: {}", self.node, end, why)
            delay_s = max(self._last[other] - self._stage.now, 0.0) + 0.02
            self._stage.after(delay_s, lambda: self._notice(other))
        self.on_closed[end](self)

    def cut(self, why: str, notices_s: dict[str, float], *, loses: bool) -> None:
        """Break it. Each end notices after some time, and until then takes what still comes."""
        if self._is_cut:
            return
        self._is_cut, self._lost = True, loses
        self._stage.tell("the link of {} is cut: {}", self.node, why)
        for end, delay_s in notices_s.items():
            self._stage.after(delay_s, lambda end=end: self._notice(end))  # type: ignore[misc]

    def _notice(self, end: str) -> None:
        if self._open[end]:
            self._open[end] = False
            self.on_closed[end](self)

    def _arrive(self, to: str, data: bytes, kind: type[Any], call: int) -> None:
        if self._open[to] and not self._lost:
            self._ends[to](self, _DECODERS[kind].decode(data), call)
