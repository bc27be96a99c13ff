"""docs/cli.md tells of every command and option, and of the fields that documents have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from typer.main import get_command

from kohaku_tui.cli.main import app
from protocol.errors import CODES
from protocol.messages.cluster import Event, Status
from protocol.models.environment import Environment, Presence, RegistryAccount, Version
from protocol.models.node import Node
from protocol.models.task import Batch, Explanation, NodeVerdict, Task
from tests.kohaku_tui.cli.conftest import ROOT

PAGE = (ROOT / "docs" / "cli.md").read_text()
#: Told once for all commands.
EVERYWHERE = {"--json", "--context", "--help"}


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Give every command with its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join([*path, name]), command


COMMANDS = dict(commands(get_command(app)))


def test_there_are_commands() -> None:
    assert {"status", "task submit", "node join-token"} <= COMMANDS.keys()


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_and_its_options_are_told(words: str) -> None:
    family, _, verb = words.rpartition(" ")
    lines = [line for line in PAGE.splitlines() if f"kohaku {family}".strip() in line]
    assert any(re.search(rf"[ |]{re.escape(verb)}\b", line) for line in lines)
    for option in COMMANDS[words].params:
        names = {name for name in option.opts if name.startswith("-")}
        if names and not names & EVERYWHERE:
            assert any(re.search(rf"{re.escape(name)}\b", PAGE) for name in names), names


@pytest.mark.parametrize(
    "kind",
    [
        Status,
        Task,
        Explanation,
        NodeVerdict,
        Batch,
        Node,
        Event,
        Environment,
        Version,
        Presence,
        RegistryAccount,
    ],
    ids=lambda k: k.__name__,
)
def test_the_fields_of_a_document_are_told_in_order(kind: type[msgspec.Struct]) -> None:
    words = re.sub(r"[{}\[\],`:]", " ", PAGE)
    assert re.search(r"\s+".join(kind.__struct_fields__), words)


def test_every_error_code_is_told() -> None:
    assert all(re.search(rf"\b{code}\b", PAGE) for code in CODES)
