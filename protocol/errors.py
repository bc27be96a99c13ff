"""Every error a person or a program may meet, by what the reader can do about it.

Knows: the stable code, what went wrong with which thing, what to try next, the exit status.
Does not know: sockets, screens. Those carry a KohakuError or show one.

A message says what happened to *which* thing. A hint says what to do next; it is left
empty rather than guessed. Details are plain values that a program may act on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec

_BY_CODE: Final[dict[str, type[KohakuError]]] = {}


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, object] = msgspec.field(default_factory=dict)


class KohakuError(Exception):
    """Root of our errors. Anything else that escapes is a bug."""

    #: Stable name on the wire and in ``--json``. Never reused, never renamed.
    code: ClassVar[str] = "internal"
    #: Exit status of the command line.
    exit_status: ClassVar[int] = 1

    def __init__(
        self, message: str, *, hint: str = "", details: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = dict(details or {})

    def __init_subclass__(cls) -> None:
        if "code" in vars(cls) and _BY_CODE.setdefault(cls.code, cls) is not cls:
            raise TypeError(f"error code {cls.code!r} is already taken")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"


class BadRequest(KohakuError):
    """The request makes no sense as it is: change it."""

    code = "bad_request"
    exit_status = 2


class Unauthenticated(KohakuError):
    """The host does not know who is asking."""

    code = "unauthenticated"


class Forbidden(KohakuError):
    """The host knows who is asking, and the answer is no."""

    code = "forbidden"


class NotFound(KohakuError):
    """There is no such thing, or not for the one who asks."""

    code = "not_found"


class Conflict(KohakuError):
    """The thing is not in a state that allows this."""

    code = "conflict"


class QuotaExceeded(KohakuError):
    """A group's quota would be exceeded."""

    code = "quota_exceeded"


class NoFit(KohakuError):
    """No node, even an idle one, could ever hold the task."""

    code = "no_fit"


class Unavailable(KohakuError):
    """What is needed cannot be reached now: try later."""

    code = "unavailable"
    exit_status = 3


class TimedOut(KohakuError):
    """It took longer than was allowed. It may still happen."""

    code = "timeout"


class TooLarge(KohakuError):
    """Something exceeds a limit of the wire or of a store."""

    code = "too_large"


class Unsupported(KohakuError):
    """This peer, node or version cannot do that."""

    code = "unsupported"


class Internal(KohakuError):
    """A bug on the other side. The message carries the incident's number for the log."""

    code = "internal"


#: The closed list of codes that travel.
CODES: Final = frozenset(_BY_CODE)


def to_wire(error: KohakuError) -> ErrorBody:
    """Make an error ready to travel."""
    return ErrorBody(error.code, error.message, error.hint, error.details)


def from_wire(body: ErrorBody) -> KohakuError:
    """Make an error of what came. An unknown code of a newer peer becomes the root class."""
    kind = _BY_CODE.get(body.code, KohakuError)
    return kind(body.message, hint=body.hint, details=body.details)
