"""The kernel's notations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_daemon.probe.files import parse_fields, parse_list


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), ("", ()), ("\n", ()), ("2,4-4\n", (2, 4))],
)
def test_lists(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_list(text) == numbers


@given(st.sets(st.integers(0, 300)))
def test_every_set_of_cores_is_read_back(cores: set[int]) -> None:
    parts = [
        f"{core}-{core + 1}" if core + 1 in cores else f"{core}"
        for core in sorted(cores)
        if core % 2 == 0 or core - 1 not in cores
    ]
    assert set(parse_list(",".join(parts))) == cores


def test_fields_are_bytes_where_they_say_kb() -> None:
    text = "MemTotal:  10 kB\nHugePages_Total:   4\nno field\nempty:\nword: x kB"
    assert parse_fields(text) == {"MemTotal": 10240, "HugePages_Total": 4}
