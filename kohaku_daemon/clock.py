"""The time, as a part that tests can replace.

Knows: the machine's clocks. Does not know: what anybody does with the time. The core is
given the time with each event and never reads it.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a shell gets the time from."""

    def now(self) -> float:
        """Give UTC seconds since 1970. May jump when somebody sets the machine's clock."""

    def monotonic(self) -> float:
        """Give seconds that only ever grow, for deadlines. Their zero means nothing."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> float:
        """Give UTC seconds since 1970."""
        return time.time()  # noqa: TID251  the one place that reads it

    def monotonic(self) -> float:
        """Give seconds that only ever grow."""
        return time.monotonic()
