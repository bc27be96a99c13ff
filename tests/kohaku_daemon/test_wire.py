"""The accepting side over real sockets: what strangers and bad peers meet, and that each call
gets its one reply whatever becomes of its handler.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest

from kohaku_daemon.wire import ItemSink
from protocol import carrier
from protocol.errors import Conflict, NotFound
from protocol.framing import MAX_GREETING, MAX_MESSAGE
from protocol.messages.cluster import Status, Update, WatchEnded
from protocol.messages.hello import Identity
from protocol.models.access import Role
from protocol.session import CloseCode
from tests.protocol.loopback import TOKEN, ScriptedHost, scripted_host
from tests.support.hostile import PING, call, frame, greeted

HELLO = [0, 1, "hello", {"version": 1, "token": TOKEN}]
STATUS = Status(cluster="77", version="1", started_at=0.0, nodes={})


class Stranger:
    """A peer that speaks nothing but msgpack over aiohttp, and may say anything."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self.socket = socket

    async def say(self, *frame: object) -> None:
        await self.socket.send_bytes(msgpack.packb(list(frame)))

    async def hear(self) -> Any:
        return msgpack.unpackb((await self.socket.receive(5)).data)

    async def ask(self, *call: object) -> Any:
        await self.say(*call)
        return await self.hear()

    async def enter(self) -> None:
        _, _, error, _ = await self.ask(*HELLO)
        assert error is None

    async def closing(self) -> tuple[int, str]:
        """Give code and reason of the close that must come next."""
        message = await self.socket.receive(5)
        assert message.type is aiohttp.WSMsgType.CLOSE, message
        return message.data, message.extra or ""


@pytest.fixture
async def host() -> AsyncIterator[ScriptedHost]:
    async with scripted_host(hello_timeout_s=0.3) as host:
        yield host


@pytest.fixture
async def stranger(host: ScriptedHost) -> AsyncIterator[Stranger]:
    async with aiohttp.ClientSession() as http, http.ws_connect(f"{host.url}/v1/ws") as socket:
        yield Stranger(socket)


async def identity(_: object) -> msgspec.Struct:
    return Identity("ann", Role.USER)  # type: ignore[arg-type]


# -- Strangers ------------------------------------------------------------------------


async def test_who_says_nothing_is_shown_out(stranger: Stranger) -> None:
    assert (await stranger.closing())[0] == CloseCode.HELLO_TIMEOUT


async def test_who_calls_before_hello_is_shown_out(host: ScriptedHost, stranger: Stranger) -> None:
    await stranger.say(0, 1, "whoami", {})
    assert (await stranger.closing())[0] == CloseCode.HELLO_EXPECTED
    assert host.asked == []


async def test_a_wrong_token_is_answered_and_then_shown_out(stranger: Stranger) -> None:
    kind, number, error, result = await stranger.ask(0, 9, "hello", {"version": 1, "token": "no"})
    assert (kind, number, error["code"], result) == (1, 9, "unauthenticated", None)
    assert (await stranger.closing())[0] == CloseCode.REFUSED


async def test_a_hello_of_wrong_types_is_told_what_is_wrong(stranger: Stranger) -> None:
    _, _, error, _ = await stranger.ask(0, 9, "hello", {"version": "1"})
    assert (error["code"], error["message"]) == (
        "bad_request", "hello: version: expected `int`, got `str`",
    )  # fmt: skip
    assert (await stranger.closing())[0] == CloseCode.REFUSED


@pytest.mark.parametrize("size", [MAX_GREETING + 1, MAX_MESSAGE + 1, 2_000_000])
async def test_a_stranger_may_not_say_much(stranger: Stranger, size: int) -> None:
    await stranger.socket.send_bytes(bytes(size))
    assert (await stranger.closing())[0] in (
        CloseCode.TOO_LARGE,
        aiohttp.WSCloseCode.MESSAGE_TOO_BIG,
    )


async def test_compression_is_not_spoken(host: ScriptedHost) -> None:
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{host.url}/v1/ws", compress=15) as socket,
    ):
        assert socket.compress == 0


async def test_a_foreign_web_page_is_refused(host: ScriptedHost) -> None:
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await http.ws_connect(f"{host.url}/v1/ws", origin="http://evil.example")
        assert caught.value.status == 403
        async with http.ws_connect(f"{host.url}/v1/ws", origin=host.url):
            pass


async def test_a_plain_request_is_no_connection(host: ScriptedHost) -> None:
    async with aiohttp.ClientSession() as http, http.get(f"{host.url}/v1/ws") as response:
        assert response.status in (400, 426)


# -- Bad peers ------------------------------------------------------------------------


async def test_a_text_message_is_shown_out(stranger: Stranger) -> None:
    await stranger.enter()
    await stranger.socket.send_str("hello")
    assert (await stranger.closing())[0] == CloseCode.BAD_FRAME


