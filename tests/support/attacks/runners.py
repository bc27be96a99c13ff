"""What a machine can do that was broken into, or that would like to be a node."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from protocol.session import CloseCode
from tests.support.attacks.target import Target
from tests.support.hostile import Peer, ShownOut, call, frame, greeted

DOOR: Final = "/v1/runner"
_encode: Final = msgspec.msgpack.encode
_NAN: Final = float("nan")
_INF: Final = float("inf")

_INVENTORIES: Final[tuple[dict[str, Any], ...]] = (
    {"cores": [0, 0, 0]},
    {"cores": [-1]},
    {"cores": [10**9]},
    {"memory": -1},
    {"memory": 2**64 - 1},
    {"max_tasks": -1},
    {"max_tasks": 2**63},
    {"numa": [{"number": 0}, {"number": 0}]},
    {"gpus": [{"index": 0, "uuid": "a"}, {"index": 1, "uuid": "a"}]},
    {"gpus": [{"index": -1, "uuid": "a"}]},
    {"hostname": "h" * 150_000},
)
_READINGS: Final[tuple[dict[str, Any], ...]] = (
    {"cpu_percent": _NAN},
    {"load_1m": _INF},
    {"at": -_INF},
    {"temperatures": {"core": _NAN}},
    {"memory_total": -1},
    {"memory_available": 2**64 - 1},
    {"disks": [{"path": "/", "total": -5, "free": 1}]},
    {"gpus": [{"uuid": "a", "power": _INF}]},
    {"tasks": [{"task": -1}]},
    {"tasks": [{"task": 1, "cpu_s": _NAN}]},
    {"disks": [{"path": "p" * 150_000, "total": 1, "free": 1}]},
)
_ENDS: Final[tuple[dict[str, Any], ...]] = (
    {"cause": "exited", "code": 256},
    {"cause": "exited", "code": -(2**63)},
    {"cause": "signalled", "signal": 0},
    {"cause": "signalled", "signal": 2**64 - 1},
    {"cause": "oom", "oom_kills": -1},
    {"cause": "bored"},
)


def _registration() -> dict[str, Any]:
    """Make the words of a run of a runner that has nothing to give."""
    return {"instance": secrets.token_hex(4), "inventory": {"max_tasks": 0}}


async def _ask(peer: Peer, number: int, method: str, params: object) -> Any:
    await peer.send(call(number, method, params))
    return await peer.reply(number)


async def _code(peer: Peer, number: int, method: str, params: object) -> str:
    error, _ = await _ask(peer, number, method, params)
    return str(error["code"]) if error is not None else ""


@asynccontextmanager
async def _registered(there: Target) -> AsyncIterator[Peer]:
    """Come as the node that was broken into, which has nothing to give."""
    async with greeted(there.authority, there.credential, DOOR, there.source) as peer:
        asked = _registration()
        error, answer = await _ask(peer, 1, "runner.register", asked)
        # Another attack may be there under that name, or have been there too often.
        if error is not None:
            assert error["code"] in {"conflict", "unavailable"}, error
        else:
            assert answer["node"] == there.node
        try:
            yield peer
        except ShownOut as reason:
            if reason.code != CloseCode.REPLACED:  # by another attack: this one was silent long
                raise


async def joining(there: Target) -> None:
    """Become a node by a join token that is none; do what nodes do without being one."""
    credential = "khr_" + secrets.token_hex(32)
    async with greeted(there.authority, "", DOOR, there.source) as peer:
        for number, token in enumerate(("", "x", "khj_" + "0" * 64, "\x00", there.token), 1):
            asked = {"token": token, "node": f"new{number}", "credential": credential}
            assert await _code(peer, number, "runner.join", asked) == "unauthenticated"
        asked = {"token": "x", "node": there.other_node, "credential": "short"}
        assert await _code(peer, 20, "runner.join", asked) == "bad_request"
        for number, method in enumerate(("register", "report", "heartbeat", "orders"), 30):
            assert await _code(peer, number, f"runner.{method}", {}) == "unauthenticated"
        assert await _code(peer, 40, "task.list", {}) == "unauthenticated"
    async with greeted(there.authority, there.credential, DOOR, there.source) as peer:
        asked = {"token": "x", "node": there.other_node, "credential": there.credential}
        assert await _code(peer, 1, "runner.join", asked) == "conflict"


async def wrong_doors(there: Target) -> None:
    """A user's token at the runners' door, a node's credential at the users'."""
    from tests.support.hostile import hello, opened

    for path, secret in ((DOOR, there.token), ("/v1/ws", there.credential)):
        async with opened(there.authority, path, there.source) as peer:
            await peer.send(hello(secret))
            assert (await peer.reply(0))[0]["code"] == "unauthenticated"
            assert (await peer.end())[0] == CloseCode.REFUSED


async def another_name(there: Target) -> None:
    """Register under the name of somebody else's node."""
    async with greeted(there.authority, there.credential, DOOR, there.source) as peer:
        asked = {"instance": "x", "inventory": {"max_tasks": 0}, "node": there.other_node}
        assert await _code(peer, 1, "runner.register", asked) == "conflict"


