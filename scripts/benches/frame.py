"""The frame of every measurement: rows, goals, interleaved rounds, the document.

A figure alone says little on a shared machine. Where a baseline makes sense, a row measures
ours and the baseline in turn (A B A B), takes the ratio of each round, and shows the median of
the ratios with their range. Knows: what a row says and whether its goal is reached. Does not
know: what is measured, how it is drawn (``table``).
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

#: Unit of a goal that is about the ratio to the baseline.
TIMES: Final = "x"
_GOAL: Final = re.compile(r"(<=|>=) ([\d.,]+) (\S+)")


class NotMeasured(Exception):
    """A row cannot be measured on this machine; the text says why and what would help."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row should reach, as ``>= 10 x`` (the ratio) or ``<= 60 us`` (the figure)."""

    text: str
    at_most: bool
    value: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read a goal.

        Raises:
            ValueError: It is none.
        """
        found = _GOAL.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no goal; write it as '<= 60 us' or '>= 10 x'")
        return cls(text, found[1] == "<=", float(found[2].replace(",", "")), found[3])

    def is_reached(self, value: float) -> bool:
        """Say whether a median is good enough."""
        return value <= self.value if self.at_most else value >= self.value


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    #: Stable, unique, ``GROUP`` or ``GROUP.DETAIL``.
    name: str
    #: What is measured, in words.
    what: str
    unit: str
    #: A figure of each round.
    ours: Sequence[float]
    #: What the baseline is; empty for a figure that stands alone.
    baseline: str = ""
    theirs: Sequence[float] = ()
    #: As ``Goal.parse`` reads it; empty for a figure that only informs.
    goal: str = ""
    #: What a reader must know to judge the figure, or why there is none.
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a row that contradicts itself.

        Raises:
            ValueError: Its goal is none, or is about something the row does not have.
        """
        if self.theirs and len(self.theirs) != len(self.ours):
            raise ValueError(f"{self.name}: {len(self.ours)} rounds and {len(self.theirs)} theirs")
        if self.goal and Goal.parse(self.goal).unit not in (TIMES, self.unit):
            raise ValueError(f"{self.name} is in {self.unit}, its goal is {self.goal}")

    @property
    def ratios(self) -> list[float]:
        """Ours to theirs, round by round; none without a baseline."""
        if not self.theirs:
            return []
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def verdict(self) -> str:
        """``reached``, ``missed``, ``not measured``, or empty where there is no goal."""
        if not self.ours:
            return "not measured"
        if not self.goal:
            return ""
        goal = Goal.parse(self.goal)
        values = self.ratios if goal.unit == TIMES else self.ours
        if not values:
            return "not measured"
        return "reached" if goal.is_reached(statistics.median(values)) else "missed"

    def facts(self) -> dict[str, Any]:
        """Give the row for ``--json``; the names are stable."""
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "figure": _summary(self.ours),
            "baseline": {"what": self.baseline, **_summary(self.theirs)} if self.theirs else None,
            "ratio": _summary(self.ratios) if self.theirs else None,
            "goal": self.goal or None,
            "verdict": self.verdict or None,
            "note": self.note or None,
        }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"median": None, "low": None, "high": None, "rounds": []}
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "rounds": list(values),
    }


#: Measures so many rounds and gives its rows.
Measure = Callable[[int], list[Row]]


def begin_rounds(rounds: int, *, warm_up: bool) -> Iterator[int]:
    """Give the number of each round, and say on stderr that it begins: some take a minute.

    Counted from 1; 0 is a round that only warms up and does not count.
    """
    for number in range(0 if warm_up else 1, rounds + 1):
        told = f"{number}/{rounds}" if number else "warming up"
        print(told, end=" ", file=sys.stderr, flush=True)
        yield number


def interleave(rounds: int, *measures: Callable[[], float] | None) -> list[list[float]]:
    """Measure all in turn, after one round that only warms up.

    Gives the figures of each, in the order of the measures; none for one that is None.
    """
    figures: list[list[float]] = [[] for _ in measures]
    for number in begin_rounds(rounds, warm_up=True):
        for measure, column in zip(measures, figures, strict=True):
            if measure is None:
                continue
            figure = measure()
            if number:
                column.append(figure)
    return figures


def percentile(samples: Sequence[float], share: float) -> float:
    """Give the smallest sample that ``share`` (0 to 1) of all do not exceed: nearest rank."""
    ordered = sorted(samples)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
