"""The host's HTTP side: who may use which route, and what garbage does to its neighbours."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp import web

from kohaku_daemon.host.guard import Census
from kohaku_daemon.host.meters import Meters
from kohaku_daemon.host.refusals import Refusals
from kohaku_daemon.host.web import LOOP_TIME, listen, make_app
from kohaku_daemon.loop_time import LoopTime
from kohaku_daemon.wire import Served
from protocol.messages.hello import WhoAmI
from protocol.methods import WHOAMI
from protocol.models.access import Role
from protocol.session import CloseCode
from tests.support.host import TOKENS, RunningHost, dial_runner, linked_runner
from tests.support.hostile import frame, greeted

#: The kernel's own limit (man 2 listen).
MOST_WAITING = int(Path("/proc/sys/net/core/somaxconn").read_text())
FOR_ANYBODY = {"/healthz": "ok\n", "/readyz": "ready\n"}
#: They let a stranger in and refuse what is said there.
UPGRADES = {"/v1/ws", "/v1/runner"}
HTTP_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]


def all_paths() -> Iterator[str]:
    """Give the path of every route there is, as the application's own router knows them."""
    app: web.Application = make_app(Mock(), Meters())
    for resource in app.router.resources():
        info = resource.get_info()
        yield info.get("path") or info["formatter"].replace("{stream}", "0123456789abcdef")


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("kht_" + "0" * 64),
        bearer("kht_" + "\xff" * 64),
        {"Authorization": "Ticket \xff"},
        {"Authorization": "Basic YWRtaW46YWRtaW4="},
    ],
)
async def test_a_stranger_is_told_401_wherever_it_knocks(
    host: RunningHost, http: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    known = set(all_paths())
    assert known >= UPGRADES | FOR_ANYBODY.keys()
    nowhere = {"/", "/v1", "/v2/ws", "/admin", "/v1/stream/terminal", "/healthz/", "/metrics/x"}
    for path in known | nowhere:
        for method in HTTP_METHODS:
            async with http.request(method, host.url + path, headers=headers) as answer:
                if path in FOR_ANYBODY and method in {"GET", "HEAD"}:
                    assert answer.status == 200
                    assert await answer.text() == (FOR_ANYBODY[path] if method == "GET" else "")
                else:
                    assert answer.status == 401, (method, path)
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.headers["Connection"] == "close", "a plain connection stays open"
                assert "Server" not in answer.headers, "it tells what it is made of"


@pytest.mark.parametrize("header", [b"Ticket \xff", b"Bearer \xff", b"Bearer kht_\xed\xa0\x80"])
@pytest.mark.parametrize("path", [b"/v1/stream/logs", b"/metrics", b"/v1/runner/stream/1", b"/x"])
async def test_bytes_that_are_no_text_are_refused_like_any_wrong_token(
    host: RunningHost, path: bytes, header: bytes
) -> None:
    reader, writer = await asyncio.open_connection(*host.authority)
    writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\nAuthorization: %b\r\n\r\n" % (path, header))
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_who_has_a_token_is_told_what_is_wrong(
    host: RunningHost, http: aiohttp.ClientSession
) -> None:
    headers = bearer(TOKENS[Role.VIEWER])
    for method, path, status in [
        ("GET", "/v2/ws", 404),
        ("POST", "/healthz", 405),
        ("GET", "/v1/ws", 400),
        ("GET", "/metrics", 200),
        ("GET", "/v1/stream/logs", 401),
        ("GET", "/v1/runner/stream/0123", 401),
    ]:
        async with http.request(method, host.url + path, headers=headers) as answer:
            assert (answer.status, path) == (status, path)


@pytest.mark.parametrize("path", sorted(UPGRADES))
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://evil.example:8000", "null", "http://127.0.0.1"]
)
async def test_a_page_of_another_site_may_not_talk_to_the_host(
    host: RunningHost, http: aiohttp.ClientSession, path: str, origin: str
) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await http.ws_connect(host.url + path, headers={"Origin": origin})
    assert caught.value.status == 403
    async with http.ws_connect(host.url + path, headers={"Origin": host.url}) as own:
        assert not own.closed
        assert "Server" not in own._response.headers


