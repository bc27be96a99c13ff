"""Virtual time, one source of chance, and the story of what happened.

Everything of a simulated cluster happens in calls of ``run``: one thing at a time, in an
order that the seed decides and nothing else. The same seed tells the same story.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random

from tests.support.builders import NOW


class Stage:
    """Where a cluster is played."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = NOW
        self.story: list[str] = []
        #: While this is so, links break, messages dawdle and daemons die.
        self.rough = True
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def tell(self, line: str) -> None:
        """Note what happened, for whoever has to understand a failure."""
        self.story.append(f"{self.now - NOW:9.3f}  {line}")

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Let something happen later."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._count, act))

    def soon(self, act: Callable[[], None]) -> None:
        """Let something happen after a moment of chance."""
        self.after(self.random.uniform(0.0001, 0.05), act)

    def chance(self, of: float) -> bool:
        """Say whether something bad happens now: never once all is quiet."""
        return self.rough and self.random.random() < of

    def run(self, until: float, *, done: Callable[[], bool] = lambda: False) -> None:
        """Let things happen until a time, or until all is done."""
        while self._queue and self._queue[0][0] <= until and not done():
            self.now, _, act = heapq.heappop(self._queue)
            act()
        if not done():
            self.now = until
