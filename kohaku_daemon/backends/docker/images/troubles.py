"""What engines and registries say of images, in words for a task's owner.

Knows: their texts (dockerd 20.10 and newer, the distribution registry, Docker Hub).
Does not know: where they were said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from kohaku_daemon.dockerd.errors import EngineRefused

#: ENOSPC and EDQUOT as the C library says them: layers are unpacked by a program.
_FULL: Final = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_UNKNOWN: Final = re.compile(
    r"manifest unknown|name unknown|not found|no such image|does not exist", re.IGNORECASE
)
_REFUSED: Final = re.compile(
    r"unauthorized|denied|authentication required|no basic auth|incorrect username|\b401\b|\b403\b",
    re.IGNORECASE,
)
_AWAY: Final = re.compile(
    r"no such host|connection refused|no route|unreachable|timeout|deadline exceeded"
    r"|server misbehaving|connection reset|\bEOF\b|HTTP response to HTTPS client|x509|tls:"
    r"|awaiting headers",
    re.IGNORECASE,
)
_INVALID: Final = re.compile(r"invalid reference|must be lowercase|invalid tag", re.IGNORECASE)
_LONGEST: Final = 300


def is_full(error: EngineRefused) -> bool:
    """Say whether a disk was full."""
    return _FULL.search(error.message) is not None


def explain_pull(reference: str, said: str) -> str:
    """Say why an image was not pulled, and what to do."""
    registry = _registry_of(reference)
    for pattern, text in _words(reference, registry):
        if pattern.search(said):
            return text.replace("{said}", said[:_LONGEST])
    return f"image {reference} cannot be pulled: {said[:_LONGEST]}"


def _words(reference: str, registry: str) -> Sequence[tuple[re.Pattern[str], str]]:
    # In this order: a registry that does not know who asks says "denied" of what is not there,
    # and some answers have both words.
    return (
        (_INVALID, f"{reference!r} is not a reference to an image, such as python:3.12-slim"),
        (
            _REFUSED,
            f"{registry} does not give image {reference} to this cluster: it is not there, or "
            f"needs a name and a password; an operator can set these: kohaku registry set "
            f"{registry} --username NAME",
        ),
        (
            _AWAY,
            f"{registry}, the registry of image {reference}, cannot be reached from this node: "
            "{said}",
        ),
        (_UNKNOWN, f"there is no image {reference} in {registry}: look at its name and tag"),
    )


def _registry_of(reference: str) -> str:
    """Give the registry's name (distribution/reference, "splitDockerDomain")."""
    first, slash, _ = reference.partition("/")
    return (
        first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"
    )
