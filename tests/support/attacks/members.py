"""What somebody can do who has a token: calls, credit, streams, tickets, all out of measure."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Final

import msgspec

from protocol.session import MAX_CALLS, CloseCode
from tests.support.attacks.strangers import TOO_BIG
from tests.support.attacks.target import Target
from tests.support.hostile import (
    CONTINUATION,
    DROPPED,
    PING,
    Peer,
    call,
    dial,
    frame,
    greeted,
    upgrade_request,
)

_encode: Final = msgspec.msgpack.encode
_SUBMIT: Final = "task.submit"


async def _ask(peer: Peer, number: int, method: str, params: object) -> Any:
    await peer.send(call(number, method, params))
    return await peer.reply(number)


async def _check_alive(peer: Peer) -> None:
    """Assert that a connection goes on, and that it is the same one."""
    error, identity = await _ask(peer, 4_000_000, "whoami", {})
    assert error is None, error
    assert identity["user"]


async def bad_frames(there: Target) -> None:
    """Frames after hello that end the connection, each on its own."""
    watch = call(1, "watch", {"topics": ["events"]})
    broken: dict[str, tuple[bytes, int]] = {
        "no frame": (frame(b"\xc1"), CloseCode.BAD_FRAME),
        "nested 250,000 deep": (frame(b"\x94\0\1\xa6whoami" + b"\x91" * 250_000), 4000),
        "array32 of 4 G": (frame(b"\x94\0\1\xa6whoami\xdd\xff\xff\xff\xff"), 4000),
        "a message of 300 KB": (frame(bytes(300_000)), TOO_BIG),
        "a message of 10 MB": (frame(bytes(1000), length=10_000_000), TOO_BIG),
        "a method of 65": (frame(_encode((0, 1, "m" * 65, {}))), CloseCode.BAD_FRAME),
        "a number of 33 bits": (frame(_encode((0, 2**32, "whoami", {}))), CloseCode.BAD_FRAME),
        "a number below 0": (frame(_encode((0, -1, "whoami", {}))), CloseCode.BAD_FRAME),
        "a seventh frame": (frame(_encode((6, 1))), CloseCode.BAD_FRAME),
        "a reply to nothing": (frame(_encode((1, 7, None, {}))), CloseCode.BAD_NUMBER),
        "an item of nothing": (frame(_encode((3, 7, {}))), CloseCode.BAD_NUMBER),
        "an item of its own call": (watch + frame(_encode((3, 1, {}))), CloseCode.BAD_NUMBER),
        "a number twice": (watch + watch, CloseCode.BAD_NUMBER),
        "credit 0": (watch + frame(_encode((4, 1, 0))), CloseCode.BAD_FRAME),
        "credit -1": (watch + frame(_encode((4, 1, -1))), CloseCode.BAD_FRAME),
        "credit of 33 bits": (watch + frame(_encode((4, 1, 2**32))), CloseCode.BAD_FRAME),
        "credit 1.5": (watch + frame(_encode((4, 1, 1.5))), CloseCode.BAD_FRAME),
        "credit without end": (watch + frame(_encode((4, 1, float("inf")))), CloseCode.BAD_FRAME),
    }
    for name, (said, code) in broken.items():
        async with greeted(there.authority, there.token, source=there.source) as peer:
            await peer.send(said)
            ended, _ = await peer.end()
            assert ended == code, f"{name}: {ended}"


async def bad_calls(there: Target) -> None:
    """Calls that are answered with an error, all on one connection that goes on."""
    spec = {"command": ["true"], "cores": 0}
    asked: list[tuple[str, object]] = [
        ("whoam", {}),
        ("x" * 64, {}),
        ("runner.report", {"reports": []}),
        ("hello", {"version": 1}),
        ("task.show", {"task": "1"}),
        ("task.show", {"task": 2**64 - 1}),
        ("task.show", {"task": -1}),
        ("task.show", {"task": 12345}),
        ("task.show", []),
        ("task.show", None),
        ("task.show", {1: 2}),
        ("task.wait", {"tasks": list(range(1, 30_000))}),
        ("task.logs", {"task": 2**63 - 1}),
        ("node.show", {"node": "n" * 200_000}),
        ("watch", {"topics": []}),
        ("watch", {"topics": ["secrets"]}),
        ("watch", {"topics": ["tasks"], "tasks": list(range(5000))}),
        (_SUBMIT, {"request_id": "r" * 8, "spec": {**spec, "command": []}}),
        (_SUBMIT, {"request_id": "r" * 8, "spec": {**spec, "cores": -1}}),
        (_SUBMIT, {"request_id": "r" * 8, "spec": {**spec, "memory": 2**64 - 1}}),
        (_SUBMIT, {"request_id": "r" * 8, "spec": {**spec, "grace_s": float("nan")}}),
        (_SUBMIT, {"request_id": "r" * 8, "spec": spec, "array": 2**62}),
        (_SUBMIT, {"request_id": "r" * 8, "spec": spec, "targets": [{"node": "n" * 200_000}]}),
        (_SUBMIT, {"request_id": "r" * 8, "spec": {**spec, "command": ["a\0b"]}}),
        (_SUBMIT, {"request_id": "r" * 200_000, "spec": spec}),
        (_SUBMIT, {"rows": [{}] * 130_000}),
    ]
    async with greeted(there.authority, there.token, source=there.source) as peer:
        for number, (method, params) in enumerate(asked, 1):
            error, _ = await _ask(peer, number, method, params)
            assert error is not None, (method, str(params)[:80])
            assert error["code"] not in {"internal", "timeout"}, (method, str(params)[:80], error)
        for name, bad in (("extension", b"\xc7\x01\x05\0"), ("cut short", b"\x81\xa4task")):
            await peer.send(frame(b"\x94\0\xcd\x03\xe8\xa9task.show" + bad))
            if name == "cut short":
                assert (await peer.end())[0] == CloseCode.BAD_FRAME
            else:
                assert (await peer.reply(1000))[0]["code"] == "bad_request"


async def late_words(there: Target) -> None:
    """Credit and cancels for calls that are over or never were: no error, for they may cross."""
    async with greeted(there.authority, there.token, source=there.source) as peer:
        await _ask(peer, 1, "whoami", {})
        for number in (1, 2, 2**32 - 1):
            await peer.send(frame(_encode((4, number, 2**32 - 1))), frame(_encode((5, number))))
        await peer.send(frame(_encode((2, "no.such.news", {"a": [1] * 1000}))))
        await _check_alive(peer)
        await peer.send(call(3, "watch", {"topics": ["events"]}))
        await peer.send(frame(_encode((4, 3, 2**32 - 1))) * 5000)  # above 2**44 in all
        await _check_alive(peer)


async def thousands_of_calls(there: Target) -> None:
    """More calls at once than may be open: each is answered once, the most with a refusal."""
    many = 3000
    methods = ("whoami", "cluster.status", "task.list", "node.list", "no.such.method")
    async with greeted(there.authority, there.token, source=there.source) as peer:
        calls = b"".join(
            call(number, methods[number % 5], {"limit": 500} if number % 5 == 2 else {})
            for number in range(1, many + 1)
        )
        sending = asyncio.ensure_future(peer.send(calls))
        answered = [(await peer.message())[1] for _ in range(many)]
        await sending
        assert sorted(answered) == list(range(1, many + 1))
        await _check_alive(peer)


async def cancel_storm(there: Target) -> None:
    """Calls that wait, cancelled again and again: each is answered once."""
    async with greeted(there.authority, there.token, source=there.source) as peer:
        for _ in range(5):
            storm = [call(number, "watch", {"topics": ["tasks"]}) for number in range(MAX_CALLS)]
            cancels = [frame(_encode((5, number))) for number in range(MAX_CALLS)]
            sending = asyncio.ensure_future(peer.send(b"".join(storm + cancels * 20)))
            answered = [(await peer.message())[1] for _ in range(MAX_CALLS)]
            await sending
            assert sorted(answered) == list(range(MAX_CALLS))
        await _check_alive(peer)


async def unread_watches(there: Target) -> None:
    """Watches of everything, with no credit, or with all of it and nobody who reads."""
    topics = {"topics": ["tasks", "nodes", "readings", "events"]}
    watches = [call(number, "watch", topics) for number in range(200)]
    credit = [frame(_encode((4, number, 2**32 - 1))) for number in range(200)]
    lists = [call(number, "task.list", {"limit": 500}) for number in range(200, 250)]
    async with (
        greeted(there.authority, there.token, source=there.source) as idle,
        greeted(there.authority, there.token, source=there.source) as deaf,
    ):
        await idle.send(*watches)
        await _check_alive(idle)
        await deaf.send(*watches, *credit, *lists)
        await asyncio.sleep(0.5)  # it is the point that nothing is read meanwhile
        await _check_alive(idle)


async def floods(there: Target) -> None:
    """As many small frames as fit: pings of both kinds, cancels, news, parts of nothing."""
    small = {
        "pings": frame(b"", PING),
        "pings of ours": frame(_encode((2, "ping", None))),
        "cancels": frame(_encode((5, 1))),
        "news": frame(_encode((2, "x", None))),
    }
    for one in small.values():
        async with greeted(there.authority, there.token, source=there.source) as peer:
            sending = asyncio.ensure_future(peer.send(one * 20_000))
            await asyncio.wait_for(_pass_over(peer, sending), 30)
    async with greeted(there.authority, there.token, source=there.source) as peer:
        await peer.send(frame(b"\x94", final=False), frame(b"", CONTINUATION, final=False) * 50_000)
        await peer.send(frame(b"\0\1\xa6whoami\x80", CONTINUATION))
        assert (await peer.reply(1))[0] is None


async def _pass_over(peer: Peer, sending: asyncio.Future[None]) -> None:
    """Read while a flood goes out, until a call after it is answered."""

    async def send_call() -> None:
        await sending
        await peer.send(call(1, "whoami"))

    asking = asyncio.ensure_future(send_call())
    while True:
        opcode, payload = await peer.frame()
        if opcode == 2 and payload[:3] == b"\x94\x01\x01":
            break
    await asking


async def tickets(there: Target) -> None:
    """A ticket made up, used twice, or shown at other doors."""

    async def knock(path: str, header: str) -> str:
        peer = await dial(there.authority, there.source)
        await peer.send(upgrade_request(path, Authorization=header))
        status = (await peer.head()).split()[1]
        await peer.wait_closed()
        return status

    for made_up in ("", "0" * 64, "x", "\xff" * 64, "../" * 20):
        assert await knock("/v1/stream/logs", f"Ticket {made_up}") == "401"
    async with greeted(there.authority, there.token, source=there.source) as peer:
        request = {"request_id": secrets.token_hex(8), "spec": {"command": ["true"], "cores": 0}}
        error, made = await _ask(peer, 1, _SUBMIT, request)
        assert error is None, error
        error, answer = await _ask(peer, 2, "task.logs", {"task": made["runs"][0][0]})
        assert error is None, error
        text, path = answer["ticket"], answer["path"]
        for wrong in (f"Bearer {text}", f"Ticket {text[:-1]}", f"Ticket {text} x", text):
            assert await knock(path, wrong) == "401", wrong
        assert await knock("/metrics", f"Ticket {text}") == "401"
        assert await knock("/v1/runner/stream/" + text, f"Ticket {text}") == "401"
        assert await knock(path, f"Bearer {there.token}") == "401"
        assert await knock(path, f"Ticket {text}") == "101"
        assert await knock(path, f"Ticket {text}") == "401"
        error, answer = await _ask(peer, 3, "task.logs", {"task": made["runs"][0][0]})
        talker = await dial(there.authority, there.source)
        header = f"Ticket {answer['ticket']}"
        await talker.send(upgrade_request(path, Authorization=header))
        await talker.head()
        await talker.send(frame(b"", PING) * 20_000, frame(bytes(60_000)))
        assert (await talker.end())[0] in {1000, DROPPED}
        await talker.wait_closed()


QUICK: Final = (
    bad_frames,
    bad_calls,
    late_words,
    thousands_of_calls,
    cancel_storm,
    unread_watches,
    floods,
    tickets,
)
SLOW: Final = ()
