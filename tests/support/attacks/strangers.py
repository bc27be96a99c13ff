"""What anybody can do who reaches the port: connections, HTTP, WebSocket frames, no token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Final

import msgspec

from protocol.session import CloseCode
from tests.support.attacks.target import Target
from tests.support.hostile import (
    BINARY,
    CLOSE,
    CONTINUATION,
    DROPPED,
    PING,
    TEXT,
    dial,
    frame,
    hello,
    opened,
    upgrade_request,
)

_encode: Final = msgspec.msgpack.encode
#: Close codes of WebSocket itself (RFC 6455 section 7.4.1).
PROTOCOL_ERROR: Final = 1002
TOO_BIG: Final = 1009
BOTH_DOORS: Final = ("/v1/ws", "/v1/runner")


async def foreign_origin(there: Target) -> None:
    """A web page of another site, with every method on every path."""
    for path in ("/healthz", "/readyz", "/metrics", *BOTH_DOORS, "/v1/stream/logs", "/v1/x", "/"):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            peer = await dial(there.authority, there.source)
            await peer.send(
                f"{method} {path} HTTP/1.1\r\nHost: there\r\nOrigin: http://evil.example\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            assert " 403 " in (await peer.head()).splitlines()[0], (method, path)
            await peer.wait_closed()
    for path in BOTH_DOORS:
        peer = await dial(there.authority, there.source)
        await peer.send(upgrade_request(path, Origin="null"))
        assert (await peer.head()).startswith("HTTP/1.1 403 "), path
        await peer.wait_closed()


async def deflate(there: Target) -> None:
    """Compression that is offered and not agreed to; a frame that is compressed all the same."""
    offer = "permessage-deflate; client_max_window_bits"
    for path in BOTH_DOORS:
        peer = await dial(there.authority, there.source)
        await peer.send(upgrade_request(path, Sec_WebSocket_Extensions=offer))
        head = await peer.head()
        assert head.startswith("HTTP/1.1 101 "), head
        assert "extensions" not in head.lower()
        await peer.send(frame(_BOMB, reserved=4))
        assert (await peer.end())[0] == PROTOCOL_ERROR
        await peer.wait_closed()


def _bomb() -> bytes:
    import zlib

    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    whole = squeeze.compress(bytes(32 * 2**20)) + squeeze.flush(zlib.Z_SYNC_FLUSH)
    return whole.removesuffix(b"\0\0\xff\xff")


#: 32 MiB of zeros in 32 KiB (RFC 7692 section 7.2.1).
_BOMB: Final = _bomb()

_FIRST_WORDS: Final[Mapping[str, tuple[bytes, int]]] = {
    "nothing at all": (frame(), CloseCode.BAD_FRAME),
    "no type": (frame(b"\xc1"), CloseCode.BAD_FRAME),
    "text": (frame(b"hello", TEXT), CloseCode.BAD_FRAME),
    "nested": (frame(b"\x91" * 4000), CloseCode.BAD_FRAME),
    "nested params": (frame(b"\x94\0\1\xa5hello" + b"\x91" * 4000), CloseCode.BAD_FRAME),
    "array32 of 4 G": (frame(b"\xdd\xff\xff\xff\xff"), CloseCode.BAD_FRAME),
    "map32 of 4 G": (frame(b"\x94\0\1\xa5hello\xdf\xff\xff\xff\xff"), CloseCode.BAD_FRAME),
    "bin32 of 4 G": (frame(b"\xc6\xff\xff\xff\xff"), CloseCode.BAD_FRAME),
    "extension type": (frame(b"\xd4\x05\x00"), CloseCode.BAD_FRAME),
    "int keys": (frame(_encode({1: 2, 3: 4})), CloseCode.BAD_FRAME),
    "two values": (frame(_encode((2, "ping", None)) * 2), CloseCode.BAD_FRAME),
    "another call": (frame(_encode((0, 1, "whoami", {}))), CloseCode.HELLO_EXPECTED),
    "a reply": (frame(_encode((1, 0, None, {}))), CloseCode.HELLO_EXPECTED),
    "an item": (frame(_encode((3, 0, {}))), CloseCode.HELLO_EXPECTED),
    "credit": (frame(_encode((4, 0, 1))), CloseCode.HELLO_EXPECTED),
    "a cancel": (frame(_encode((5, 0))), CloseCode.HELLO_EXPECTED),
    "a notify": (frame(_encode((2, "x", None))), CloseCode.HELLO_EXPECTED),
    "5 KB": (frame(bytes(5000)), CloseCode.TOO_LARGE),
    "10 MB": (frame(bytes(100), length=10_000_000), TOO_BIG),
    "16 EB": (frame(bytes(100), length=2**63 - 1), TOO_BIG),
    "no opcode": (frame(b"", 0x3), PROTOCOL_ERROR),
    "no control opcode": (frame(b"", 0xF), PROTOCOL_ERROR),
    "nothing to go on with": (frame(b"", CONTINUATION), PROTOCOL_ERROR),
    "a ping in parts": (frame(b"", PING, final=False), PROTOCOL_ERROR),
    "a long ping": (frame(bytes(200), PING), PROTOCOL_ERROR),
    "a close of one byte": (frame(b"\x03", CLOSE), PROTOCOL_ERROR),
    "a close without sense": (frame(b"\x00\x01", CLOSE), PROTOCOL_ERROR),
    "all reserved bits": (frame(hello(), reserved=7), PROTOCOL_ERROR),
}


async def first_words(there: Target) -> None:
    """Everything that may not come first, on both doors."""
    for path in BOTH_DOORS:
        for name, (said, code) in _FIRST_WORDS.items():
            async with opened(there.authority, path, there.source) as peer:
                await peer.send(said)
                ended, _ = await peer.end()
                assert ended == code, f"{name} on {path}: {ended}"


async def wrong_secrets(there: Target) -> None:
    """Tokens, credentials and join tokens that are none, each on each door."""
    wrong = ["kht_" + "0" * 64, "khr_" + "0" * 64, "khj_" + "0" * 64, "x", "\x00", "é" * 500]
    for path in BOTH_DOORS:
        for token in wrong:
            async with opened(there.authority, path, there.source) as peer:
                await peer.send(hello(token))
                error, _ = await peer.reply(0)
                assert error["code"] == "unauthenticated", error
                assert (await peer.end())[0] == CloseCode.REFUSED


async def garbage(there: Target) -> None:
    """Bytes that are no HTTP."""
    lines = (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        bytes(range(256)) * 4 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,
    )
    for said in lines:
        peer = await dial(there.authority, there.source)
        await peer.send(said)
        head = await peer.head()
        assert head == "" or head.split()[1] in {"200", "400", "401"}, (said[:40], head)
        await peer.wait_closed()


async def endless_words(there: Target) -> None:
    """A stranger that goes on and on: headers, a body, pings, one huge message."""
    block = bytes(64 * 1024)
    beginnings = (
        b"GET / HTTP/1.1\r\nX-A: ",
        upgrade_request() + frame(b"", length=262_000),
        upgrade_request() + frame(b"", BINARY, final=False),
        upgrade_request() + frame(b"", PING) * 15_000,
    )
    for beginning in beginnings:
        peer = await dial(there.authority, there.source)
        await peer.send(beginning, *[block] * 8)
        async with asyncio.timeout(10):
            while await _read(peer.reader):
                pass
        await peer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(65536)
    except ConnectionError:
        return b""


async def crowd(there: Target) -> None:
    """More connections from one address than it may have: the rest is dropped at once."""
    async with AsyncExitStack() as stack:
        peers = await asyncio.gather(*(dial(there.authority, "127.0.0.99") for _ in range(300)))
        for peer in peers:
            stack.push_async_callback(peer.wait_closed)
        waits = [asyncio.ensure_future(_read(peer.reader)) for peer in peers]
        ends = asyncio.as_completed(waits, timeout=10)
        try:
            for _ in range(300 - 256):
                assert await next(ends) == b""
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


async def slow_words(there: Target) -> None:
    """Those who hope to be waited for: silent, half a header, no hello, a hello in drops."""

    async def silent(said: bytes, ends: tuple[int, ...]) -> None:
        peer = await dial(there.authority, there.source)
        await peer.send(said)
        if said.endswith(b"\r\n\r\n"):
            await peer.head()
        ended, _ = await peer.end()
        assert ended in ends, (said[:40], ended)
        await peer.wait_closed()

    async def in_drops() -> None:
        async with opened(there.authority, "/v1/ws", there.source) as peer:
            dripping = asyncio.ensure_future(drip(peer.send))
            assert (await peer.end())[0] == CloseCode.HELLO_TIMEOUT
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)

    async def drip(send: Callable[[bytes], Awaitable[None]]) -> None:
        for number in range(len(hello())):
            await send(hello()[number : number + 1])
            await asyncio.sleep(0.5)

    await asyncio.gather(
        silent(b"", (DROPPED,)),
        silent(b"GET /healthz HTTP/1.1\r\nHost: there\r\nX-A", (DROPPED,)),
        silent(upgrade_request(), (CloseCode.HELLO_TIMEOUT,)),
        silent(upgrade_request("/v1/runner"), (CloseCode.HELLO_TIMEOUT,)),
        in_drops(),
    )


#: By name. The slow ones take as long as the host waits for a stranger: 10 s.
QUICK: Final = (
    foreign_origin,
    deflate,
    first_words,
    wrong_secrets,
    garbage,
    endless_words,
    crowd,
)
SLOW: Final = (slow_words,)
