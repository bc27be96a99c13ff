"""The vectors of the specification, against our codec and against plain MessagePack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest

from protocol import client, framing, spec
from protocol.framing import Call, Item, Reply, decode_failure, decode_frame, decode_value
from protocol.messages.runner import Orders
from protocol.messages.stream import LogChunk, LogEnd
from protocol.methods import METHODS, StreamingMethod
from protocol.session import Ended, Session
from protocol.tunnel import TunnelFrame, TunnelProto, TunnelType, decode_tunnel, encode_tunnel

VECTORS: Final = json.loads(Path(spec.PATH).with_name("vectors.json").read_text())

#: Method whose result or item a vector's reply or item is.
RESULT_OF: Final = {
    "welcome": "hello", "submitted": "task.submit", "submitted before": "task.submit",
    "not over yet": "task.wait", "over": "task.wait", "a task that ended": "task.show",
    "a watch that ended": "watch", "a ticket": "task.logs", "first update": "watch",
    "an update": "watch", "an order to start": "runner.orders",
}  # fmt: skip


def plain(value: Any) -> Any:
    """Read the JSON of a vector: what JSON has no word for is marked."""
    match value:
        case {"$int": text}:
            return int(text)
        case {"$bytes": text}:
            return bytes.fromhex(text)
        case dict():
            return {key: plain(inner) for key, inner in value.items()}
        case list():
            return [plain(inner) for inner in value]
        case _:
            return value


def shortest(data: bytes) -> bytes:
    return bytes(msgpack.packb(msgpack.unpackb(data)))


def rows(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", VECTORS[kind], ids=lambda row: row["name"])


@rows("frames")
def test_frames_in_plain_msgpack(row: dict[str, Any]) -> None:
    assert msgpack.unpackb(bytes.fromhex(row["hex"])) == plain(row["frame"])
    assert msgpack.packb(plain(row["frame"])).hex() == row["hex"]


@rows("frames")
def test_frames_in_our_codec(row: dict[str, Any]) -> None:
    """Read to its type and written again, a message says the same in the same order.

    Its bytes may differ in one thing: msgspec writes the header of a large map before it knows
    how many fields are at their defaults, and takes the longer one.
    """
    data = bytes.fromhex(row["hex"])
    frame = decode_frame(data)
    if isinstance(frame, Call):
        params = decode_value(frame.params, METHODS[frame.method].params, frame.method)
        assert shortest(framing.encode_call(frame.id, frame.method, params)) == data
    elif isinstance(frame, Reply) and row["name"] not in RESULT_OF:
        error = decode_failure(frame.error)
        assert error is not None
        assert shortest(framing.encode_failure(frame.id, error)) == data
    elif isinstance(frame, Reply):
        method = METHODS[RESULT_OF[row["name"]]]
        result = decode_value(frame.result, method.result, method.name)
        assert shortest(framing.encode_reply(frame.id, result)) == data
    elif isinstance(frame, Item):
        streaming = METHODS[RESULT_OF[row["name"]]]
        assert isinstance(streaming, StreamingMethod)
        item = decode_value(frame.item, streaming.item, streaming.name)
        assert shortest(framing.encode_item(frame.id, item)) == data
        if isinstance(item, Orders):
            assert len(item.orders) == 2
    else:
        assert msgspec.msgpack.encode(frame) == data


def test_frames_cover_every_kind() -> None:
    kinds = {type(decode_frame(bytes.fromhex(row["hex"]))).__name__ for row in VECTORS["frames"]}
    assert kinds == {"Call", "Reply", "Notify", "Item", "Credit", "Cancel"}


@rows("log items")
def test_log_items(row: dict[str, Any]) -> None:
    data = bytes.fromhex(row["hex"])
    assert msgpack.packb(plain(row["item"])) == data
    item = client.decode_log(data)
    fields = plain(row["item"])
    if isinstance(item, LogChunk):
        assert fields == [1, item.source.value, item.offset, item.data]
        assert msgspec.msgpack.encode(item) == data
    else:
        assert item == LogEnd(*fields[1:4], *map(tuple, fields[4:]))


@rows("tunnel")
def test_tunnel_frames(row: dict[str, Any]) -> None:
    data, said = bytes.fromhex(row["hex"]), row["frame"]
    frame = TunnelFrame(
        TunnelType(said["type"]),
        TunnelProto(said["proto"]),
        said["client_id"],
        said["port"],
        bytes.fromhex(said["payload"]),
    )
    assert decode_tunnel(data) == frame
    assert encode_tunnel(frame) == data


def test_tunnel_frames_cover_every_type() -> None:
    assert {row["frame"]["type"] for row in VECTORS["tunnel"]} == set(TunnelType)


@rows("violations")
def test_violations_close_with_their_code(row: dict[str, Any]) -> None:
    session = Session("accepting", 0.0)
    if row["state"] == "open":
        session.receive(msgpack.packb([0, 1, "hello", {}]), 0.0)
        session.reply(1, {})
    (event,) = session.receive(bytes.fromhex(row["hex"]), 0.0)
    assert isinstance(event, Ended)
    assert event.code == row["close"]
