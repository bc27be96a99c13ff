"""One encoded sample of every message of this version, to be read by every later one.

``python -m tests.protocol.make_samples`` adds what ``samples/vN.json`` lacks: a message that is
new, or one that has got new fields. A sample that is there is never written again: it is what
a peer of that day sends, and there may be some that are never upgraded. Only until a version
is released for the first time may its file be removed and made anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

import msgspec

from protocol import spec
from protocol.framing import encode_value, unpack_value
from protocol.version import PROTOCOL_VERSION

FOLDER: Final = Path(__file__).parent / "samples"
#: By name of the message, its samples as hexadecimal MessagePack, oldest first.
Samples = dict[str, list[str]]

#: Of plain types, two each: one of them is not the field's default.
_PLAIN: Final[dict[Any, tuple[Any, Any]]] = {
    int: (7, 8), float: (1.5, 2.5), str: ("text", "other"), bytes: (b"\x00\xff", b"\x01"),
    bool: (True, False), object: ("anything", 9),
}  # fmt: skip


def path_of(version: int) -> Path:
    return FOLDER / f"v{version}.json"


def messages() -> dict[str, type[msgspec.Struct]]:
    """Give every struct that travels."""
    kinds = spec.reachable()
    return {kind.__name__: kind for kind in kinds if issubclass(kind, msgspec.Struct)}


def full(kind: type[msgspec.Struct]) -> msgspec.Struct:
    """Make a message with no field at its default."""
    hints = get_type_hints(kind)
    return kind(
        **{
            field.name: _other_than(field.default, hints[field.name])
            for field in msgspec.structs.fields(kind)
        }
    )


def fields_in(kind: type[msgspec.Struct], sample: bytes) -> set[str]:
    """Give the fields that a sample has, by their names on the wire."""
    plain = unpack_value(sample)
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    if isinstance(plain, dict):
        return set(plain) & set(names)
    return set(names[: len(plain) - 1])  # an array: its tag, then the fields in order


def _other_than(default: Any, hint: Any) -> Any:
    return next(value for value in _values(hint) if value != default)


def _values(hint: Any) -> Iterator[Any]:
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        yield from _PLAIN[hint]
    elif origin is tuple and inner[-1:] == (Ellipsis,):
        # Of a union one of each kind, so that an array of orders holds them all.
        yield tuple(next(_values(kind)) for kind in _kinds(inner[0]))
    elif origin is tuple:
        yield tuple(next(_values(kind)) for kind in inner)
    elif origin is dict:
        yield {"key": next(_values(inner[1]))}
    elif len(_kinds(hint)) > 1 or origin in (Union, UnionType):
        yield from (next(_values(kind)) for kind in _kinds(hint))
    elif issubclass(hint, StrEnum):
        yield from reversed(hint)
    else:
        yield full(hint)


def _kinds(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for kind in get_args(hint) if kind is not NoneType)
    return (hint,)


def main() -> None:
    path = path_of(PROTOCOL_VERSION)
    samples: Samples = json.loads(path.read_text()) if path.exists() else {}
    for name, kind in messages().items():
        there = samples.setdefault(name, [])
        seen = {field for one in there for field in fields_in(kind, bytes.fromhex(one))}
        wanted = {field.encode_name for field in msgspec.structs.fields(kind)}
        if not there or not wanted <= seen:
            there.append(encode_value(full(kind)).hex())
    path.write_text(json.dumps(samples, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
