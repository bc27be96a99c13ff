"""Ids are unique and only grow, whatever the clock does and however many are asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.snowflake import (
    EPOCH_S,
    INSTANCES,
    PER_MILLISECOND,
    SnowflakeParts,
    SnowflakeSource,
    created_at,
    pack_snowflake,
    unpack_snowflake,
)

NOW = 1_760_000_000.0

parts = st.builds(
    SnowflakeParts,
    st.integers(0, 2**41 - 1),
    st.integers(0, INSTANCES - 1),
    st.integers(0, PER_MILLISECOND - 1),
)


def ids_of(runs: list[tuple[int, int]]) -> list[int]:
    return [number for first, count in runs for number in range(first, first + count)]


def test_the_layout_is_the_documented_one() -> None:
    number = pack_snowflake(SnowflakeParts(1, 2, 3))
    assert number == 0b1_0000000010_000000000011
    assert pack_snowflake(SnowflakeParts(2**41 - 1, 1023, 4095)) == 2**63 - 1
    assert created_at(number) == EPOCH_S + 0.001


@given(parts)
def test_an_id_comes_apart_as_it_was_made(made: SnowflakeParts) -> None:
    assert unpack_snowflake(pack_snowflake(made)) == made


@given(parts, parts)
def test_ids_sort_by_time(one: SnowflakeParts, other: SnowflakeParts) -> None:
    assert (pack_snowflake(one) < pack_snowflake(other)) == (one < other)


@pytest.mark.parametrize("made", [(2**41, 0, 0), (-1, 0, 0), (0, INSTANCES, 0), (0, 0, 4096)])
def test_a_part_that_does_not_fit_is_refused(made: tuple[int, int, int]) -> None:
    with pytest.raises(OverflowError):
        pack_snowflake(SnowflakeParts(*made))


def test_an_instance_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError):
        SnowflakeSource(INSTANCES)


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.floats(-5.0, 5.0)), max_size=20),
    st.integers(0, INSTANCES - 1),
    st.none() | parts,
)
def test_ids_only_grow(
    steps: list[tuple[int, float]], instance: int, before: SnowflakeParts | None
) -> None:
    last = 0 if before is None else pack_snowflake(before._replace(milliseconds=750_000_000_000))
    source, now = SnowflakeSource(instance, last), NOW
    for count, drift_s in steps:
        now += drift_s
        numbers = ids_of(source.take(count, now))
        assert len(numbers) == count
        assert all(a < b for a, b in zip([last, *numbers], numbers, strict=False))
        assert all(unpack_snowflake(number).instance == instance for number in numbers)
        last = max([last, *numbers])


def test_a_great_batch_borrows_the_milliseconds_after_it_and_takes_few_runs() -> None:
    source = SnowflakeSource(7)
    runs = source.take(100_000, NOW)
    assert [count for _, count in runs] == [4096] * 24 + [1696]
    assert created_at(runs[0][0]) == NOW
    ((following, _),) = source.take(1, NOW + 0.001)
    assert following == runs[-1][0] + 1696


def test_time_passes_into_ids() -> None:
    source = SnowflakeSource(0)
    source.take(3, NOW)
    ((first, count),) = source.take(2, NOW + 1)
    assert (created_at(first), unpack_snowflake(first).sequence, count) == (NOW + 1, 0, 2)


def test_a_clock_before_2025_still_gives_valid_ids() -> None:
    ((first, _),) = SnowflakeSource(0).take(1, 0.0)
    assert first > 0
