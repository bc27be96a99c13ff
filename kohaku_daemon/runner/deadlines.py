"""Deadlines of launches, by a clock that nobody sets.

Knows: when each passes. Does not know: what follows from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kohaku_daemon.core.node.events import DeadlinePassed


class Deadlines:
    """At most one of each launch."""

    def __init__(self, post: Callable[[DeadlinePassed], None]) -> None:
        self._post = post
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def set(self, key: str, in_s: float | None) -> None:
        """Have it passed ``in_s`` seconds from now, or never for None; an earlier one is void."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if in_s is not None:
            loop = asyncio.get_running_loop()
            self._timers[key] = loop.call_later(in_s, self._pass, key)

    def clear(self) -> None:
        """Let none pass any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _pass(self, key: str) -> None:
        del self._timers[key]
        self._post(DeadlinePassed(key))
