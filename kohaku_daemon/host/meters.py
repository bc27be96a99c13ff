"""What the host counts while it works, for whoever asks how it is doing.

Knows: histograms of how long things took, in the form that Prometheus reads.
Does not know: what is measured where; whoever does the work says how long it took.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

_BUCKETS_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0,
)  # fmt: skip


class Durations:
    """How long something took, each time."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS_S) + 1)
        #: Seconds, all together.
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        spot = next((i for i, top in enumerate(_BUCKETS_S) if seconds <= top), len(_BUCKETS_S))
        self._counts[spot] += 1
        self.total_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Give cumulative counts by upper bound, as Prometheus wants them."""
        total = 0
        out: list[tuple[str, float]] = []
        for top, count in zip((*map(str, _BUCKETS_S), "+Inf"), self._counts, strict=True):
            total += count
            out.append((top, total))
        return out


@dataclass(slots=True)
class Meters:
    """What the loop counts."""

    commits: Durations = field(default_factory=Durations)
    placements: Durations = field(default_factory=Durations)
    #: Rows of tasks written.
    task_rows: int = 0

    def committed(self, seconds: float, tasks: int) -> None:
        """Count one commit of so many rows of tasks."""
        self.commits.observe(seconds)
        self.task_rows += tasks
