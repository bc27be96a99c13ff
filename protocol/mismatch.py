"""Why a value is not what its type says, in words that name the field and what it takes.

Knows: how msgspec (0.22) words a mismatch, and the bounds that a type's annotations carry.
Does not know: where the value came from, or what the field means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, get_args, get_type_hints

import msgspec

#: msgspec tells the bound that was crossed; who has to choose another number wants both.
_OUT_OF_BOUNDS: Final = re.compile(r"Expected `(?:int|float)` [<>]=? \S+")


def explain_mismatch(reason: Exception, kind: Any) -> str:
    """Turn ``Expected `int` >= 1 - at `$.limit``` into ``limit must be from 1 to 500``.

    ``kind`` is the type that the value was read as.
    """
    text, _, path = str(reason).partition(" - at `")
    where = path.rstrip("`").removeprefix("$").removeprefix(".")
    if where and _OUT_OF_BOUNDS.fullmatch(text) and (span := _span(_mark_at(kind, where))):
        return f"{where} must be {span}"
    text = text[:1].lower() + text[1:]
    return f"{where}: {text}" if where else text


def _span(mark: msgspec.Meta | None) -> str:
    if mark is None or mark.ge is None:
        return ""
    return f"{mark.ge} or more" if mark.le is None else f"from {mark.ge} to {mark.le}"


def _mark_at(kind: Any, path: str) -> msgspec.Meta | None:
    """Find the bounds of the number at a path such as ``spec.cores`` or ``tasks[0]``."""
    hint = kind
    for step in path.split("."):
        name = step.partition("[")[0]
        owner = next((part for part in _parts(hint) if _has_field(part, name)), None)
        if owner is None:
            return None
        hint = get_type_hints(owner, include_extras=True)[name]
    return next((part for part in _parts(hint) if isinstance(part, msgspec.Meta)), None)


def _parts(hint: Any) -> Iterator[Any]:
    """Give an annotation and all that is inside it: of a union, a tuple, an ``Annotated``."""
    yield hint
    for inner in get_args(hint):
        yield from _parts(inner)


def _has_field(part: Any, name: str) -> bool:
    is_struct = isinstance(part, type) and issubclass(part, msgspec.Struct)
    return is_struct and name in part.__struct_fields__
