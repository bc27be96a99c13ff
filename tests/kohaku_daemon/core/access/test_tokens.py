"""Tokens: what they look like, and that nothing that opens a door is stored or shown."""

import hashlib

import pytest

from kohaku_daemon.core.access.tokens import (
    TokenKind,
    is_token,
    make_token,
    token_digest,
    token_prefix,
)

RANDOM = bytes(range(32))


@pytest.mark.parametrize("kind", TokenKind)
def test_a_token_tells_its_kind(kind: TokenKind) -> None:
    token = make_token(kind, RANDOM)
    assert token == kind + RANDOM.hex()
    assert [other for other in TokenKind if is_token(other, token)] == [kind]


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_token_is_never_made_of_less_chance(size: int) -> None:
    with pytest.raises(ValueError, match=f"32 random bytes, not {size}"):
        make_token(TokenKind.API, bytes(size))


@pytest.mark.parametrize(
    "text",
    ["", "kht_", "kht_" + "0" * 63, "kht_" + "0" * 65, "KHT_" + "0" * 64, "kht_" + "\u0660" * 64,
     "kht_" + "0" * 63 + "\n", "kht_" + "0" * 63 + " ", "kht_" + "g" * 64],
)  # fmt: skip
def test_what_is_no_token(text: str) -> None:
    assert not is_token(TokenKind.API, text)


def test_only_a_digest_is_stored_and_only_a_beginning_shown() -> None:
    token = make_token(TokenKind.API, RANDOM)
    assert token_digest(token) == hashlib.sha3_512(token.encode()).hexdigest()
    assert token_prefix(token) == "kht_000102"
