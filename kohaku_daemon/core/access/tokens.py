"""Secrets that open doors: their kinds, and the digest that is kept of them.

A token is a prefix that tells its kind and 256 random bits in hexadecimal. Only its
SHA3-512 digest is stored: with that much entropy a slow hash would protect nothing
(FIPS 202; guessing 2**256 is hopeless at any speed) and would make every call dear.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Final

_RANDOM_BYTES: Final = 32
_HEXADECIMAL: Final = frozenset("0123456789abcdef")


class TokenKind(StrEnum):
    """What a token opens, by its first letters."""

    API = "kht_"
    JOIN = "khj_"
    RUNNER = "khr_"


def make_token(kind: TokenKind, random: bytes) -> str:
    """Write a token of 32 random bytes."""
    if len(random) != _RANDOM_BYTES:
        raise ValueError(f"a token is made of {_RANDOM_BYTES} random bytes, not {len(random)}")
    return kind + random.hex()


def is_token(kind: TokenKind, text: str) -> bool:
    """Say whether the text has the form of a token of this kind."""
    return (
        text.startswith(kind)
        and len(text) == len(kind) + 2 * _RANDOM_BYTES
        and _HEXADECIMAL.issuperset(text[len(kind) :])
    )


def token_digest(token: str) -> str:
    """Give what is stored of a token and looked up. Looking up a digest leaks no prefix in time."""
    return hashlib.sha3_512(token.encode()).hexdigest()


def token_prefix(token: str) -> str:
    """Give what may be shown of a token."""
    return token[:10]