@pytest.mark.parametrize("path", sorted(UPGRADES))
@pytest.mark.parametrize(
    ("garbage", "code"),
    [
        (b"\xc1", CloseCode.BAD_FRAME),
        (b"", CloseCode.BAD_FRAME),
        (b"\x94\x00\x01\xa6whoami\x80", CloseCode.HELLO_EXPECTED),
        (b"\x90" * 5000, CloseCode.TOO_LARGE),
        (b"\x91" * 4000, CloseCode.BAD_FRAME),
        ("text", CloseCode.BAD_FRAME),
    ],
)
async def test_garbage_closes_its_own_connection_and_no_other(
    host: RunningHost, http: aiohttp.ClientSession, path: str, garbage: bytes | str, code: CloseCode
) -> None:
    async with await host.connect() as other, http.ws_connect(host.url + path) as there:
        if isinstance(garbage, str):
            await there.send_str(garbage)
        else:
            await there.send_bytes(garbage)
        closing = await asyncio.wait_for(there.receive(), 5)
        assert (closing.type, closing.data) == (aiohttp.WSMsgType.CLOSE, code)
        assert (await other.call(WHOAMI, WhoAmI())).user == "admin"


async def test_a_message_above_the_limit_of_the_wire_closes_its_connection(
    host: RunningHost,
) -> None:
    async with (
        await host.connect() as other,
        greeted(host.authority, TOKENS[Role.VIEWER]) as peer,
    ):
        await peer.send(frame(b"\x00" * 300_000))
        code, _ = await peer.end()
        assert code == 1009  # message too big (RFC 6455 section 7.4.1)
        assert (await other.call(WHOAMI, WhoAmI())).user == "admin"


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/v1/stream/logs", "/v1/nowhere"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "PROPFIND"])
async def test_a_page_of_another_site_is_refused_on_every_path(
    host: RunningHost, http: aiohttp.ClientSession, path: str, method: str
) -> None:
    headers = {"Origin": "http://evil.example", **bearer(TOKENS[Role.ADMIN])}
    async with http.request(method, host.url + path, headers=headers) as answer:
        assert answer.status == 403


async def test_all_are_told_though_some_go_while_others_are_told(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Served.close

    async def slowly(served: Served, code: int, reason: str) -> None:
        await close(served, code, reason)
        await asyncio.sleep(0.05)  # in which its own connection ends

    monkeypatch.setattr(Served, "close", slowly)
    clients = [await host.connect() for _ in range(3)]
    await host.stop()
    for client in clients:
        assert (await client.closed).code == CloseCode.GOING_AWAY


async def test_many_may_wait_to_be_let_in_and_few_are_at_once() -> None:
    app = web.Application()
    app[LOOP_TIME] = LoopTime()
    runner = web.AppRunner(app)
    await runner.setup()
    census = Census(1000, Refusals(lambda: 0.0))
    server, port = await listen(runner, "127.0.0.1", 0, census)
    (listening,) = server.sockets
    # Of a listening socket tcpi_sacked is how many may wait (Linux, net/ipv4/tcp.c, tcp_get_info).
    facts = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    assert int.from_bytes(facts[28:32], sys.byteorder) == min(1024, MOST_WAITING)
    clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
    for reader, writer in clients:
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 404 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    server.close()
    await runner.cleanup()


async def test_everybody_is_told_when_the_host_stops(host: RunningHost) -> None:
    visitor = await dial_runner(host, "n2", is_node=False)
    async with await host.connect() as client, linked_runner(host) as runner:
        began = asyncio.get_running_loop().time()
        await host.stop()
        assert asyncio.get_running_loop().time() - began < 1.5, "it waited for those it had told"
        for connection in (client, runner.connection, visitor.connection):
            ended = await connection.closed
            assert (ended.code, ended.reason) == (CloseCode.GOING_AWAY, "the host stops")
    await visitor.close()


async def test_bytes_that_are_no_http_leave_no_traceback_in_the_log(
    host: RunningHost, caplog: pytest.LogCaptureFixture
) -> None:
    address, port = host.url.removeprefix("http://").split(":")
    for garbage in (
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost\r\n\r\n",
        b"\x16\x03\x01\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection(address, int(port))
        writer.write(garbage)
        assert b" 400 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    assert [record for record in caplog.records if record.exc_info] == []
