"""What the host's log is told of those it turns away: each address and reason once in a while.

Knows: whom the log was told of lately. Bounded twice over, because strangers cause it: who
tries again and again costs one line in ten minutes, and who tries from ever new addresses
costs no more lines than are remembered.
Does not know: why somebody is turned away. The audit log has what people with a token did.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from protocol.errors import KohakuError

_log = logging.getLogger(__name__)

#: Seconds in which the same reason is not told again of an address.
QUIET_S: Final = 600.0
#: Addresses and reasons that are remembered. While they are all recent, more are not told.
MOST: Final = 1000
#: Characters. Why somebody is refused may quote what they said, at any length.
_LONGEST: Final = 300


class Refusals:
    """Tells the log of refusals, and remembers that it did."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        """``monotonic`` gives seconds that only ever grow."""
        self._monotonic = monotonic
        #: When the log was told, oldest first.
        self._told: dict[tuple[str, str], float] = {}

    def note(self, address: str, reason: str, error: KohakuError) -> None:
        """Tell that somebody was refused.

        ``reason`` is one of few and ours: it may hold nothing that strangers can choose.
        """
        now = self._monotonic()
        self._forget(now)
        if (address, reason) in self._told or len(self._told) >= MOST:
            return
        self._told[address, reason] = now
        _log.warning("%s refused: %s", reason, error.message[:_LONGEST], extra={"address": address})

    def _forget(self, now: float) -> None:
        while self._told and now - self._told[oldest := next(iter(self._told))] >= QUIET_S:
            del self._told[oldest]
