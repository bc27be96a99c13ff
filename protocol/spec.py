"""Writes the parts of SPEC.md that follow from the code: ``python -m protocol.spec``.

Knows: how the table of methods, the types of its parameters and results, and the close codes
are shown to people. Field notes are the ``#:`` comments of the source, so there is one text.
Does not know: the prose of SPEC.md, which is written by hand around the markers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, Final, get_args, get_origin, get_type_hints

import msgspec

from protocol.errors import CODES, ErrorBody
from protocol.messages.environment import ShellSaid, ShellSent
from protocol.messages.stream import LogChunk, LogEnd
from protocol.methods import METHODS, Door, StreamingMethod
from protocol.session import CloseCode

PATH: Final = Path(__file__).with_name("SPEC.md")

_PLAIN: Final = {
    int: "int", str: "text", float: "float", bool: "bool", bytes: "bytes", type(None): "nil",
    object: "any",
}  # fmt: skip
_DOORS: Final = {Door.CLIENT: "`/v1/ws`", Door.RUNNER: "`/v1/runner`", Door.BOTH: "both"}


def fill(text: str) -> str:
    """Put what the code says between the markers of SPEC.md's text.

    Raises:
        ValueError: A marker is missing.
    """
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "methods": _methods,
        "types": _types,
        "close codes": _close_codes,
        "error codes": _error_codes,
    }
    for name, render in parts.items():
        begin, end = f"<!-- {name}: begin, written by protocol.spec -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"SPEC.md has no markers for {name}")
        text = f"{before}{begin}\n\n" + "\n".join(render()) + f"\n\n{end}{after}"
    return text


def _methods() -> Iterator[str]:
    yield "| method | door | least role | params | items | result | what it does |"
    yield "|---|---|---|---|---|---|---|"
    for method in METHODS.values():
        item = _link(method.item) if isinstance(method, StreamingMethod) else ""
        role = "its credential" if method.door is Door.RUNNER else method.least.value
        if method.least.value == "anony":
            role = "anybody"
        yield (
            f"| `{method.name}` | {_DOORS[method.door]} | {role} | {_link(method.params)} "
            f"| {item} | {_link(method.result)} | {method.summary} |"
        )


def _types() -> Iterator[str]:
    for kind in reachable():
        yield f"### {kind.__name__}"
        yield ""
        yield inspect.cleandoc(kind.__doc__ or "")
        yield ""
        yield from _enum_rows(kind) if issubclass(kind, Enum) else _struct_rows(kind)
        yield ""


def _close_codes() -> Iterator[str]:
    notes = _notes(CloseCode)
    yield "| code | name | meaning |"
    yield "|---|---|---|"
    for code in CloseCode:
        yield f"| {code.value} | {code.name.lower()} | {notes.get(code.name, '')} |"


def _error_codes() -> Iterator[str]:
    yield ", ".join(f"`{code}`" for code in sorted(CODES))


def _enum_rows(kind: type[Any]) -> Iterator[str]:
    notes = _notes(kind)
    for member in kind:
        note = notes.get(member.name, "")
        yield f"- `{member.value}`" + (f": {note}" if note else "")


def _struct_rows(kind: type[Any]) -> Iterator[str]:
    config = kind.__struct_config__
    if config.array_like:
        yield f"An array; its first element is {config.tag}, then in this order:"
        yield ""
    elif config.tag:
        yield f'A map with `"{config.tag_field}": "{config.tag}"` and:'
        yield ""
    fields = msgspec.structs.fields(kind)
    if not fields:
        yield "No fields."
        return
    hints, notes = get_type_hints(kind), _notes(kind)
    yield "| field | type | if left out | |"
    yield "|---|---|---|---|"
    for field in fields:
        row = _type(hints[field.name]), _default(field), notes.get(field.name, "")
        yield f"| `{field.encode_name}` | {' | '.join(row)} |"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "*required*"
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{_plain(field.default_factory())}`"
    return f"`{_plain(field.default)}`"


def _plain(value: Any) -> str:
    return msgspec.json.encode(msgspec.to_builtins(value)).decode().replace("null", "nil")


def _type(hint: Any) -> str:
    """Name a type as the wire knows it."""
    while hasattr(hint, "__supertype__"):  # NewType
        hint = hint.__supertype__
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is dict:
        return f"map of {_type(inner[0])} to {_type(inner[1])}"
    if origin is tuple:
        if not inner:
            return "empty array"
        if inner[-1] is Ellipsis:
            return f"array of {_type(inner[0])}"
        return "array (" + ", ".join(map(_type, inner)) + ")"
    if inner:
        return " or ".join(map(_type, inner))
    return _link(hint)


def _link(kind: type[Any]) -> str:
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def reachable() -> list[type[Any]]:
    """Give every struct and enum that the table leads to, by name."""
    found: dict[str, type[Any]] = {}
    waiting: list[Any] = [ErrorBody, LogChunk, LogEnd, ShellSent, ShellSaid]
    for method in METHODS.values():
        waiting += [method.params, method.result]
        waiting += [method.item] if isinstance(method, StreamingMethod) else []
    while waiting:
        hint = waiting.pop()
        waiting += get_args(hint)
        if not isinstance(hint, type) or hint.__name__ in found:
            continue
        if issubclass(hint, msgspec.Struct):
            found[hint.__name__] = hint
            waiting += get_type_hints(hint).values()
        elif issubclass(hint, StrEnum):
            found[hint.__name__] = hint
    return [found[name] for name in sorted(found)]


def _notes(kind: type[Any]) -> dict[str, str]:
    """Give the ``#:`` comment above each field or member, from the source."""
    notes: dict[str, str] = {}
    words: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        text = line.strip()
        if text.startswith("#:"):
            words.append(text.removeprefix("#:").strip())
            continue
        name = re.match(r"(\w+)\s*[:=]", text)
        if name is not None and words:
            notes[name[1]] = " ".join(words).replace("``", "`")
        words = []
    return notes


if __name__ == "__main__":
    PATH.write_text(fill(PATH.read_text()))
