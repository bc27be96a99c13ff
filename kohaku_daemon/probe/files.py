"""Small files of the kernel, and the notations they share.

Knows: how to read what may be missing, and lists such as ``0-3,8``.
Does not know: what any file means.
"""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """Give a file's text without surrounding blanks, or nothing if it cannot be read.

    A file of /proc or /sys that is missing or refuses means that the kernel has no such
    thing, not that something is wrong: sensors answer ENODATA, ENXIO or EAGAIN at will.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """Give the whole number that is all of a file, or None."""
    text = read_text(path)
    return int(text) if text.removeprefix("-").isdecimal() else None


def parse_list(text: str) -> tuple[int, ...]:
    """Read the kernel's notation of sets: ``0-3,8`` (``man 7 cpuset``, "List format")."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def parse_fields(text: str) -> dict[str, int]:
    """Read lines of ``Name:  123 kB`` as /proc/meminfo has them, in bytes where it says kB."""
    fields: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        number, *unit = rest.split() or [""]
        if number.isdecimal():
            fields[name] = int(number) * (1024 if unit == ["kB"] else 1)
    return fields