async def absurd_words(there: Target) -> None:
    """Inventories, readings and ends that cannot be; reports of what was never given to it."""
    async with _registered(there) as peer:
        number = 10
        for inventory in _INVENTORIES:
            number += 1
            asked = {**_registration(), "inventory": inventory}
            code = await _code(peer, number, "runner.register", asked)
            assert code in {"bad_request", "too_large"}, (str(inventory)[:80], code)
        for readings in _READINGS:
            number += 1
            code = await _code(peer, number, "runner.heartbeat", readings)
            assert code in {"bad_request", "too_large", "conflict"}, (str(readings)[:80], code)
        for exit_ in _ENDS:
            number += 1
            report = {"task": 1, "attempt": 1, "state": "ended", "exit": exit_}
            code = await _code(peer, number, "runner.report", {"reports": [report]})
            assert code in {"bad_request", "conflict"}, (exit_, code)
        strange: list[dict[str, Any]] = [
            {"task": 2**63 - 1, "attempt": 2**64 - 1, "state": "ended", "at": _NAN},
            {"task": 0, "attempt": -1, "state": "running", "started_at": _INF},
            {"task": 5, "attempt": 0, "state": "paused", "note": "n" * 100_000},
        ]
        assert await _code(peer, 98, "runner.report", {"reports": strange}) in {"", "conflict"}
        many = [{"task": number, "attempt": 1, "state": "running"} for number in range(5000)]
        assert await _code(peer, 99, "runner.report", {"reports": many}) in {"", "conflict"}


async def endless_registration(there: Target) -> None:
    """A registration that never ends, and one that knows of launches nobody else does."""
    many = [{"task": number, "attempt": 1, "state": "ended"} for number in range(6000)]
    asked = {**_registration(), "attempts": many}
    async with greeted(there.authority, there.credential, DOOR, there.source) as peer:
        codes = [
            await _code(peer, number, "runner.register", {**asked, "more": True})
            for number in range(1, 12)
        ]
        assert "too_large" in codes, codes
    async with greeted(there.authority, there.credential, DOOR, there.source) as peer:
        code = await _code(peer, 1, "runner.register", asked)
        assert code in {"", "conflict", "unavailable"}, code


async def registering_for_ever(there: Target) -> None:
    """Register, and again, and again."""
    asked = _registration()
    async with greeted(there.authority, there.credential, DOOR, there.source) as peer:
        codes = [await _code(peer, number, "runner.register", asked) for number in range(1, 50)]
        assert codes[-1] in {"unavailable", "conflict"}, codes
        assert set(codes) <= {"", "unavailable", "conflict"}, codes


async def heartbeat_flood(there: Target) -> None:
    """As many heartbeats as fit, large ones."""
    readings = {
        "cpu_percent": 1.0,
        "tasks": [{"task": number, "cpu_s": 1.0} for number in range(1000)],
    }
    async with _registered(there) as peer:
        for _ in range(4):
            beats = [call(number, "runner.heartbeat", readings) for number in range(10, 110)]
            sending = asyncio.ensure_future(peer.send(b"".join(beats)))
            answered = [(await peer.message())[1] for _ in range(100)]
            await sending
            assert sorted(answered) == list(range(10, 110))


async def unread_orders(there: Target) -> None:
    """Take orders with no credit and with too much, twice over, and read none."""
    async with _registered(there) as peer:
        await peer.send(call(2, "runner.orders"), call(3, "runner.orders"))
        await peer.send(frame(_encode((4, 2, 2**32 - 1))))
        code = await _code(peer, 4, "runner.heartbeat", {"cpu_percent": 1.0})
        assert code in {"", "conflict"}, code


#: In this order: the one that registers for ever is refused for a minute after it.
QUICK: Final = (
    joining,
    wrong_doors,
    another_name,
    absurd_words,
    unread_orders,
    heartbeat_flood,
    endless_registration,
    registering_for_ever,
)
SLOW: Final = ()
