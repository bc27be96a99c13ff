"""What stands before aiohttp: a deadline for headers, and a cap on the strangers of one address."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from kohaku_daemon.host import guard
from kohaku_daemon.host.refusals import Refusals
from protocol.messages.runner import OrderStream
from protocol.messages.stream import OpenLogs
from protocol.messages.task import SubmitTask
from protocol.methods import TASK_LOGS, TASK_SUBMIT
from protocol.models.access import Role
from protocol.models.task import TaskSpec
from protocol.session import CloseCode
from tests.support.host import TOKENS, RunningHost, linked_runner, running_host
from tests.support.hostile import DROPPED, frame, greeted, opened

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


async def test_one_address_holds_so_many_strangers_and_may_have_another_after_one_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_host(tmp_path / "data", max_strangers_per_address=3) as host:
        pipes = [await open_pipe(host) for _ in range(3)]
        for _ in range(3):
            assert await is_dropped(await open_pipe(host))
        pipes[0][1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await pipes[0][0].read()).endswith(b"ok\n")
        pipes[0][1].close()
        client = await host.connect(Role.ANONY)  # who shows no token is a stranger for good
        assert await is_dropped(await open_pipe(host))
        await client.close()
        for _, writer in pipes:
            writer.close()
        async with asyncio.timeout(5):
            while await is_dropped(await open_pipe(host), within_s=0.05):
                pass
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [(record.getMessage(), vars(record)["address"]) for record in told] == [
        ("a connection refused: 3 from this address have not shown a token", "127.0.0.1")
    ]


async def test_who_shows_a_token_a_credential_or_a_ticket_is_not_counted(tmp_path: Path) -> None:
    async with (
        running_host(tmp_path / "data", max_strangers_per_address=2) as host,
        linked_runner(host) as runner,
        aiohttp.ClientSession() as http,
    ):
        clients = [await host.connect() for _ in range(8)]
        spec = TaskSpec(command=("true",))
        submit = SubmitTask(request_id="request-1", spec=spec)
        (task,) = (await clients[0].call(TASK_SUBMIT, submit)).ids()
        await runner.run(await runner.start())
        async with AsyncExitStack() as streams:
            for client in clients:
                ticket = await client.call(TASK_LOGS, OpenLogs(task=task, follow=True))
                headers = {"Authorization": f"Ticket {ticket.ticket}"}
                await streams.enter_async_context(
                    http.ws_connect(host.url + ticket.path, headers=headers)
                )
                order = await runner.order()
                assert isinstance(order, OrderStream)
                await streams.enter_async_context(runner.dial_back(order))
            # All of them are open, and there is room for two strangers as ever.
            strangers = [await open_pipe(host) for _ in range(2)]
            assert await is_dropped(await open_pipe(host))
            for _, writer in strangers:
                writer.close()
        for client in clients:
            await client.close()


async def test_many_tools_of_one_machine_may_begin_at_the_same_moment(host: RunningHost) -> None:
    clients = await asyncio.gather(*(host.connect() for _ in range(200)))
    for client in clients:
        assert client.is_open
        await client.close()


async def test_a_stranger_may_say_so_much_and_who_has_a_token_more(host: RunningHost) -> None:
    almost = frame(bytes(200_000), length=200_001)
    async with greeted(host.authority, TOKENS[Role.VIEWER]) as known:
        async with opened(host.authority) as stranger:
            await stranger.send(almost)
            assert await stranger.end() == (DROPPED, "")
        async with greeted(host.authority, "") as guest:  # who says hello is a stranger still
            await guest.send(almost)
            assert await guest.end() == (DROPPED, "")
        await known.send(almost, b"\0")
        assert (await known.end())[0] == CloseCode.BAD_FRAME  # all of it was taken, and is none


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::1", "::/64"),
    ],
)
def test_what_counts_as_one_address(address: str, counted: str) -> None:
    assert guard.household(address) == counted


def test_an_address_without_connections_is_forgotten() -> None:
    census = guard.Census(2, Refusals(lambda: 0.0))
    assert [census.enter("a"), census.enter("a"), census.enter("a")] == [True, True, False]
    assert census.enter("b")
    census.leave("a")
    assert census.enter("a")
    for address in ("a", "a", "b"):
        census.leave(address)
    assert not census._open
