"""A peer that keeps no rule: raw TCP and WebSocket frames, whatever is in them.

Knows: HTTP and RFC 6455 as bytes, so that every byte can be wrong; how a host showed it out.
Does not know: what any attack is for. The protocol's own client sends none of this.
"""

from __future__ import annotations

import asyncio
import base64
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from protocol.version import PROTOCOL_VERSION

#: Opcodes (RFC 6455 section 11.8).
CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

LONGEST_S: Final = 15.0
#: What a connection that ended without a close frame gives as its code.
DROPPED: Final = 0

_decode: Final = msgspec.msgpack.decode
_encode: Final = msgspec.msgpack.encode


def frame(
    payload: bytes = b"",
    opcode: int = BINARY,
    *,
    final: bool = True,
    reserved: int = 0,
    length: int | None = None,
) -> bytes:
    """Make one frame, masked with zeros; ``length`` is what it claims to hold.

    ``reserved`` are the bits RSV1 to RSV3; 4 is RSV1, which says that it is compressed
    (RFC 7692 section 6).
    """
    size = len(payload) if length is None else length
    first = (0x80 if final else 0) | reserved << 4 | opcode
    if size < 126:
        head = struct.pack(">BB", first, 0x80 | size)
    elif size < 2**16:
        head = struct.pack(">BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack(">BBQ", first, 0x80 | 127, size)
    return head + b"\0\0\0\0" + payload


def upgrade_request(path: str = "/v1/ws", **headers: str) -> bytes:
    """Make the request that opens a WebSocket. Underscores in names are hyphens."""
    wanted = {
        "Host": "there",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in wanted.items())
    return f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode()


def call(number: int, method: str, params: object | None = None) -> bytes:
    """Make the frame of a call."""
    return frame(_encode((0, number, method, {} if params is None else params)))


def hello(token: str = "") -> bytes:
    """Make the frame that says hello."""
    return call(0, "hello", {"version": PROTOCOL_VERSION, "token": token, "agent": "hostile"})


class ShownOut(Exception):
    """The host closed the connection while something else was waited for."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code}: {reason}")
        self.code = code


@dataclass(slots=True)
class Peer:
    """One connection of a hostile peer."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, *parts: bytes) -> None:
        """Send bytes as they are. That the host has gone is no error: it may."""
        try:
            for part in parts:
                self.writer.write(part)
                await self.writer.drain()
        except ConnectionError:
            pass

    async def head(self) -> str:
        """Give the answer's head, up to its empty line; empty if there was none."""
        try:
            async with asyncio.timeout(LONGEST_S):
                return (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (ConnectionError, asyncio.IncompleteReadError):
            return ""

    async def frame(self) -> tuple[int, bytes]:
        """Give the next frame of the host. Raises EOFError or ConnectionError at the end."""
        async with asyncio.timeout(LONGEST_S):
            first, second = await self.reader.readexactly(2)
            size = second & 0x7F
            if size == 126:
                (size,) = struct.unpack(">H", await self.reader.readexactly(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", await self.reader.readexactly(8))
            return first & 0x0F, await self.reader.readexactly(size)

    async def message(self) -> Any:
        """Give the next message, decoded.

        Raises:
            ShownOut: The host closed the connection instead.
        """
        while True:
            opcode, payload = await self.frame()
            if opcode == CLOSE:
                raise ShownOut(*_read_close(payload))
            assert opcode in {BINARY, PING, PONG}, (opcode, payload)
            if opcode == BINARY:
                return _decode(payload)

    async def reply(self, number: int) -> Any:
        """Give the error and the result of a call, passing over all else."""
        while True:
            message = await self.message()
            if message[:2] == [1, number]:
                return message[2:4]

    async def end(self) -> tuple[int, str]:
        """Read to the end of the connection; give the code and words of its close frame."""
        ended = (DROPPED, "")
        try:
            while True:
                opcode, payload = await self.frame()
                if opcode == CLOSE:
                    ended = _read_close(payload)
        except (EOFError, ConnectionError):
            return ended

    def close(self) -> None:
        """Go away without a word."""
        self.writer.transport.abort()

    async def wait_closed(self) -> None:
        """Go away without a word, and wait until that is done."""
        self.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


def _read_close(payload: bytes) -> tuple[int, str]:
    return struct.unpack(">H", payload[:2])[0], payload[2:].decode()


async def dial(authority: tuple[str, int], source: str = "", **more: Any) -> Peer:
    """Connect, from an address of this machine if one is named (all of 127/8 are)."""
    local = (source, 0) if source else None
    return Peer(*await asyncio.open_connection(*authority, local_addr=local, **more))


@asynccontextmanager
async def opened(
    authority: tuple[str, int], path: str = "/v1/ws", source: str = "", **headers: str
) -> AsyncIterator[Peer]:
    """Open a WebSocket, and go away at the end."""
    peer = await dial(authority, source)
    try:
        await peer.send(upgrade_request(path, **headers))
        head = await peer.head()
        assert head.startswith("HTTP/1.1 101 "), head
        yield peer
    finally:
        await peer.wait_closed()


@asynccontextmanager
async def greeted(
    authority: tuple[str, int], token: str, path: str = "/v1/ws", source: str = ""
) -> AsyncIterator[Peer]:
    """Open a WebSocket and say hello."""
    async with opened(authority, path, source) as peer:
        await peer.send(hello(token))
        error, _ = await peer.reply(0)
        assert error is None, error
        yield peer