async def test_garbage_is_shown_out(stranger: Stranger) -> None:
    await stranger.enter()
    await stranger.socket.send_bytes(b"\x94\x00\x02\xa1x" + b"\x91" * 100_000)
    code, reason = await stranger.closing()
    assert (code, reason) == (CloseCode.BAD_FRAME, "nested too deeply")


async def test_one_bad_peer_is_nobody_elses_trouble(host: ScriptedHost) -> None:
    host.answers["whoami"] = identity
    async with aiohttp.ClientSession() as http:
        good = Stranger(await http.ws_connect(f"{host.url}/v1/ws"))
        bad = Stranger(await http.ws_connect(f"{host.url}/v1/ws"))
        await good.enter()
        await bad.enter()
        await bad.socket.send_bytes(b"\xc1")
        await bad.closing()
        assert (await good.ask(0, 2, "whoami", {}))[2] is None


async def test_a_full_sized_message_is_taken(host: ScriptedHost, stranger: Stranger) -> None:
    await stranger.enter()
    params = {"later": b""}
    params["later"] = bytes(MAX_MESSAGE - len(msgpack.packb([0, 2, "whoami", params])) - 3)
    host.answers["whoami"] = identity
    assert (await stranger.ask(0, 2, "whoami", params))[2] is None


async def test_who_does_not_read_is_heard_no_more(host: ScriptedHost, stranger: Stranger) -> None:
    async def heavy(_: object) -> msgspec.Struct:
        return msgspec.structs.replace(STATUS, version="x" * 200_000)

    host.answers["cluster.status"] = heavy
    await stranger.enter()
    for number in range(2, 252):
        await stranger.say(0, number, "cluster.status", {})
    async with aiohttp.ClientSession() as http, http.ws_connect(f"{host.url}/v1/ws") as other:
        await Stranger(other).enter()
        await asyncio.wait_for(Stranger(other).ask(0, 2, "cluster.status", {}), 5)
    assert host.count("cluster.status") < 60, "what nobody reads is made all the same"
    for _ in range(250):  # and once it reads, all of it comes
        assert (await stranger.hear())[2] is None


async def test_who_does_not_read_what_it_waited_for_is_given_up(
    host: ScriptedHost, stranger: Stranger
) -> None:
    go = asyncio.Event()

    async def heavy(_: object) -> msgspec.Struct:
        await go.wait()
        return msgspec.structs.replace(STATUS, version="x" * 200_000)

    host.answers["cluster.status"] = heavy
    await stranger.enter()
    for number in range(2, 252):
        await stranger.say(0, number, "cluster.status", {})
    await host.until(lambda: host.count("cluster.status") == 250)
    go.set()
    await host.until(lambda: not host.open)


async def test_who_reads_no_more_is_given_up_in_time(
    host: ScriptedHost, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrier, "WRITE_TIMEOUT_S", 0.2)

    async def flood(_: object, sink: ItemSink) -> msgspec.Struct:
        while True:
            await sink.send(Update(revision="x" * 100_000))

    host.answers["watch"] = flood
    await stranger.enter()
    await stranger.say(0, 2, "watch", {"topics": []})
    await stranger.say(4, 2, 1_000_000)
    await host.until(lambda: not host.open)
    assert host.cancelled == ["watch"]


