"""The frame of every measurement: interleaved rounds, medians of ratios, one table.

A figure alone says little on a shared machine. Each row measures ours and a baseline in turn
(A B A B), takes the ratio of each round, and shows the median of the ratios with their range.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    #: What is measured, in words.
    what: str
    unit: str
    ours: list[float]
    #: What the baseline is; empty for a figure that stands alone.
    baseline: str = ""
    theirs: list[float] = field(default_factory=list)
    #: What we want of the median ratio, or of the median figure without baseline.
    goal: str = ""

    @property
    def ratios(self) -> list[float]:
        """Ours to theirs, round by round."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def facts(self) -> dict[str, Any]:
        """Give the row for ``--json``."""
        facts: dict[str, Any] = {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "median": statistics.median(self.ours),
            "rounds": self.ours,
            "goal": self.goal,
        }
        if self.theirs:
            facts |= {
                "baseline": self.baseline,
                "baseline_median": statistics.median(self.theirs),
                "ratio": statistics.median(self.ratios),
                "ratio_low": min(self.ratios),
                "ratio_high": max(self.ratios),
            }
        return facts


def interleave(
    rounds: int, ours: Callable[[], float], theirs: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Measure both in turn, after one round that only warms up."""
    ours()
    theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def render(rows: list[Row]) -> str:
    """Write the table."""
    lines = [("ROW", "OURS", "BASELINE", "RATIO", "RANGE", "GOAL")]
    for row in rows:
        facts = row.facts()
        ours = f"{_short(facts['median'])} {row.unit}"
        if row.theirs:
            theirs = f"{_short(facts['baseline_median'])} {row.unit}, {row.baseline}"
            spread = f"{facts['ratio_low']:.2f} to {facts['ratio_high']:.2f}"
            lines.append((row.what, ours, theirs, f"{facts['ratio']:.2f}", spread, row.goal))
        else:
            spread = f"{_short(min(row.ours))} to {_short(max(row.ours))}"
            lines.append((row.what, ours, "", "", spread, row.goal))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
