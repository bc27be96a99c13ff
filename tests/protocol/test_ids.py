"""Ids and names as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadRequest
from protocol.ids import parse_id, parse_node_name


@given(st.integers(1, 2**63 - 1))
def test_every_id_is_read_as_it_is_written(number: int) -> None:
    assert parse_id(str(number)) == number


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "+1", " 1", "1_000", "1.0", "0x1", "abc", "٣", "²", str(2**63)]
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_id(text)
    assert caught.value.message == f"{text!r} is not a task or batch id"
    assert "kohaku task list" in caught.value.hint


@pytest.mark.parametrize("text", ["a", "7", "n1", "gpu-node-1", "a--b", "x" * 63])
def test_names_that_a_node_may_have(text: str) -> None:
    assert parse_node_name(text) == text


@pytest.mark.parametrize(
    "text", ["", "-a", "a-", "A", "a.b", "a_b", "a b", "ä", "x" * 64, "a\n", "a:0"]
)
def test_names_that_it_may_not(text: str) -> None:
    with pytest.raises(BadRequest, match="cannot be a node's name"):
        parse_node_name(text)
