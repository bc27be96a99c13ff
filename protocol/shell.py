"""A command in an environment as a program on this side sees it: what it says, what is typed.

Knows: the messages of ``/v1/stream/shell``.
Does not know: tickets (``client``), terminals.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from protocol.connection import DataStream
from protocol.errors import Unavailable
from protocol.framing import MAX_CHUNK, decode_answer
from protocol.messages.environment import ShellEnd, ShellInput, ShellOutput, ShellSaid, ShellSize

_SAID: Final[Any] = ShellSaid

_encode: Final = msgspec.msgpack.Encoder().encode


class Shell:
    """A command that runs. Iterate over what it says; its end comes last."""

    def __init__(self, stream: DataStream) -> None:
        """Not for use: ``Cluster.shell`` makes one."""
        self._stream = stream
        self._ended = False

    def __aiter__(self) -> Shell:
        return self

    async def __anext__(self) -> ShellOutput | ShellEnd:
        """Give what it says next.

        Raises:
            Unavailable: The connection broke; the command is ended then.
        """
        if self._ended:
            raise StopAsyncIteration
        try:
            message = await anext(self._stream)
        except StopAsyncIteration:
            raise Unavailable("the host left before the command ended") from None
        said: ShellOutput | ShellEnd = decode_answer(
            msgspec.Raw(message), _SAID, "a message of a shell"
        )
        self._ended = isinstance(said, ShellEnd)
        return said

    async def type(self, data: bytes) -> None:
        """Type something.

        Raises:
            Unavailable: The connection broke.
        """
        for start in range(0, len(data), MAX_CHUNK):
            await self._stream.send(_encode(ShellInput(data[start : start + MAX_CHUNK])))

    async def end_input(self) -> None:
        """Say that nothing more will be typed. Raises as ``type``."""
        await self._stream.send(_encode(ShellInput(b"")))

    async def resize(self, columns: int, rows: int) -> None:
        """Say that the terminal has another size. Raises as ``type``."""
        await self._stream.send(_encode(ShellSize(columns, rows)))
