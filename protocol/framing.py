"""Frames of the control connection, to and from MessagePack bytes, within hard limits.

Knows: the six frames, how large and how deep a message may be, how a typed value inside a
frame is read, and the untyped values of people who use no types.
Does not know: what may be said when (``session``), or what a method means (``methods``).

Values inside a frame stay undecoded (``msgspec.Raw``) until somebody knows their type: so
nothing a peer sends is ever built into objects but what a type of ours asked for, and a
hostile nest of ten megabytes costs microseconds. What has no type (the details of an error,
``unpack_value``) is scanned before it is built. This module is the home of ``msgpack``.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Final, TypeVar, cast

import msgpack  # type: ignore[import-untyped]  # ships no types; nobody else imports it
import msgspec

from protocol.errors import (
    BadRequest,
    ErrorBody,
    KohakuError,
    TooLarge,
    Unsupported,
    from_wire,
    to_wire,
)
from protocol.mismatch import explain_mismatch

T = TypeVar("T")

#: Bytes of a message before ``hello`` is answered: a stranger may not cost more.
MAX_GREETING: Final = 4 * 1024
#: Bytes of a message on a control connection.
MAX_MESSAGE: Final = 256 * 1024
#: Bytes of data in one message of a data connection. Larger masked messages are slower.
MAX_CHUNK: Final = 64 * 1024
#: Bytes of a whole message on a data connection: a chunk with what is around it.
MAX_DATA_MESSAGE: Final = MAX_CHUNK + 64
#: Bytes of an error, because its details are untyped.
MAX_ERROR: Final = 16 * 1024
#: Containers within each other in an untyped value.
MAX_NESTING: Final = 32
#: Arrays and maps in one typed value: empty ones cost a byte here and 64 in memory.
MAX_CONTAINERS: Final = 128 * 1024
#: Characters of a method's name.
MAX_METHOD: Final = 64
MAX_ID: Final = 2**32 - 1

_Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_METHOD)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)]
_NIL: Final = b"\xc0"
#: First bytes of arrays and maps.
_CONTAINERS: Final = bytes([*range(0x80, 0xA0), *range(0xDC, 0xE0)])


class ProtocolViolation(Exception):
    """The peer sent what no peer may send. The connection cannot go on."""


class FrameTooLarge(ProtocolViolation):
    """The peer sent more than a message may hold."""


class Call(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """``[0, id, method, params]``: asks for a reply."""

    id: _Id
    method: _Name
    params: msgspec.Raw


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """``[1, id, error, result]``: ends a call; ``error`` is nil if it went well."""

    id: _Id
    error: msgspec.Raw
    result: msgspec.Raw


class Notify(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """``[2, method, params]``: asks for nothing."""

    method: _Name
    params: msgspec.Raw


class Item(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """``[3, id, item]``: one item of a streaming call."""

    id: _Id
    item: msgspec.Raw


class Credit(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """``[4, id, n]``: n more items may come."""

    id: _Id
    n: _Count


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """``[5, id]``: the caller wants no more of this call."""

    id: _Id


Frame = Call | Reply | Notify | Item | Credit | Cancel

_FRAMES: Final[msgspec.msgpack.Decoder[Frame]] = msgspec.msgpack.Decoder(Frame)
_ENCODER: Final = msgspec.msgpack.Encoder()


def decode_frame(data: bytes, limit: int = MAX_MESSAGE) -> Frame:
    """Read one message of a control connection.

    Raises:
        ProtocolViolation: It is no frame, or larger than ``limit`` bytes.
    """
    if len(data) > limit:
        raise FrameTooLarge(f"a message of {len(data)} bytes; at most {limit} are taken here")
    try:
        return _FRAMES.decode(data)
    except RecursionError:
        raise ProtocolViolation("nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as reason:
        raise ProtocolViolation(f"not a frame: {reason}") from None


def encode_call(number: int, method: str, params: object) -> bytes:
    """Write ``[0, id, method, params]``. Raises as ``encode_value``, and ``TooLarge``."""
    return _bounded((0, number, method, params), method)


def encode_reply(number: int, result: object) -> bytes:
    """Write ``[1, id, nil, result]``. Raises as ``encode_value``, and ``TooLarge``."""
    return _bounded((1, number, None, result), "the answer")


def encode_failure(number: int, error: KohakuError) -> bytes:
    """Write ``[1, id, error, nil]``, leaving out details that make it too large."""
    body = to_wire(error)
    try:
        size = len(encode_value(body))
    except BadRequest:  # text or numbers that no peer could read back
        body, size = _plain_body(error), 0
    if size > MAX_ERROR:
        body = _plain_body(error)
    return _ENCODER.encode((1, number, body, None))


def encode_notify(method: str, params: object = None) -> bytes:
    """Write ``[2, method, params]``. Raises as ``encode_value``, and ``TooLarge``."""
    return _bounded((2, method, params), method)


def encode_item(number: int, item: object) -> bytes:
    """Write ``[3, id, item]``. Raises as ``encode_value``, and ``TooLarge``."""
    return _bounded((3, number, item), "an item")


def encode_credit(number: int, n: int) -> bytes:
    """Write ``[4, id, n]``."""
    return _ENCODER.encode((4, number, n))


def encode_cancel(number: int) -> bytes:
    """Write ``[5, id]``."""
    return _ENCODER.encode((5, number))


def encode_value(value: object) -> bytes:
    """Write structs and plain values.

    Raises:
        BadRequest: It holds what MessagePack cannot carry.
    """
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:
        # Arguments of a command line that are no UTF-8 arrive as lone surrogates.
        raise BadRequest("some text is not Unicode and cannot be sent") from None
    except OverflowError:
        raise BadRequest("a number is too large to be sent: at most 64 bits") from None
    except RecursionError:
        raise BadRequest("a value is nested too deeply to be sent") from None


def decode_value(data: bytes | msgspec.Raw, kind: type[T], subject: str) -> T:
    """Read a typed value; ``subject`` is named in the refusal.

    Raises:
        BadRequest: It is not what ``kind`` says, with the path of what is wrong.
    """
    if len(data) > MAX_CONTAINERS and _count_containers(bytes(data)) > MAX_CONTAINERS:
        raise BadRequest(f"{subject}: more than {MAX_CONTAINERS} arrays and maps")
    try:
        return cast("T", _decoder(kind).decode(data))  # type: ignore[arg-type]
    except RecursionError:
        raise BadRequest(f"{subject}: nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as reason:
        raise BadRequest(f"{subject}: {explain_mismatch(reason, kind)}") from None


def decode_answer(data: msgspec.Raw, kind: type[T], subject: str) -> T:
    """Read what a host answered.

    Raises:
        Unsupported: It is not what this version knows.
    """
    try:
        return decode_value(data, kind, subject)
    except BadRequest as reason:
        raise Unsupported(
            f"the answer is not understood: {reason.message}",
            hint="this program may be older than the host: upgrade it",
        ) from None


def decode_failure(error: msgspec.Raw) -> KohakuError | None:
    """Read the error of a reply; None if it is nil.

    Raises:
        ProtocolViolation: It is no error, or larger or deeper than one may be.
    """
    data = bytes(error)
    if data == _NIL:
        return None
    if len(data) > MAX_ERROR:
        raise FrameTooLarge(f"an error of {len(data)} bytes; at most {MAX_ERROR} are taken")
    try:
        check_plain(data)
        return from_wire(decode_value(data, ErrorBody, "an error"))
    except BadRequest as reason:
        raise ProtocolViolation(reason.message) from None


def pack_value(value: object) -> bytes:
    """Write a plain value (None, bool, int, float, str, bytes, list, dict) without types.

    Raises:
        BadRequest: It holds something else, or is nested too deeply.
        TooLarge: It would not fit a message.
    """
    try:
        data = cast("bytes", msgpack.packb(value))
    except (TypeError, ValueError, OverflowError) as reason:
        raise BadRequest(f"this value cannot be sent: {reason}") from None
    if len(data) > MAX_MESSAGE:
        raise TooLarge(f"{len(data)} bytes of value; a message holds at most {MAX_MESSAGE}")
    check_plain(data)
    return data


def unpack_value(data: bytes) -> Any:
    """Read a plain value without types, within the same bounds as ``pack_value``.

    Raises:
        BadRequest: It is not one plain value.
        TooLarge: It is larger than a message.
    """
    if len(data) > MAX_MESSAGE:
        raise TooLarge(f"{len(data)} bytes of value; a message holds at most {MAX_MESSAGE}")
    check_plain(data)
    try:
        return msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as reason:
        raise BadRequest(f"not a plain value: {reason}") from None


def check_plain(data: bytes) -> None:
    """Walk over one untyped value without building it.

    Raises:
        BadRequest: It is nested deeper than ``MAX_NESTING``, holds an extension type, or
            is not exactly one value.
    """
    position, depth, left = 0, 0, [1]
    while True:
        while left[-1] == 0:
            left.pop()
            if not left:
                if position != len(data):
                    raise BadRequest("not a plain value: it goes on after its end")
                return
            depth -= 1
        left[-1] -= 1
        if position >= len(data):
            raise BadRequest("not a plain value: it ends too early")
        position, children = _step(data, position)
        if children >= 0:
            depth += 1
            if depth > MAX_NESTING:
                raise BadRequest(f"not a plain value: nested deeper than {MAX_NESTING}")
            left.append(children)


def _step(data: bytes, position: int) -> tuple[int, int]:
    """Give the position after one header and its bytes, and how many values it holds, or -1."""
    first = data[position]
    position += 1
    if first <= 0x7F or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):
        return position, -1
    if first <= 0x8F:
        return position, 2 * (first & 0x0F)
    if first <= 0x9F:
        return position, first & 0x0F
    if first <= 0xBF:
        return position + (first & 0x1F), -1
    if first in _FIXED:
        return position + _FIXED[first], -1
    if first not in _LENGTHS:
        raise BadRequest(f"not a plain value: byte 0x{first:02x} is no type used here")
    width, holds = _LENGTHS[first]
    length = int.from_bytes(data[position : position + width], "big")
    position += width
    return (position + length, -1) if holds == 0 else (position, holds * length)


#: Bytes after the first of numbers.
_FIXED: Final = {
    0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
#: Bytes of the length after the first, and values for each of it: 0 where it counts bytes.
_LENGTHS: Final = {
    0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0),
    0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2),
}  # fmt: skip


@cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def _count_containers(data: bytes) -> int:
    """Give a bound: text has such bytes too, in kana two of three. 192 KiB of it pass."""
    return len(data) - len(data.translate(None, _CONTAINERS))


def _bounded(frame: tuple[object, ...], subject: str) -> bytes:
    data = encode_value(frame)
    if len(data) > MAX_MESSAGE:
        raise TooLarge(
            f"{subject} has {len(data)} bytes; a message holds at most {MAX_MESSAGE}",
            hint="ask for less at once, or send it in parts",
        )
    return data


def _plain_body(error: KohakuError) -> ErrorBody:
    message = error.message.encode("utf-8", "replace").decode()[:2000]
    return ErrorBody(error.code, message, error.hint.encode("utf-8", "replace").decode()[:1000])