@pytest.mark.parametrize(
    "small",
    [
        frame(b"", PING),
        frame(msgpack.packb([2, "ping", None])),
        frame(msgpack.packb([2, "no.such.news", None])),
        frame(msgpack.packb([5, 9])),
    ],
    ids=["ping", "ping of ours", "notify", "cancel"],
)
async def test_a_flood_of_small_messages_leaves_others_their_turns(
    host: ScriptedHost, small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = carrier.Carrier._take
    at_once = most = 0

    async def counted(self: carrier.Carrier, message: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        return await take(self, message)

    async def turn() -> None:
        nonlocal at_once
        while True:
            at_once = 0
            await asyncio.sleep(0)

    host.answers["whoami"] = identity
    address, _, port = host.url.removeprefix("http://").rpartition(":")
    async with greeted((address, int(port)), TOKEN) as peer:
        monkeypatch.setattr(carrier.Carrier, "_take", counted)
        turning = asyncio.ensure_future(turn())
        peer.writer.write(small * 4000 + call(1, "whoami"))
        assert (await peer.reply(1))[0] is None
        turning.cancel()
    assert most <= 32  # two turns of 16, if this is counted between them


async def test_calls_that_wait_for_one_thing_do_not_run_on_at_once(
    host: ScriptedHost, stranger: Stranger
) -> None:
    go = asyncio.Event()
    at_once = most = 0

    async def work(_: object) -> msgspec.Struct:
        nonlocal at_once, most
        await go.wait()
        until = time.thread_time() + 0.004
        while time.thread_time() < until:
            pass
        at_once += 1
        most = max(most, at_once)
        return STATUS

    async def turn() -> None:
        nonlocal at_once
        while True:
            at_once = 0
            await asyncio.sleep(0)

    host.answers["cluster.status"] = work
    await stranger.enter()
    for number in range(2, 202):
        await stranger.say(0, number, "cluster.status", {})
    await host.until(lambda: host.count("cluster.status") == 200)
    turning = asyncio.ensure_future(turn())
    go.set()
    for _ in range(200):
        assert (await stranger.hear())[2] is None
    turning.cancel()
    assert most < 30  # what fits into a round of the loop, and not two hundred


# -- Calls ----------------------------------------------------------------------------


async def test_an_unknown_method_is_told_with_the_nearest(stranger: Stranger) -> None:
    await stranger.enter()
    _, _, error, _ = await stranger.ask(0, 2, "tsk.list", {"anything": [[[]]]})
    assert error == {
        "code": "bad_request",
        "message": "there is no method 'tsk.list'",
        "hint": "did you mean task.list?",
    }


async def test_a_method_of_the_other_door_is_as_unknown(stranger: Stranger) -> None:
    await stranger.enter()
    _, _, error, _ = await stranger.ask(0, 2, "runner.report", {"reports": []})
    assert (error["code"], error["message"]) == (
        "bad_request", "there is no method 'runner.report'",
    )  # fmt: skip


async def test_hello_is_said_once(stranger: Stranger) -> None:
    await stranger.enter()
    _, _, error, _ = await stranger.ask(*HELLO)
    assert error["code"] == "bad_request"


async def test_a_refusal_arrives_whole(host: ScriptedHost, stranger: Stranger) -> None:
    async def refuse(_: object) -> msgspec.Struct:
        raise Conflict("task 7 is over", hint="look at it", details={"task": 7})

    host.answers["task.kill"] = refuse
    await stranger.enter()
    assert await stranger.ask(0, 2, "task.kill", {}) == [
        1, 2,
        {"code": "conflict", "message": "task 7 is over", "hint": "look at it",
         "details": {"task": 7}},
        None,
    ]  # fmt: skip


async def test_a_bug_is_logged_and_not_told(
    host: ScriptedHost, stranger: Stranger, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: object) -> msgspec.Struct:
        raise ValueError("password=hunter2")

    host.answers["whoami"] = fail
    await stranger.enter()
    with caplog.at_level(logging.ERROR):
        _, _, error, _ = await stranger.ask(0, 2, "whoami", {})
    assert error["code"] == "internal"
    assert "hunter2" not in str(error)
    assert "hunter2" in caplog.text
    assert error["message"].rpartition(" ")[2] in caplog.text
    host.answers["whoami"] = identity
    assert (await stranger.ask(0, 3, "whoami", {}))[2] is None


async def test_an_answer_too_large_is_told_as_such(host: ScriptedHost, stranger: Stranger) -> None:
    async def heavy(_: object) -> msgspec.Struct:
        return msgspec.structs.replace(STATUS, version="x" * MAX_MESSAGE)

    host.answers["cluster.status"] = heavy
    await stranger.enter()
    _, _, error, _ = await stranger.ask(0, 2, "cluster.status", {})
    assert error["code"] == "too_large"


async def test_a_slow_call_holds_up_nobody(host: ScriptedHost, stranger: Stranger) -> None:
    go = asyncio.Event()

    async def slow(_: object) -> msgspec.Struct:
        await go.wait()
        return STATUS

    host.answers |= {"cluster.status": slow, "whoami": identity}
    await stranger.enter()
    await stranger.say(0, 2, "cluster.status", {})
    assert (await stranger.ask(0, 3, "whoami", {}))[1] == 3
    go.set()
    assert (await stranger.hear())[1] == 2


async def test_a_cancel_reaches_the_handler_and_is_answered(
    host: ScriptedHost, stranger: Stranger
) -> None:
    async def never(_: object) -> msgspec.Struct:
        await asyncio.Event().wait()
        raise AssertionError

    host.answers["task.wait"] = never
    await stranger.enter()
    await stranger.say(0, 2, "task.wait", {})
    await host.until(lambda: host.count("task.wait") == 1)
    _, number, error, _ = await stranger.ask(5, 2)
    assert (number, error["code"]) == (2, "unavailable")
    assert host.cancelled == ["task.wait"]


async def test_a_call_cancelled_before_it_began_is_answered_too(
    host: ScriptedHost, stranger: Stranger
) -> None:
    await stranger.enter()
    for number in range(2, 50):
        await stranger.say(0, number, "task.wait", {})
        await stranger.say(5, number)
    assert {(await stranger.hear())[1] for _ in range(2, 50)} == set(range(2, 50))


async def test_who_leaves_takes_its_handlers_along(host: ScriptedHost, stranger: Stranger) -> None:
    async def never(*_: object) -> msgspec.Struct:
        await asyncio.Event().wait()
        raise AssertionError

    host.answers |= {"task.wait": never, "watch": never}
    await stranger.enter()
    await stranger.say(0, 2, "task.wait", {})
    await stranger.say(0, 3, "watch", {"topics": []})
    await host.until(lambda: len(host.asked) == 2)
    await stranger.socket.close()
    await host.until(lambda: sorted(host.cancelled) == ["task.wait", "watch"])
    await host.until(lambda: not host.open)


async def test_the_host_may_close_with_its_reason(host: ScriptedHost, stranger: Stranger) -> None:
    await stranger.enter()
    (served,) = host.open
    assert served.address == "127.0.0.1"
    await served.close(CloseCode.REPLACED, "a newer connection took its place")
    assert await stranger.closing() == (CloseCode.REPLACED, "a newer connection took its place")


# -- Streams --------------------------------------------------------------------------


async def test_a_stream_sends_what_there_is_credit_for(
    host: ScriptedHost, stranger: Stranger
) -> None:
    async def count(_: object, sink: ItemSink) -> msgspec.Struct:
        for number in range(5):
            await sink.send(Update(revision=str(number)))
        return WatchEnded()

    host.answers |= {"watch": count, "whoami": identity}
    await stranger.enter()
    await stranger.say(0, 2, "watch", {"topics": []})
    await stranger.say(4, 2, 2)
    assert [(await stranger.hear())[2] for _ in range(2)] == [{"revision": "0"}, {"revision": "1"}]
    assert (await stranger.ask(0, 3, "whoami", {}))[:2] == [1, 3]
    await stranger.say(4, 2, 100)
    assert [(await stranger.hear())[2] for _ in range(3)] == [{"revision": n} for n in "234"]
    assert await stranger.hear() == [1, 2, None, {}]


async def test_an_item_too_large_is_the_handlers_error(
    host: ScriptedHost, stranger: Stranger
) -> None:
    async def heavy(_: object, sink: ItemSink) -> msgspec.Struct:
        await sink.send(Update(revision="x" * MAX_MESSAGE))
        return WatchEnded()

    host.answers["watch"] = heavy
    await stranger.enter()
    await stranger.say(0, 2, "watch", {"topics": []})
    _, _, error, _ = await stranger.ask(4, 2, 2)
    assert error["code"] == "too_large"


# -- Calls that need no job -----------------------------------------------------------

Answering = Callable[[msgspec.Struct], None]


async def test_a_call_that_is_taken_is_answered_once_at_once_or_later(
    host: ScriptedHost, stranger: Stranger
) -> None:
    answers: asyncio.Queue[Answering] = asyncio.Queue()
    said = await identity(None)

    def later(_: object, answer: Answering) -> bool:
        answers.put_nowait(answer)
        return True

    def at_once(_: object, answer: Answering) -> bool:
        answer(said)
        return True

    await stranger.enter()
    host.open[-1].take = later
    await stranger.say(0, 2, "whoami", {})
    await stranger.say(5, 2)  # there is no job to cancel: the answer comes all the same
    await stranger.say(0, 3, "whoami", {})
    async with asyncio.timeout(5):
        first, second = await answers.get(), await answers.get()
    second(said)
    first(said)
    assert [(await stranger.hear())[:3] for _ in range(2)] == [[1, 3, None], [1, 2, None]]

    host.open[-1].take = at_once
    assert (await stranger.ask(0, 2, "whoami", {}))[:3] == [1, 2, None]
    assert host.asked == []


async def test_a_call_that_is_not_taken_has_a_job(host: ScriptedHost, stranger: Stranger) -> None:
    asked: list[msgspec.Struct] = []

    def leave(params: msgspec.Struct, _: Answering) -> bool:
        asked.append(params)
        return False

    host.answers["whoami"] = identity
    await stranger.enter()
    host.open[-1].take = leave
    assert (await stranger.ask(0, 2, "whoami", {}))[:3] == [1, 2, None]
    assert host.asked == [("whoami", asked[0])]


async def test_whoever_takes_a_call_may_refuse_it_and_have_bugs(
    host: ScriptedHost, stranger: Stranger, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> bool:
        raise NotFound("not here")

    def fail(*_: object) -> bool:
        raise ZeroDivisionError

    await stranger.enter()
    host.open[-1].take = refuse
    assert (await stranger.ask(0, 2, "whoami", {}))[2]["code"] == "not_found"
    host.open[-1].take = fail
    assert (await stranger.ask(0, 3, "whoami", {}))[2]["code"] == "internal"
    assert "ZeroDivisionError" in caplog.text
