"""Structs of the protocol as the JSON that scripts read.

Knows: that a document has every field of its struct, always, under the struct's own name;
that ids are strings, because jq and JavaScript round whole numbers above 2**53; that times
are UTC seconds and sizes are bytes, as on the wire.
Does not know: which commands print which document.

The shape follows from the annotations alone. A field added to a struct is in ``--json`` the
same day, and a struct that names an id ``TaskId`` or ``BatchId`` needs nothing here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

import msgspec

from protocol.ids import BatchId, TaskId
from protocol.messages.cluster import Event
from protocol.messages.task import Submitted

_ID_TYPES: Final[tuple[Any, ...]] = (TaskId, BatchId)
#: Ids whose annotation does not say so.
_ID_FIELDS: Final = frozenset({(Event, "id")})
#: Characters that JSON allows and a terminal obeys or hides (see ``sanitize``).
_UNSAFE: Final = re.compile(
    "[\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)

Plain = str | int | float | bool | list["Plain"] | dict[str, "Plain"] | None
#: The last of the whole numbers that all readers of JSON tell apart (RFC 8259 section 6).
_EXACT: Final = 2**53 - 1
_Convert = Callable[[Any], Plain]


def to_document(value: msgspec.Struct) -> dict[str, Plain]:
    """Give a struct as plain values, every field present."""
    if isinstance(value, Submitted):
        # Runs of ids are for the wire; people and scripts want the ids.
        return {
            "batch": str(value.batch),
            "tasks": [str(task) for task in value.ids()],
            "repeated": value.repeated,
        }
    return {name: convert(getattr(value, name)) for name, convert in _fields(type(value))}


def to_plain(value: object) -> Plain:
    """Give a value of unknown shape as plain values, for what no struct describes.

    Whole numbers above 2**53 become strings: they are ids, and readers would round them.
    """
    match value:
        case bool() | float() | str() | None:
            return value
        case int():
            return value if abs(value) <= _EXACT else str(value)
        case Mapping():
            return {str(key): to_plain(item) for key, item in value.items()}
        case list() | tuple():
            return [to_plain(item) for item in value]
        case _:
            return str(value)


def render_json(document: Mapping[str, Plain], *, indent: int | None = 2) -> str:
    """Write a document so that it is safe to print on a terminal as it is.

    ``indent`` None gives one line, for streams of documents.
    """
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[tuple[str, _Convert], ...]:
    hints = get_type_hints(kind)
    return tuple(
        (name, str if (kind, name) in _ID_FIELDS else _converter(hints[name]))
        for name in kind.__struct_fields__
    )


def _converter(hint: Any) -> _Convert:
    """Choose how values of an annotation become plain."""
    if hint in _ID_TYPES:
        return str
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _optional(_converter(next(a for a in arguments if a is not NoneType)))
    if origin is dict:
        values = _converter(arguments[1])
        return lambda value: {str(key): values(item) for key, item in value.items()}
    if origin in (tuple, list):
        return _sequence(arguments)
    if isinstance(hint, type):
        if issubclass(hint, msgspec.Struct):
            return to_document
        if issubclass(hint, StrEnum):
            return str
    return _as_is


def _sequence(arguments: tuple[Any, ...]) -> _Convert:
    if not arguments:
        return list
    if len(arguments) == 1 or arguments[-1] is Ellipsis:
        each = _converter(arguments[0])
        return lambda value: [each(item) for item in value]
    own = [_converter(argument) for argument in arguments]
    return lambda value: [convert(item) for convert, item in zip(own, value, strict=True)]


def _optional(convert: _Convert) -> _Convert:
    return lambda value: None if value is None else convert(value)


def _as_is(value: Any) -> Plain:
    return value  # type: ignore[no-any-return]
