"""The specification says what the code does."""

from __future__ import annotations

import inspect
import re

import pytest

from kohaku_daemon.core.task.lifecycle import TABLE
from kohaku_daemon.host.config import HostConfig
from kohaku_daemon.host.guard import HEADER_DEADLINE_S, MOST_OF_STRANGERS
from protocol import framing, session, spec, tunnel
from protocol.methods import METHODS
from protocol.models.task import FINAL_STATES


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


def test_the_moves_of_states_it_names_are_those_of_the_table(text: str) -> None:
    section = text.partition("### The life of a task\n")[2].partition("\n### ")[0]
    ends = {str(state) for state in FINAL_STATES}
    named = {
        state: set(re.findall(r"`(\w+)`", after)) | (ends if "or an end" in after else set())
        for state, after in re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE)
    }
    assert named == {
        str(state): {str(after) for after in moves.values()} for state, moves in TABLE.items()
    }
    prose = section.rpartition("|\n")[2]
    assert set(re.findall(r"`(\w+)`", prose)) == ends


def test_the_limits_of_strangers_it_names_are_those_of_the_host(text: str) -> None:
    most = inspect.signature(HostConfig).parameters["max_strangers_per_address"].default
    assert f"| connections of strangers from one address | {most}, " in text
    assert f"| time until the whole HTTP header is there | {HEADER_DEADLINE_S:.0f} s |" in text
    assert f"its HTTP header included | {MOST_OF_STRANGERS // 1024} KiB |" in text
