"""Kinds of settings: how a value is read from TOML and from plain text, and written.

Knows: one ``Kind`` for each type hint that a settings class may use:

* ``bool``, ``int``, ``str``, ``Path``, ``Literal["a", "b"]``, a ``StrEnum``
* ``float``: seconds, takes ``90`` or ``"2h"``
* ``Size``: bytes, takes ``4096`` or ``"64Mi"``; ``Cores``: takes ``"0-3,8"`` or ``[0, 1]``
* ``Annotated[int, Between(least, most)]``, ``Annotated[float, Between(least, most)]``
* ``tuple[str, ...]``, ``tuple[Path, ...]``: a list; ``dict[str, str]``: a table of names and values
* ``X | None``: as ``X``, or ``"auto"`` for None; ``FileOrNone``: a path, or ``""`` for None
* ``Address``: an IP address or the name of a machine

Does not know: keys, files, the environment.
"""

from __future__ import annotations

import ipaddress
import json
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from protocol.units import parse_duration, parse_size, render_duration


@dataclass(frozen=True, slots=True)
class Between:
    """Marks the smallest and largest value a number may have."""

    least: float
    most: float = float("inf")


#: Bytes, written with a unit.
Size = Annotated[int, "size"]
#: Numbers of cores as the kernel counts them.
Cores = Annotated[tuple[int, ...], "cores"]
#: A file that need not be: where None is that there is none, "auto" would promise one.
FileOrNone = Annotated[Path | None, "file or none"]
#: What a socket can be bound to.
Address = Annotated[str, "address"]
#: A TCP port; 0 for any free one.
Port = Annotated[int, Between(0, 65535)]

_WORDS: Final = {"true": True, "yes": True, "on": True, "1": True,
                 "false": False, "no": False, "off": False, "0": False}  # fmt: skip
#: More cores than any machine has; keeps "0-99999999999" from becoming a list.
_MOST_CORES: Final = 1 << 16
#: RFC 1123 section 2.1, and the underscore that some networks use. A last label of digits only
#: would be a broken IPv4 address.
_MACHINE_NAME: Final = re.compile(
    r"(?!(?:.*\.)?[0-9]+$)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*"
)
_LONGEST_NAME: Final = 253


class NotOfKind(ValueError):
    """A value is not of its kind."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of value is read and written."""

    #: Completes "must be ...".
    expected: str
    #: Checks what TOML holds. A relative path starts from the folder given.
    read: Callable[[Any, Path], Any]
    #: Writes a value as TOML.
    write: Callable[[Any], str]
    #: Turns plain text into what TOML would hold; text it cannot turn is left for ``read``.
    of_text: Callable[[str], Any] = str


def kind_of(hint: Any) -> Kind:
    """Find the kind of a type hint.

    Raises:
        TypeError: No kind is for this hint: a mistake in a settings class.
    """
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    if get_origin(hint) in (Union, types.UnionType):
        return _optional(hint)
    if get_origin(hint) is Literal:
        return _choice(get_args(hint))
    if get_origin(hint) is Annotated:
        kind, mark = get_args(hint)
        if isinstance(mark, Between):
            return _limited(kind_of(kind), mark)
        hint = mark
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return replace(_choice(tuple(hint)), read=_read_member(hint))
    try:
        return _KINDS[hint]
    except KeyError:
        raise TypeError(f"settings of type {hint!r} cannot be read") from None


# --- kinds made of others -------------------------------------------------------------------


def _optional(hint: Any) -> Kind:
    (inner,) = (part for part in get_args(hint) if part is not types.NoneType)
    kind = kind_of(inner)
    return Kind(
        f'{kind.expected}, or "auto"',
        lambda raw, base: None if raw == "auto" else kind.read(raw, base),
        lambda value: '"auto"' if value is None else kind.write(value),
        lambda text: text if text == "auto" else kind.of_text(text),
    )


def _choice(choices: tuple[str, ...]) -> Kind:
    def read(raw: Any, _: Path) -> Any:
        return _must(raw in choices, raw)

    return Kind("one of " + ", ".join(map(_quoted, choices)), read, _quoted)


def _read_member(members: type[StrEnum]) -> Callable[[Any, Path], Any]:
    return lambda raw, _: members(_must(raw in tuple(members), raw))


def _limited(kind: Kind, limits: Between) -> Kind:
    def read(raw: Any, base: Path) -> Any:
        value = kind.read(raw, base)
        return _must(limits.least <= value <= limits.most, value)

    least = kind.write(limits.least)
    no_top = limits.most == float("inf")
    span = f"{least} or more" if no_top else f"from {least} to {kind.write(limits.most)}"
    return replace(kind, expected=f"{kind.expected}, {span}", read=read)


# --- plain kinds ----------------------------------------------------------------------------


def _must(good: object, value: Any) -> Any:
    if not good:
        raise NotOfKind
    return value


