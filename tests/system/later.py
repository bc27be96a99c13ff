"""Be ``kohaku`` or ``kohakud`` of a later version: ``python later.py OLDEST PROGRAM ARGUMENTS``.

It speaks all versions of the protocol from OLDEST to the one after this, and it says more in
every message than anybody of today knows: a field in every map of a struct. What it is sent by
somebody of today lacks all of that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parents[2]))

from protocol import framing, version

SINCE_LATER = {"since": "later", "deep": [1, {"x": None}]}


def grown(value: Any) -> Any:
    """Add a field to every struct that travels as a map."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        if config.array_like:
            return value
        fields = msgspec.structs.fields(type(value))
        said = {field.encode_name: grown(getattr(value, field.name)) for field in fields}
        tag = {config.tag_field: config.tag} if config.tag_field else {}
        return {**tag, **said, "added_later": SINCE_LATER}
    if isinstance(value, list | tuple):
        return [grown(one) for one in value]
    if isinstance(value, dict):
        return {key: grown(one) for key, one in value.items()}
    return value


def saying_more(encode: Callable[..., bytes], place: int) -> Callable[..., bytes]:
    """Have an encoder grow what it is given at this place."""

    def encode_grown(*arguments: Any) -> bytes:
        return encode(*arguments[:place], *map(grown, arguments[place:]))

    return encode_grown


def become_later(oldest: int) -> None:
    version.PROTOCOL_VERSION += 1  # type: ignore[misc]
    version.OLDEST_VERSION = oldest  # type: ignore[misc]
    version.CAPABILITIES += ("later",)  # type: ignore[misc, assignment]
    for name, place in (
        ("encode_call", 2), ("encode_reply", 1), ("encode_item", 1), ("encode_notify", 1),
    ):  # fmt: skip
        setattr(framing, name, saying_more(getattr(framing, name), place))


def main(oldest: int, program: str, arguments: list[str]) -> int:
    become_later(oldest)
    sys.argv = [program, *arguments]
    if program == "kohakud":
        from kohaku_daemon.cli import main as kohakud

        return kohakud(arguments)
    from kohaku_tui.cli.main import run

    run()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
