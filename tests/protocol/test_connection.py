"""One connection over real sockets: dialling, answers, streams, and how all of it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest
from aiohttp import web

from kohaku_daemon.wire import ItemSink
from protocol.connection import Connection, parse_url
from protocol.errors import (
    BadRequest,
    KohakuError,
    NotFound,
    TimedOut,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from protocol.framing import MAX_CHUNK
from protocol.messages.cluster import GetStatus, Status, Update, Watch, WatchEnded
from protocol.messages.hello import Identity, WhoAmI
from protocol.messages.task import OneTask
from protocol.methods import STATUS, TASK_SHOW, WATCH, WHOAMI
from protocol.models.access import Role
from tests.protocol.loopback import TOKEN, ScriptedHost, scripted_host

ALL = Watch(topics=())


@pytest.fixture
async def host() -> AsyncIterator[ScriptedHost]:
    async with scripted_host() as host:
        yield host


@pytest.fixture
async def connection(host: ScriptedHost) -> AsyncIterator[Connection]:
    async with await Connection.dial(host.url, token=TOKEN) as connection:
        yield connection


async def identity(_: object) -> msgspec.Struct:
    return Identity("ann", Role.USER)  # type: ignore[arg-type]


async def never(*_: object) -> msgspec.Struct:
    await asyncio.Event().wait()
    raise AssertionError


async def count_up(_: object, sink: ItemSink) -> msgspec.Struct:
    for number in range(100):
        await sink.send(Update(revision=str(number)))
    return WatchEnded()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("lab", "http://lab:8000"),
        ("lab:80", "http://lab:80"),
        ("10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("http://lab", "http://lab"),
        ("http://lab:8000/", "http://lab:8000"),
        ("https://lab:8443", "https://lab:8443"),
        ("ws://lab:8000", "http://lab:8000"),
        ("wss://lab", "https://lab"),
    ],
)
def test_addresses_of_a_host(text: str, url: str) -> None:
    assert parse_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://",
        "ftp://lab",
        "lab:port",
        "lab:99999",
        "http://ann:secret@lab",
        "lab/path",
        "?",
        "not an address",
        "http://not an address",
        "la\0b",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(BadRequest, match="not the address of a host"):
        parse_url(text)


async def test_the_welcome_is_there(connection: Connection) -> None:
    assert connection.is_open
    assert (connection.welcome.cluster, connection.welcome.role) == ("77", Role.ADMIN)


async def test_a_wrong_token_is_the_hosts_own_error(host: ScriptedHost) -> None:
    with pytest.raises(Unauthenticated, match="not known here") as caught:
        await Connection.dial(host.url, token="kht_wrong_and_secret")
    assert "secret" not in repr(caught.value)


async def test_nobody_there_is_told_with_the_address() -> None:
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:1"):
        await Connection.dial("127.0.0.1:1")


async def test_who_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        with pytest.raises(Unavailable, match=r"does not answer within 0\.2 s"):
            await Connection.dial(f"127.0.0.1:{port}", timeout_s=0.2)


async def test_some_other_web_server_is_told_apart(host: ScriptedHost) -> None:
    with pytest.raises(NotFound, match="404"):
        await Connection.dial(host.url, path="/v2/ws")


async def test_a_call_has_its_answer(host: ScriptedHost, connection: Connection) -> None:
    host.answers["whoami"] = identity
    answer: Identity = await connection.call(WHOAMI, WhoAmI())
    assert answer.user == "ann"


async def test_a_refusal_is_raised(connection: Connection) -> None:
    with pytest.raises(NotFound, match="not scripted"):
        await connection.call(WHOAMI, WhoAmI())


async def test_calls_at_once_have_their_own_answers(
    host: ScriptedHost, connection: Connection
) -> None:
    async def echo(params: OneTask) -> msgspec.Struct:
        await asyncio.sleep(0.001 * (params.task % 7))
        raise NotFound("no such task", details={"task": params.task})

    host.answers["task.show"] = echo

    async def ask(task: int) -> None:
        with pytest.raises(NotFound) as caught:
            await connection.call(TASK_SHOW, OneTask(task))  # type: ignore[arg-type]
        assert caught.value.details == {"task": task}

    await asyncio.gather(*(ask(task) for task in range(100)))


async def test_plain_calls_take_and_give_plain_values(
    host: ScriptedHost, connection: Connection
) -> None:
    host.answers["whoami"] = identity
    assert await connection.call_raw("whoami", {}) == {"user": "ann", "role": "user"}
    with pytest.raises(BadRequest, match=r"task\.show: object missing required field `task`"):
        await connection.call_raw("task.show", {})


async def test_what_a_newer_host_says_is_told_as_such(
    host: ScriptedHost, connection: Connection
) -> None:
    class Newer(msgspec.Struct):
        role: str = "archduke"
        user: str = "ann"

    async def newer(_: object) -> msgspec.Struct:
        return Newer()

    host.answers["whoami"] = newer
    with pytest.raises(Unsupported, match="archduke"):
        await connection.call(WHOAMI, WhoAmI())


async def test_a_call_that_takes_too_long_ends_at_both_ends(
    host: ScriptedHost, connection: Connection
) -> None:
    host.answers["whoami"] = never
    with pytest.raises(TimedOut, match="whoami"):
        await connection.call(WHOAMI, WhoAmI(), timeout_s=0.05)
    await host.until(lambda: host.cancelled == ["whoami"])


async def test_who_stops_waiting_cancels_at_the_host(
    host: ScriptedHost, connection: Connection
) -> None:
    host.answers |= {"whoami": never, "cluster.status": identity}
    job = asyncio.create_task(connection.call(WHOAMI, WhoAmI()))
    await host.until(lambda: host.count("whoami") == 1)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await host.until(lambda: host.cancelled == ["whoami"])
    assert connection.is_open


async def test_a_stream_gives_all_items_in_order_and_its_result(
    host: ScriptedHost, connection: Connection
) -> None:
    host.answers["watch"] = count_up
    async with connection.stream(WATCH, ALL, window=8) as updates:
        with pytest.raises(Unavailable, match="has not ended"):
            _ = updates.result
        got = [update.revision async for update in updates]
        assert got == [str(number) for number in range(100)]
        assert updates.result == WatchEnded()


async def test_a_reader_that_rests_holds_its_stream_back_and_nothing_else(
    host: ScriptedHost, connection: Connection
) -> None:
    sent = 0

    async def flood(_: object, sink: ItemSink) -> msgspec.Struct:
        nonlocal sent
        while True:
            await sink.send(Update())
            sent += 1

    host.answers |= {"watch": flood, "whoami": identity}
    async with connection.stream(WATCH, ALL, window=8) as updates:
        await anext(updates)
        for _ in range(20):
            await connection.call(WHOAMI, WhoAmI())
        assert sent == 8
        for _ in range(40):
            await anext(updates)
        for _ in range(20):
            await connection.call(WHOAMI, WhoAmI())
        assert 41 <= sent <= 41 + 8
    await host.until(lambda: host.cancelled == ["watch"])


async def test_a_stream_refused_raises_where_it_is_read(
    host: ScriptedHost, connection: Connection
) -> None:
    async def two_then_fail(_: object, sink: ItemSink) -> msgspec.Struct:
        await sink.send(Update())
        await sink.send(Update())
        raise NotFound("gone")

    host.answers["watch"] = two_then_fail
    async with connection.stream(WATCH, ALL) as updates:
        await anext(updates)
        await anext(updates)
        with pytest.raises(NotFound, match="gone"):
            await anext(updates)


async def test_when_the_host_goes_everything_that_waits_is_told(
    host: ScriptedHost, connection: Connection
) -> None:
    host.answers |= {"whoami": never, "watch": never}
    async with connection.stream(WATCH, ALL) as updates:
        call = asyncio.create_task(connection.call(WHOAMI, WhoAmI()))
        item = asyncio.create_task(anext(updates))
        await host.until(lambda: len(host.asked) == 2)
        await host.stop()
        for job in (call, item):
            with pytest.raises(Unavailable, match="stopping"):
                await job
    ended = await asyncio.wait_for(connection.closed, 5)
    assert (ended.code, ended.reason) == (1001, "stopping")
    assert not connection.is_open
    with pytest.raises(Unavailable, match="closed: stopping"):
        await connection.call(WHOAMI, WhoAmI())


async def test_a_silent_host_is_given_up(host: ScriptedHost) -> None:
    host.keep_alive_s = 0.1
    async with await Connection.dial(host.url, token=TOKEN) as connection:
        (served,) = host.open
        # It still reads, so that only its silence can be noticed.
        served._session.data_to_send = list  # type: ignore[method-assign]
        served._session.set_keep_alive(60)
        ended = await asyncio.wait_for(connection.closed, 5)
        assert ended.reason.startswith("nothing heard")


async def test_a_quiet_connection_stays_open(host: ScriptedHost) -> None:
    host.keep_alive_s = 0.05
    async with await Connection.dial(host.url, token=TOKEN) as connection:
        await asyncio.sleep(0.4)  # eight times the silence that is too long for a dead peer
        assert connection.is_open


async def test_closing_twice_is_closing_once(connection: Connection) -> None:
    await connection.close()
    await connection.close()
    assert connection.closed.result().reason == "closed here"


async def test_too_many_calls_at_once_are_refused_here(
    host: ScriptedHost, connection: Connection
) -> None:
    host.answers["whoami"] = never
    jobs = [asyncio.create_task(connection.call(WHOAMI, WhoAmI())) for _ in range(256)]
    await host.until(lambda: host.count("whoami") == 256)
    with pytest.raises(Unavailable, match="256 calls"):
        await connection.call(STATUS, GetStatus())
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)

    async def status(_: object) -> msgspec.Struct:
        return Status(cluster="77", version="1", started_at=0.0, nodes={})

    host.answers["cluster.status"] = status
    await host.until(lambda: len(host.cancelled) == 256)
    async with asyncio.timeout(5):
        while True:  # the answers to what was cancelled free the numbers
            try:
                await connection.call(STATUS, GetStatus())
                break
            except Unavailable:
                await asyncio.sleep(0)


async def test_a_data_connection_carries_bytes_both_ways(
    host: ScriptedHost, connection: Connection
) -> None:
    async def echo(served: web.WebSocketResponse) -> None:
        async for message in served:
            await served.send_bytes(message.data)

    host.data["T1"] = echo
    async with await connection.open_data("/data", "T1") as data:
        await data.send(b"hello")
        assert await anext(data) == b"hello"
        await data.send(bytes(MAX_CHUNK))
        assert await anext(data) == bytes(MAX_CHUNK)


async def test_a_data_connection_ends_or_breaks(host: ScriptedHost, connection: Connection) -> None:
    async def three(served: web.WebSocketResponse) -> None:
        for _ in range(3):
            await served.send_bytes(b"x")
        await served.close()

    async def breaks(served: web.WebSocketResponse) -> None:
        await served.send_bytes(b"x")
        await served.close(code=1011)

    host.data |= {"T1": three, "T2": breaks}
    async with await connection.open_data("/data", "T1") as data:
        assert [message async for message in data] == [b"x"] * 3
    async with await connection.open_data("/data", "T2") as data:
        assert await anext(data) == b"x"
        with pytest.raises(Unavailable, match="broke"):
            await anext(data)


async def test_a_data_connection_outlives_the_control_connection(host: ScriptedHost) -> None:
    go = asyncio.Event()

    async def later(served: web.WebSocketResponse) -> None:
        await go.wait()
        await served.send_bytes(b"still here")

    host.data["T1"] = later
    connection = await Connection.dial(host.url, token=TOKEN)
    async with await connection.open_data("/data", "T1") as data:
        await connection.close()
        go.set()
        assert await anext(data) == b"still here"


@pytest.mark.parametrize(("path", "error"), [("/data", Unauthenticated), ("/nothing", NotFound)])
async def test_a_ticket_that_is_not_taken(
    connection: Connection, path: str, error: type[KohakuError]
) -> None:
    with pytest.raises(error) as caught:
        await connection.open_data(path, "secret-ticket")
    assert "secret" not in caught.value.message
