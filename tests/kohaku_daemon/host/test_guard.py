"""What stands before aiohttp: a deadline for headers, a cap on strangers, a price for reading."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from kohaku_daemon.host import guard
from kohaku_daemon.host.refusals import Refusals
from kohaku_daemon.loop_time import LoopTime, Purse
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


class Below(asyncio.Transport):
    """A socket of somebody at an address, which does nothing."""

    def __init__(self, address: str) -> None:
        super().__init__({"peername": (address, 1)})
        self.reads = True
        self.resumed = asyncio.Event()

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True
        self.resumed.set()


class Costly(asyncio.Protocol):
    """A protocol for which each byte takes so long."""

    def __init__(self, byte_s: float) -> None:
        self.byte_s = byte_s
        self.pieces: list[int] = []

    def data_received(self, data: bytes) -> None:
        self.pieces.append(len(data))
        until = time.thread_time() + len(data) * self.byte_s
        while time.thread_time() < until:
            pass


def an_entrance() -> guard.Entrance:
    return guard.Entrance(guard.Census(10, Refusals(lambda: 0.0)), LoopTime())


def arrive(
    entrance: guard.Entrance, inner: asyncio.Protocol, address: str = "192.0.2.7"
) -> tuple[guard.GuardedConnection, Below]:
    connection, below = guard.GuardedConnection(lambda: inner, entrance), Below(address)
    connection.connection_made(below)
    return connection, below


def say(connection: guard.GuardedConnection, most: int = 10**9) -> int:
    """Let as much come as there is place for; give how much that was."""
    size = min(len(connection.get_buffer(-1)), most)
    connection.buffer_updated(size)
    return size


async def test_what_takes_long_to_take_apart_comes_in_small_pieces_and_what_does_not_in_large() -> (
    None
):
    for byte_s, smallest, largest in ((2e-6, 4096, 4096), (0.0, 262144, 262144)):
        connection, _ = arrive(an_entrance(), Costly(byte_s))
        connection.vouch(Purse(size_s=100.0))
        said = [say(connection) for _ in range(10)]
        assert smallest <= said[-1] <= largest, said
        connection.connection_lost(None)


async def test_who_has_spent_all_is_read_when_its_time_comes_and_others_at_once() -> None:
    entrance = an_entrance()
    connection, below = arrive(entrance, Costly(0.02))
    neighbour, beside = arrive(entrance, Costly(0.0), "192.0.2.8")
    say(connection, 1)
    say(neighbour, 1)
    assert (below.reads, beside.reads) == (False, True)
    await asyncio.wait_for(below.resumed.wait(), 5)
    assert below.reads
    say(connection, 1)
    assert not below.reads
    connection.connection_lost(None)  # while it waits
    neighbour.connection_lost(None)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not below.reads


async def test_who_comes_back_finds_what_it_has_spent() -> None:
    entrance = an_entrance()
    connection, _ = arrive(entrance, Costly(0.02))
    say(connection, 1)
    connection.connection_lost(None)
    again, _ = arrive(entrance, Costly(0.0))
    other, _ = arrive(entrance, Costly(0.0), "192.0.2.8")
    now = time.perf_counter()
    assert again.account.purse.is_empty(now)
    assert not other.account.purse.is_empty(now)
    for one in (again, other):
        one.connection_lost(None)
    for number in range(5000):
        entrance.purse(str(number))
    assert len(entrance._purses) == 4096


async def test_who_is_vouched_for_pays_from_the_purse_of_who_it_is() -> None:
    connection, _ = arrive(an_entrance(), Costly(0.0))
    assert guard.account_of(None) is None
    purse = Purse()
    connection.vouch(purse)
    say(connection, 1)
    assert connection.account.purse is purse
    assert purse.fill(time.perf_counter()) < 1.0
    connection.connection_lost(None)
