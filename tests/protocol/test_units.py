"""Sizes and durations: what people write is read, what is written can be read again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadRequest
from protocol.units import parse_duration, parse_size, render_duration, render_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64M", 64_000_000),
        ("64m", 64_000_000),
        ("64MB", 64_000_000),
        ("64Mi", 64 * 2**20),
        ("64MiB", 64 * 2**20),
        ("1.5Gi", 3 * 2**29),
        ("0.5k", 500),
        (" 2 T ", 2 * 10**12),
        ("1Ti", 2**40),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5.2", "1P", "1e9", "1 0", "0x10", "1,5G", "1Mib/s", ".5G"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_size(text)
    assert caught.value.message == f"{text!r} is not a size"
    assert "K, M, G, T" in caught.value.hint


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 * 2**20 + 2**19, "10.5 MiB"),
        (200 * 2**20, "200 MiB"),
        (2**30, "1 GiB"),
        (3 * 2**40, "3 TiB"),
    ],
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert render_size(count) == text


@given(st.integers(0, 2**49))
def test_a_size_that_was_written_is_read_as_nearly_the_same(count: int) -> None:
    assert parse_size(render_size(count)) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0.5", 0.5),
        ("90s", 90),
        ("15m", 900),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("1d", 86400),
        (" 1D2H ", 93600),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5", "1h30", "1 h", "inf", "nan", "1w"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0s"),
        (0, "0.0s"),
        (4.25, "4.2s"),
        (10, "10s"),
        (59.9, "59s"),
        (60, "1m"),
        (90, "1m30s"),
        (3600, "1h"),
        (5400, "1h30m"),
        (3605, "1h"),
        (86400 + 7200 + 5, "1d2h"),
    ],
)
def test_durations_are_written_with_their_two_largest_units(seconds: float, text: str) -> None:
    assert render_duration(seconds) == text


@given(st.floats(10, 10**9))
def test_a_duration_that_was_written_is_read_as_nearly_the_same(seconds: float) -> None:
    assert parse_duration(render_duration(seconds)) == pytest.approx(seconds, rel=0.1)
