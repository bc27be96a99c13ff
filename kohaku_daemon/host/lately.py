"""How many tasks ended lately, by state, kept up to date: the status asks for it.

Knows: ends, minute by minute, as far back as the status looks.
Does not know: the store; it is told what that has when the host starts, and every end after.
Counting them in the store takes 20 ms for 100,000, on the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from protocol.models.task import TaskState

#: Seconds back that ended tasks are counted, to the minute.
LATELY_S: Final = 3600.0
MINUTE_S: Final = 60


class Lately:
    """Ends of the last hour."""

    def __init__(self, ended: Iterable[tuple[int, TaskState, int]] = ()) -> None:
        """``ended``: minutes since 1970, a state, how many ended so in that minute."""
        self._minutes: dict[int, Counter[TaskState]] = {}
        for minute, state, count in ended:
            self._minutes.setdefault(minute, Counter())[state] += count

    def add(self, state: TaskState, ended_at: float) -> None:
        """Note that a task ended (UTC seconds)."""
        minute = int(ended_at) // MINUTE_S
        counts = self._minutes.get(minute)
        if counts is None:
            counts = self._minutes[minute] = Counter()
        counts[state] += 1

    def counts(self, now: float) -> dict[TaskState, int]:
        """Count by state what ended within the last hour before ``now`` (UTC seconds)."""
        first = int(now - LATELY_S) // MINUTE_S
        for minute in [minute for minute in self._minutes if minute < first]:
            del self._minutes[minute]
        total = Counter[TaskState]()
        for counts in self._minutes.values():
            total.update(counts)
        return dict(total)
