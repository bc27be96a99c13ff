"""How long to wait before the next try, given a random number. Pure.

Full jitter: a random share of an exponentially growing bound, so that many who lost the same
host do not come back together (Amazon's "Exponential backoff and jitter", 2015).
"""

from __future__ import annotations

from typing import Final

#: Seconds: bound of the first wait.
FIRST_S: Final = 0.2
#: Seconds: no wait is longer.
LONGEST_S: Final = 15.0


def delay_s(
    attempt: int, share: float, *, first_s: float = FIRST_S, longest_s: float = LONGEST_S
) -> float:
    """Give the seconds to wait after failed try number ``attempt``, from 0.

    ``share`` is a random number from 0 to 1.
    """
    doublings = min(attempt, 32)  # far past any bound, and 2.0**attempt stays a number
    return share * min(longest_s, first_s * 2.0**doublings)
