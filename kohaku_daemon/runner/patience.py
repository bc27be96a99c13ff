"""Waits for backends that are away: longer from time to time, and no longer once one is back.

Knows: how long between two tries, who waits at present.
Does not know: for what.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

#: Seconds between two tries: the first, and the longest.
FIRST_S: Final = 0.5
LONGEST_S: Final = 30.0


class Patience:
    """What those share who wait for a backend."""

    def __init__(self) -> None:
        #: Set and replaced when a backend is back.
        self._back = asyncio.Event()
        self._waiting: set[asyncio.Task[object]] = set()
        self._is_over = False

    def hurry(self) -> None:
        """Let all who wait try now: a backend is back."""
        before, self._back = self._back, asyncio.Event()
        before.set()

    def end(self) -> None:
        """Cancel all jobs that wait, and those that come to: a runner that stops has no time."""
        self._is_over = True
        for job in self._waiting:
            job.cancel()

    async def wait(self, tries: int) -> None:
        """Wait for the next try, after so many that failed."""
        job = asyncio.current_task()
        assert job is not None, "only jobs wait"
        if self._is_over:
            raise asyncio.CancelledError
        self._waiting.add(job)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(FIRST_S * 2 ** min(tries - 1, 16), LONGEST_S)):
                    await self._back.wait()
        finally:
            self._waiting.discard(job)
