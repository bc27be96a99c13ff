"""Snowflake ids: 64 bits, ordered by time, unique without coordination.

From the top: one zero bit, 41 bits of milliseconds since 2025-01-01T00:00:00Z (until the year
2094), 10 bits of instance, 12 bits of sequence. Pure: the time is given, never read.
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: UTC seconds since 1970 of 2025-01-01T00:00:00Z.
EPOCH_S: Final = 1_735_689_600
#: Ids of one instance in one millisecond.
PER_MILLISECOND: Final = 4096
#: How many instances can make ids at the same time.
INSTANCES: Final = 1024
_LAST_MILLISECOND: Final = 2**41 - 1


class SnowflakeParts(NamedTuple):
    """What an id is made of."""

    milliseconds: int
    instance: int
    sequence: int


def pack_snowflake(parts: SnowflakeParts) -> int:
    """Make an id.

    Raises:
        OverflowError: A part does not fit its bits.
    """
    milliseconds, instance, sequence = parts
    if not 0 <= milliseconds <= _LAST_MILLISECOND:
        raise OverflowError(f"{milliseconds} ms since 2025 is not between 2025 and 2094")
    if not 0 <= instance < INSTANCES or not 0 <= sequence < PER_MILLISECOND:
        raise OverflowError(f"instance {instance} or sequence {sequence} has too many bits")
    return milliseconds << 22 | instance << 12 | sequence


def unpack_snowflake(number: int) -> SnowflakeParts:
    """Take an id apart."""
    return SnowflakeParts(number >> 22, number >> 12 & 0x3FF, number & 0xFFF)


def created_at(number: int) -> float:
    """Give the UTC seconds since 1970 when an id was made, to the millisecond."""
    return EPOCH_S + (number >> 22) / 1000


class SnowflakeSource:
    """Makes the ids of one instance: each larger than all before it, whatever the clock does."""

    def __init__(self, instance: int, last: int = 0) -> None:
        """``last`` is the largest id that was ever made here, from the store."""
        pack_snowflake(SnowflakeParts(0, instance, 0))
        self._instance = instance
        parts = unpack_snowflake(last)
        # Another instance's id may be larger in the same millisecond: leave that one behind.
        used_up = parts.instance != instance and last > 0
        self._milliseconds = parts.milliseconds
        self._sequence = PER_MILLISECOND if used_up else parts.sequence + 1

    def take(self, count: int, now_s: float) -> list[tuple[int, int]]:
        """Make ``count`` ids, as runs of consecutive numbers: (first, how many).

        A batch larger than a millisecond holds borrows the next ones; ids made later go on
        from there, so the time in an id may be ahead by count / 4096 milliseconds.

        Raises:
            OverflowError: The time is past 2094.
        """
        now_ms = max(int((now_s - EPOCH_S) * 1000), 1)
        if now_ms > self._milliseconds:
            self._milliseconds, self._sequence = now_ms, 0
        runs: list[tuple[int, int]] = []
        while count > 0:
            if self._sequence >= PER_MILLISECOND:
                self._milliseconds, self._sequence = self._milliseconds + 1, 0
            length = min(count, PER_MILLISECOND - self._sequence)
            parts = SnowflakeParts(self._milliseconds, self._instance, self._sequence)
            runs.append((pack_snowflake(parts), length))
            self._sequence += length
            count -= length
        return runs
