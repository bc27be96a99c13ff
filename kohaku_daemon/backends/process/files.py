"""Small files by the fewest system calls.

``open`` makes eight calls and builds three objects for a file of a hundred bytes; a launch
touches a dozen such files in each of three processes. Standard library only.
"""

from __future__ import annotations

import os
from typing import Final

#: No file read here is longer: they are the kernel's short texts and our own records.
_LONGEST: Final = 1 << 20


def read_text(path: str) -> str:
    """Read a small file.

    Raises:
        OSError: It cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts: list[bytes] = []
        while part := os.read(descriptor, _LONGEST if parts else 4096):
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts).decode("utf-8", "surrogateescape")


def write_text(path: str, text: str) -> None:
    """Write a small file, making it if need be, in one call.

    Raises:
        OSError: It cannot be written, or not whole.
    """
    _write(path, os.O_CREAT | os.O_TRUNC, text)


def append_text(path: str, text: str) -> None:
    """Add to the end of a small file that exists, in one call.

    Raises:
        OSError: It cannot be written, or not whole.
    """
    _write(path, os.O_APPEND, text)


def _write(path: str, flags: int, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)