def _quoted(text: object) -> str:
    # A JSON string is a TOML basic string, but for DEL, which no path or name of ours has.
    return json.dumps(str(text), ensure_ascii=False)


def _read_exactly(kind: type) -> Callable[[Any, Path], Any]:
    return lambda raw, _: _must(type(raw) is kind, raw)


def _whole_number(text: str) -> Any:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _read_duration(raw: Any, _: Path) -> float:
    if isinstance(raw, str):
        return parse_duration(raw)
    return float(_must(type(raw) in (int, float) and 0 <= raw < float("inf"), raw))


def _read_size(raw: Any, _: Path) -> int:
    if isinstance(raw, str):
        return parse_size(raw)
    return int(_must(type(raw) is int and raw >= 0, raw))


def _write_size(count: int) -> str:
    for unit, factor in (("Ti", 2**40), ("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if count and count % factor == 0:
            return f'"{count // factor}{unit}"'
    return str(count)


def _read_path(raw: Any, base: Path) -> Path:
    text = _must(isinstance(raw, str) and raw and "\0" not in raw, raw)
    return (base / Path(text).expanduser()).absolute()


def _read_file_or_none(raw: Any, base: Path) -> Path | None:
    # "auto" is None for other keys, and was in the template of this one.
    return None if raw == "" else _read_path(_must(raw != "auto", raw), base)


def _read_address(raw: Any, _: Path) -> str:
    text: str = _must(isinstance(raw, str), raw)
    try:
        ipaddress.ip_address(text)
    except ValueError:
        _must(len(text) <= _LONGEST_NAME and _MACHINE_NAME.fullmatch(text), raw)
    return text


def _read_list(raw: Any, _: Path) -> tuple[str, ...]:
    return tuple(_must(isinstance(raw, list) and all(isinstance(part, str) for part in raw), raw))


def _read_paths(raw: Any, base: Path) -> tuple[Path, ...]:
    return tuple(_read_path(part, base) for part in _must(isinstance(raw, list), raw))


def _write_list(values: Iterable[object]) -> str:
    return f"[{', '.join(map(_quoted, values))}]"


def _list_of_text(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _read_table(raw: Any, _: Path) -> dict[str, str]:
    is_table = isinstance(raw, dict) and all(isinstance(part, str) for part in raw.values())
    return dict(_must(is_table, raw))


def _table_of_text(text: str) -> Any:
    parts = [part.partition("=") for part in _list_of_text(text)]
    if any(not equals for _, equals, _ in parts):
        return text
    return {name.strip(): value.strip() for name, _, value in parts}


def _write_table(table: dict[str, str]) -> str:
    inner = ", ".join(f"{_quoted(name)} = {_quoted(value)}" for name, value in table.items())
    return f"{{ {inner} }}" if inner else "{}"


def _read_cores(raw: Any, _: Path) -> tuple[int, ...]:
    if isinstance(raw, str):
        raw = [core for part in raw.split(",") for core in _span(part)]
    _must(isinstance(raw, list) and raw and all(type(core) is int for core in raw), raw)
    return tuple(_must(min(raw) >= 0 and max(raw) < _MOST_CORES, sorted(set(raw))))


def _span(text: str) -> range:
    ends = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", text)
    if ends is None:
        raise NotOfKind
    return range(int(ends[1]), int(ends[2] or ends[1]) + 1)


_KINDS: Final[dict[Any, Kind]] = {
    bool: Kind(
        "true or false",
        _read_exactly(bool),
        lambda value: str(value).lower(),
        lambda text: _WORDS.get(text.lower(), text),
    ),
    int: Kind("a whole number", _read_exactly(int), str, _whole_number),
    str: Kind("text", _read_exactly(str), _quoted),
    float: Kind(
        'a duration such as "90s" or "2h"',
        _read_duration,
        lambda value: _quoted(render_duration(value)),
    ),
    Path: Kind("a path", _read_path, _quoted),
    "file or none": Kind(
        'a path, or "" for none',
        _read_file_or_none,
        lambda value: _quoted("" if value is None else value),
    ),
    "address": Kind(
        'an IP address or the name of a machine, such as "127.0.0.1"', _read_address, _quoted
    ),
    tuple[str, ...]: Kind('a list such as ["a", "b"]', _read_list, _write_list, _list_of_text),
    tuple[Path, ...]: Kind(
        'a list of paths such as ["/a", "/b"]', _read_paths, _write_list, _list_of_text
    ),
    dict[str, str]: Kind(
        'a table such as { gpu = "a100" }', _read_table, _write_table, _table_of_text
    ),
    "size": Kind('a size such as "64Mi" or "1.5G"', _read_size, _write_size),
    "cores": Kind('numbers of cores such as "0-3,8"', _read_cores, lambda value: json.dumps(value)),
}
