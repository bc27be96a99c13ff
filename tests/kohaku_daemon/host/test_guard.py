"""What stands before aiohttp: a deadline for headers, and a cap on connections of one address."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kohaku_daemon.host import guard
from tests.support.host import RunningHost, running_host

Pipe = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def open_pipe(host: RunningHost) -> Pipe:
    return await asyncio.open_connection(*host.authority)


async def is_dropped(pipe: Pipe, *, within_s: float = 5.0) -> bool:
    """Say whether the host closes a connection without a word."""
    try:
        return await asyncio.wait_for(pipe[0].read(), within_s) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    finally:
        pipe[1].close()


@pytest.mark.parametrize(
    "said",
    [
        [],
        [b"GET /healthz HTTP/1.1\r\n"],
        [b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"\r", b"X-A: b\r\n", b"X-B: c\r\n"],
    ],
)
async def test_who_does_not_finish_its_header_is_dropped(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch, said: list[bytes]
) -> None:
    monkeypatch.setattr(guard, "HEADER_DEADLINE_S", 0.2)
    pipe = await open_pipe(host)
    for part in said:
        pipe[1].write(part)
        await pipe[1].drain()
        await asyncio.sleep(0.01)  # so that the parts arrive apart
    # aiohttp may answer a broken header itself, with 400; either way the connection ends.
    try:
        rest = await asyncio.wait_for(pipe[0].read(), 5)
    except ConnectionResetError:
        rest = b""
    pipe[1].close()
    assert rest == b"" or rest.startswith(b"HTTP/1.0 400")


async def test_a_header_in_small_pieces_is_in_time_and_has_no_deadline_after_it(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEADER_DEADLINE_S", 0.5)
    reader, writer = await open_pipe(host)
    header = (
        b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    for byte in header[:-4]:
        writer.write(bytes([byte]))
    for byte in header[-4:]:
        await writer.drain()
        await asyncio.sleep(0.01)  # so that the end of the header arrives in pieces
        writer.write(bytes([byte]))
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert answer.startswith(b"HTTP/1.1 101 ")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.7)  # it is not closed
    writer.close()


async def test_one_address_holds_so_many_connections_and_may_have_another_after_one_ends(
    tmp_path: Path,
) -> None:
    async with running_host(tmp_path / "data", max_connections_per_address=3) as host:
        pipes = [await open_pipe(host) for _ in range(3)]
        assert await is_dropped(await open_pipe(host))
        pipes[0][1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await pipes[0][0].read()).endswith(b"ok\n")
        pipes[0][1].close()
        client = await host.connect()
        assert await is_dropped(await open_pipe(host))
        await client.close()
        for _, writer in pipes:
            writer.close()
        async with asyncio.timeout(5):
            while await is_dropped(await open_pipe(host), within_s=0.05):
                pass


def test_an_address_without_connections_is_forgotten() -> None:
    census = guard.Census(2)
    assert [census.enter("a"), census.enter("a"), census.enter("a")] == [True, True, False]
    assert census.enter("b")
    census.leave("a")
    assert census.enter("a")
    for address in ("a", "a", "b"):
        census.leave(address)
    assert not census._open
