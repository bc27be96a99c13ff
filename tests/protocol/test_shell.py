"""The caller's end of a command in an environment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest

from protocol.connection import DataStream
from protocol.errors import Unavailable, Unsupported
from protocol.framing import MAX_CHUNK
from protocol.messages.environment import ShellEnd, ShellOutput
from protocol.shell import Shell


class Line:
    """Stands in for a data connection."""

    def __init__(self, *messages: Any) -> None:
        self._messages = [msgspec.msgpack.encode(message) for message in messages]
        self.sent: list[Any] = []

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._messages:
            raise StopAsyncIteration
        return self._messages.pop(0)

    async def send(self, data: bytes) -> None:
        self.sent.append(msgspec.msgpack.decode(data))


def a_shell(*messages: Any) -> tuple[Shell, Line]:
    line = Line(*messages)
    return Shell(cast("DataStream", line)), line


async def test_what_it_says_ends_with_its_end() -> None:
    said = (ShellOutput(b"out"), ShellOutput(b"err", is_error=True), ShellEnd(3))
    shell, _ = a_shell(*said, ShellOutput(b"never read"))
    assert [item async for item in shell] == list(said)


async def test_a_connection_that_closes_before_the_end_broke() -> None:
    shell, _ = a_shell(ShellOutput(b"out"))
    assert await anext(shell) == ShellOutput(b"out")
    with pytest.raises(Unavailable, match="before the command ended"):
        await anext(shell)


async def test_what_no_version_says_is_refused() -> None:
    shell, _ = a_shell([9, "what"])
    with pytest.raises(Unsupported):
        await anext(shell)


async def test_much_is_typed_in_parts_and_nothing_is_not_the_end() -> None:
    shell, line = a_shell()
    await shell.type(b"x" * (MAX_CHUNK + 1))
    await shell.type(b"")
    await shell.resize(132, 43)
    await shell.end_input()
    assert line.sent == [[1, b"x" * MAX_CHUNK], [1, b"x"], [2, 132, 43], [1, b""]]
