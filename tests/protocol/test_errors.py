"""Errors keep their code, their words and their facts on the way to whoever reads them."""

import msgspec
import pytest

from protocol.errors import (
    CODES,
    BadRequest,
    ErrorBody,
    KohakuError,
    NoFit,
    Unavailable,
    from_wire,
    to_wire,
)

#: Never renamed, never reused: programs act on them.
WIRE_CODES = {
    "bad_request", "unauthenticated", "forbidden", "not_found", "conflict", "quota_exceeded",
    "no_fit", "unavailable", "timeout", "too_large", "unsupported", "internal",
}  # fmt: skip


def kinds() -> list[type[KohakuError]]:
    return [kind for kind in KohakuError.__subclasses__() if kind.__module__ == "protocol.errors"]


def test_the_list_of_codes_is_closed() -> None:
    assert CODES == WIRE_CODES
    assert {kind.code for kind in kinds()} == WIRE_CODES


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.code)
def test_an_error_arrives_as_what_it_was(kind: type[KohakuError]) -> None:
    sent = kind("it broke", hint="mend it", details={"where": "n1"})
    data = msgspec.msgpack.encode(to_wire(sent))
    got = from_wire(msgspec.msgpack.decode(data, type=ErrorBody))
    assert type(got) is kind
    assert (got.message, got.hint, got.details) == ("it broke", "mend it", {"where": "n1"})


def test_a_code_of_a_newer_peer_is_an_error_all_the_same() -> None:
    got = from_wire(ErrorBody("from_the_future", "it broke", "mend it"))
    assert type(got) is KohakuError
    assert got.message == "it broke"


def test_two_errors_cannot_share_a_code() -> None:
    with pytest.raises(TypeError, match="error code 'no_fit' is already taken"):
        type("Other", (KohakuError,), {"code": "no_fit"})


def test_an_error_without_a_code_of_its_own_is_of_its_family() -> None:
    class Narrower(NoFit):
        """Says more for us, and the same for others."""

    assert to_wire(Narrower("too big")).code == "no_fit"


def test_exit_statuses_tell_usage_refusal_and_no_connection_apart() -> None:
    assert (BadRequest.exit_status, NoFit.exit_status, Unavailable.exit_status) == (2, 1, 3)


def test_details_are_the_errors_own() -> None:
    details = {"a": 1}
    error = NoFit("too big", details=details)
    details["a"] = 2
    assert error.details == {"a": 1}
    assert repr(error) == "NoFit('too big')"
    assert str(error) == "too big"
