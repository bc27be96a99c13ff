"""Delays grow to a bound and are spread over all of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.backoff import FIRST_S, LONGEST_S, delay_s


def test_the_bound_doubles_until_the_longest() -> None:
    bounds = [delay_s(attempt, 1.0, first_s=1.0, longest_s=10.0) for attempt in range(6)]
    assert bounds == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


@given(st.integers(0, 10**9), st.floats(0, 1))
def test_a_delay_is_its_share_of_the_bound(attempt: int, share: float) -> None:
    delay = delay_s(attempt, share)
    assert delay == share * delay_s(attempt, 1.0)
    assert 0 <= delay <= LONGEST_S
    assert delay_s(attempt, 1.0) >= FIRST_S
