"""Sizes and durations as people write and read them.

On the wire sizes are whole bytes and durations are seconds; text is for the edges.
K, M, G, T are powers of 1000 and Ki, Mi, Gi, Ti powers of 1024 (IEC 80000-13).
"""

from __future__ import annotations

import re
from typing import Final

from protocol.errors import BadRequest

#: Fifteen digits are more than any machine has, and few enough to be a float.
_NUMBER: Final = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)"
_SIZE: Final = re.compile(_NUMBER + r"\s*([KMGT]i?)?B?", re.IGNORECASE)
_FACTORS: Final = {
    "": 1,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
_DURATION: Final = re.compile(f"(?:{_NUMBER}[smhd])+")
_DURATION_PART: Final = re.compile(_NUMBER + "([smhd])")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Read a size such as ``64M``, ``1.5Gi`` or ``4096``, in bytes.

    Raises:
        BadRequest: It is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadRequest(
            f"{text!r} is not a size",
            hint="write a number with K, M, G, T (powers of 1000) or Ki, Mi, Gi, Ti (of 1024)",
        )
    return int(float(match[1]) * _FACTORS[(match[2] or "").lower()])


def render_size(count: float) -> str:
    """Write bytes with a binary unit and three digits at most, such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.0f} TiB" if count >= 100 else f"{count:.3g} TiB"


def parse_duration(text: str) -> float:
    """Read a duration such as ``90``, ``90s``, ``2h`` or ``1h30m``, in seconds.

    Raises:
        BadRequest: It is no duration.
    """
    text = text.strip().lower()
    if re.fullmatch(_NUMBER, text):
        return float(text)
    if not _DURATION.fullmatch(text):
        raise BadRequest(f"{text!r} is not a duration", hint="write 90, 90s, 15m, 2h, 1h30m or 1d")
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def render_duration(seconds: float) -> str:
    """Write a duration with its two largest units, such as ``1h30m`` or ``4.2s``."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f}s"
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count}{unit}" if count else "")
    return "".join(parts[:2])
