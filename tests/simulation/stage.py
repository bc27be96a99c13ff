"""Virtual time, seeded chance, and the story of what happened.

Everything of a simulated cluster happens in calls of ``run``: one thing at a time, in an
order that the seed decides and nothing else. The same seed tells the same story, in every
process.

Knows: the true time and who is next.
Does not know: clusters. What clocks on the machines show is told by ``Clock``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Final

from tests.support.builders import NOW

#: What chance is drawn for, each from a source of its own: leaving one fault out of a plan
#: then changes little else, and a failure can be shrunk.
_STREAM: Final = 1_000_003


class BrokenPromise(AssertionError):
    """The simulation found that something promised is not so.

    ``rule`` names which promise, the same for every seed that breaks it in this way.
    """

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def promise(holds: object, rule: str, text: str, *facts: object) -> None:
    """Check one promise; the text is put together only if it is broken.

    Raises:
        BrokenPromise: It does not hold.
    """
    if not holds:
        raise BrokenPromise(rule, text.format(*facts))


class Stage:
    """Where a cluster is played."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        #: UTC seconds, true ones.
        self.now = NOW
        self._story: list[tuple[float, str, tuple[object, ...]]] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._streams = 0

    def chance(self) -> Random:
        """Make a source of chance. Called in the same order in every run of a seed."""
        self._streams += 1
        return Random(self.seed * _STREAM + self._streams)

    def tell(self, line: str, *facts: object) -> None:
        """Note what happened; ``facts`` must not change later, and fill the braces of ``line``."""
        self._story.append((self.now, line, facts))

    def story(self, render: Callable[[object], str] = str) -> list[str]:
        """Give what happened so far in words."""
        return [
            f"{at - NOW:9.3f}  {line.format(*map(render, facts))}"
            for at, line, facts in self._story
        ]

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Let something happen later."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._count, act))

    def at(self, moment: float, act: Callable[[], None]) -> None:
        """Let something happen so many seconds after the beginning."""
        self.after(NOW + moment - self.now, act)

    def run(self, until: float, *, done: Callable[[], bool] | None = None) -> bool:
        """Let things happen until so many seconds after the beginning, or until all is done."""
        queue, end = self._queue, NOW + until
        while queue and queue[0][0] <= end:
            if done is not None and done():
                return True
            self.now, _, act = heapq.heappop(queue)
            act()
        self.now = end
        return done is not None and done()


class Clock:
    """What one machine believes the time to be: off by some, and sometimes by something else."""

    def __init__(self, stage: Stage, off_s: float = 0.0) -> None:
        self.off_s = off_s
        self._stage = stage

    def now(self) -> float:
        """UTC seconds, by this machine."""
        return self._stage.now + self.off_s
