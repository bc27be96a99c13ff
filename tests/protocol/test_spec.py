"""The specification says what the code does."""

from __future__ import annotations

import re

import pytest

from protocol import framing, session, spec, tunnel
from protocol.methods import METHODS


@pytest.fixture(scope="module")
def text() -> str:
    return spec.PATH.read_text()


def test_what_is_written_from_the_code_is_current(text: str) -> None:
    assert spec.fill(text) == text, "run: python -m protocol.spec"


def test_a_lost_marker_is_noticed() -> None:
    with pytest.raises(ValueError, match="markers"):
        spec.fill("# The protocol\n")


def test_every_method_is_there_with_types_that_are_there(text: str) -> None:
    titles = {title.lower() for title in re.findall(r"^### (\w+)$", text, re.MULTILINE)}
    assert len(titles) > 50
    for name in METHODS:
        assert f"| `{name}` |" in text
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= titles


def test_every_close_code_has_a_meaning(text: str) -> None:
    for code in session.CloseCode:
        assert re.search(rf"^\| {code.value} \| {code.name.lower()} \| .+\. \|$", text, re.M)


def test_the_limits_it_names_are_the_limits(text: str) -> None:
    kib = 1024
    assert (4 * kib, 256 * kib) == (framing.MAX_GREETING, framing.MAX_MESSAGE)
    assert (16 * kib, 64 * kib) == (framing.MAX_ERROR, framing.MAX_CHUNK)
    for number in (framing.MAX_CONTAINERS, framing.MAX_NESTING, session.MAX_CALLS):
        assert re.search(rf"\b{number}\b", text)
    assert f"{session.HELLO_TIMEOUT_S:.0f} seconds" in text
    for kind in tunnel.TunnelType:
        assert f"| {kind.value} | {kind.name.lower()} |" in text
