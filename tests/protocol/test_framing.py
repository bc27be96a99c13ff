"""What goes over the wire comes back the same, and what a stranger sends costs next to nothing."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import suppress
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import framing
from protocol.errors import BadRequest, NotFound, TooLarge, Unsupported
from protocol.framing import (
    MAX_ERROR,
    MAX_ID,
    MAX_MESSAGE,
    MAX_METHOD,
    MAX_NESTING,
    Call,
    Cancel,
    Credit,
    Frame,
    FrameTooLarge,
    Item,
    Notify,
    ProtocolViolation,
    Reply,
    decode_failure,
    decode_frame,
    decode_value,
    pack_value,
    unpack_value,
)
from protocol.messages.task import ListTasks, SubmitTask

numbers = st.integers(0, MAX_ID)
names = st.text(min_size=1, max_size=MAX_METHOD)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def nest(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


@given(numbers, names, plain)
def test_frames_are_what_plain_msgpack_makes_of_them(number: int, name: str, value: Any) -> None:
    packed = msgspec.Raw(msgpack.packb(value))
    call = msgpack.packb([0, number, name, value])
    assert framing.encode_call(number, name, packed) == call
    assert decode_frame(call) == Call(number, name, packed)

    reply = msgpack.packb([1, number, None, value])
    assert framing.encode_reply(number, packed) == reply
    assert decode_frame(reply) == Reply(number, msgspec.Raw(b"\xc0"), packed)

    notify = msgpack.packb([2, name, value])
    assert framing.encode_notify(name, packed) == notify
    assert decode_frame(notify) == Notify(name, packed)

    item = msgpack.packb([3, number, value])
    assert framing.encode_item(number, packed) == item
    assert decode_frame(item) == Item(number, packed)


@given(numbers, st.integers(1, MAX_ID))
def test_credit_and_cancel_are_what_plain_msgpack_makes_of_them(number: int, n: int) -> None:
    assert framing.encode_credit(number, n) == msgpack.packb([4, number, n])
    assert decode_frame(msgpack.packb([4, number, n])) == Credit(number, n)
    assert framing.encode_cancel(number) == msgpack.packb([5, number])
    assert decode_frame(msgpack.packb([5, number])) == Cancel(number)


@given(st.binary(max_size=200))
def test_garbage_is_a_violation_or_a_frame_and_nothing_else(data: bytes) -> None:
    with suppress(ProtocolViolation):
        assert isinstance(decode_frame(data), Frame)


@pytest.mark.parametrize(
    "frame",
    [
        [],
        [0],
        [6, 1],
        [-1, 1],
        ["0", 1, "task.list", {}],
        {"0": 1},
        None,
        [0, -1, "task.list", {}],
        [0, MAX_ID + 1, "task.list", {}],
        [0, 1.0, "task.list", {}],
        [0, 1, "", {}],
        [0, 1, "x" * (MAX_METHOD + 1), {}],
        [0, 1, b"task.list", {}],
        [0, 1, "task.list"],
        [4, 1, 0],
        [4, 1, -1],
        [5],
    ],
    ids=repr,
)
def test_what_looks_like_a_frame_and_is_none(frame: object) -> None:
    with pytest.raises(ProtocolViolation, match="not a frame"):
        decode_frame(msgpack.packb(frame))


def test_more_elements_than_known_are_for_a_later_version() -> None:
    assert decode_frame(msgpack.packb([5, 7, "why", {"x": 1}])) == Cancel(7)


def test_two_messages_in_one_are_a_violation() -> None:
    with pytest.raises(ProtocolViolation):
        decode_frame(msgpack.packb([5, 7]) + b"\x00")


def test_the_limit_is_exact() -> None:
    room = MAX_MESSAGE - len(msgpack.packb([2, "x", b""])) - 3  # bin32's length has 4 bytes
    fits = msgpack.packb([2, "x", bytes(room)])
    assert len(fits) == MAX_MESSAGE
    decode_frame(fits)
    framing.encode_notify("x", bytes(room))
    with pytest.raises(FrameTooLarge):
        decode_frame(msgpack.packb([2, "x", bytes(room + 1)]))
    with pytest.raises(TooLarge):
        framing.encode_notify("x", bytes(room + 1))


HOSTILE = {
    "nested arrays": b"\x94\x00\x01\xa1x" + b"\x91" * (MAX_MESSAGE - 6) + b"\xc0",
    "nested maps": b"\x94\x00\x01\xa1x" + b"\x81\xa0" * (MAX_MESSAGE // 2 - 4) + b"\xc0",
    "nested error": b"\x94\x01\x01" + b"\x91" * (MAX_MESSAGE - 6) + b"\xc0\xc0",
    "array of 4G": b"\x94\x00\x01\xa1x\xdd\xff\xff\xff\xff",
    "map of 4G": b"\x94\x00\x01\xa1x\xdf\xff\xff\xff\xff",
    "text of 4G": b"\x94\x00\x01\xa1x\xdb\xff\xff\xff\xff",
    "many empty arrays": b"\x94\x00\x01\xa1x\xdd\x00\x03\xff\x00" + b"\x90" * 0x3FF00,
    "many empty maps": b"\x94\x00\x01\xa1x\xdd\x00\x03\xff\x00" + b"\x80" * 0x3FF00,
    "error of empty maps": b"\x94\x01\x01\xdd\x00\x03\xff\x00" + b"\x80" * 0x3FF00 + b"\xc0",
    "extension": b"\x94\x00\x01\xa1x\xc9\xff\xff\xff\xff\x01",
    "unused byte": b"\x94\x00\x01\xa1x\xc1",
    "broken text": b"\x94\x00\x01\xa2\xff\xfe\xc0",
    "rows of empty maps": b"\x94\x00\x01\xa1x"
    + b"\x83\xaarequest_id\xa812345678\xa4spec\x81\xa7command\x91\xa1x"
    + b"\xa4rows\xdd\x00\x03\xff\x00"
    + b"\x80" * 0x3FF00,
    "frames in a frame": b"\xdd\x00\x03\xff\x00" + b"\x90" * 0x3FF00,
    "far above the limit": bytes(10_000_000),
}


def take(data: bytes) -> None:
    """Do with a message all that is done with one before its method is known to be right."""
    frame = decode_frame(data)
    if isinstance(frame, Reply):
        decode_failure(frame.error)
    if isinstance(frame, Call):
        for kind in (ListTasks, SubmitTask):
            with pytest.raises(BadRequest):
                decode_value(frame.params, kind, "x")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_costs_little(name: str) -> None:
    data = HOSTILE[name]
    best_s = min(_cost_s(data) for _ in range(3))
    tracemalloc.start()
    _cost_s(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert best_s < 0.02
    assert peak < 16 * 1024 * 1024


def _cost_s(data: bytes) -> float:
    began = time.perf_counter()
    with suppress(ProtocolViolation):
        take(data)
    return time.perf_counter() - began


def test_a_wrong_type_is_told_with_its_path() -> None:
    params = msgpack.packb({"request_id": "12345678", "spec": {"command": ["x"], "cores": "2"}})
    with pytest.raises(BadRequest) as caught:
        decode_value(params, SubmitTask, "task.submit")
    assert caught.value.message == "task.submit: spec.cores: expected `int`, got `str`"


def test_text_of_any_script_is_no_flood_of_containers() -> None:
    text = "あ" * 65_000
    assert decode_value(msgpack.packb({"node": text}), ListTasks, "x").node == text


def test_a_missing_field_is_told_by_name() -> None:
    with pytest.raises(
        BadRequest, match=r"task\.submit: object missing required field `request_id`"
    ):
        decode_value(msgpack.packb({}), SubmitTask, "task.submit")


def test_unknown_fields_are_passed_over() -> None:
    assert decode_value(msgpack.packb({"limit": 5, "later": [[]]}), ListTasks, "x").limit == 5


def test_broken_utf_8_in_a_field_is_told() -> None:
    with pytest.raises(BadRequest, match="x: "):
        decode_value(b"\x81\xa4node\xa2\xff\xfe", ListTasks, "x")


def test_what_a_newer_host_answers_is_told_as_such() -> None:
    raw = msgspec.Raw(msgpack.packb({"states": ["dreaming"]}))
    with pytest.raises(Unsupported, match="dreaming") as caught:
        framing.decode_answer(raw, ListTasks, "task.list")
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("value", ["\udcff", 2**64, {"x": ["\udcff"]}])
def test_what_msgpack_cannot_carry_is_a_bad_request(value: object) -> None:
    with pytest.raises(BadRequest):
        framing.encode_call(1, "x", value)
    with pytest.raises(BadRequest):
        pack_value(value)


def test_an_error_comes_back_as_it_was() -> None:
    error = NotFound("no task 7", hint="look", details={"task": 7, "near": [8, 9]})
    frame = decode_frame(framing.encode_failure(3, error))
    assert isinstance(frame, Reply)
    back = decode_failure(frame.error)
    assert isinstance(back, NotFound)
    assert (back.message, back.hint, back.details) == (error.message, error.hint, error.details)


def test_no_error_is_nil() -> None:
    assert decode_failure(msgspec.Raw(b"\xc0")) is None


@pytest.mark.parametrize(
    "details", [{"x": "y" * MAX_ERROR}, {"x": "\udcff"}, {"x": 2**70}], ids=["long", "text", "int"]
)
def test_details_that_cannot_travel_are_left_behind(details: dict[str, object]) -> None:
    frame = decode_frame(framing.encode_failure(3, NotFound("no \udcff", details=details)))
    assert isinstance(frame, Reply)
    back = decode_failure(frame.error)
    assert back is not None
    assert (back.code, back.details) == ("not_found", {})


@pytest.mark.parametrize(
    "error",
    [
        msgpack.packb("not_found"),
        msgpack.packb({"code": 1, "message": ""}),
        msgpack.packb({"code": "x", "message": "y" * MAX_ERROR}),
        msgpack.packb({"code": "x", "message": "", "details": {"t": msgpack.ExtType(1, b"")}}),
        b"\x83\xa4code\xa1x\xa7message\xa0\xa7details\x81\xa1d" + nest(MAX_NESTING),
    ],
    ids=["text", "types", "size", "extension", "nest"],
)
def test_an_error_that_is_none_is_a_violation(error: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_failure(msgspec.Raw(error))


@given(plain)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert unpack_value(pack_value(value)) == value


@given(st.binary(max_size=100))
def test_plain_garbage_is_refused_exactly_where_msgpack_refuses_it(data: bytes) -> None:
    try:
        value = unpack_value(data)
    except BadRequest:
        return
    assert value == msgpack.unpackb(data)


def test_plain_values_have_their_limits() -> None:
    assert unpack_value(nest(MAX_NESTING)) is not None
    with pytest.raises(BadRequest, match="nested deeper"):
        unpack_value(nest(MAX_NESTING + 1))
    with pytest.raises(BadRequest, match="0xd4"):
        unpack_value(msgpack.packb(msgpack.ExtType(1, b"x")))
    with pytest.raises(BadRequest, match="no type"):
        unpack_value(b"\xc1")
    with pytest.raises(BadRequest, match="ends too early"):
        unpack_value(b"\xdd\xff\xff\xff\xff")
    with pytest.raises(BadRequest, match="goes on"):
        unpack_value(b"\xc0\xc0")
    with pytest.raises(TooLarge):
        pack_value(bytes(MAX_MESSAGE))
    with pytest.raises(TooLarge):
        unpack_value(bytes(MAX_MESSAGE + 1))
    with pytest.raises(BadRequest):
        pack_value({"x": object()})
