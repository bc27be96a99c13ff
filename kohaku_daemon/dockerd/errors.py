"""What can go wrong with a Docker engine, by what there is to do about it."""

from __future__ import annotations

from protocol.errors import KohakuError, NotFound, Unavailable


class EngineAbsent(Unavailable):
    """There is no Docker engine on this machine, or none that we may use."""


class EngineAway(Unavailable):
    """The engine does not answer. Whether it has done what it was asked is not known."""


class EngineRefused(KohakuError):
    """The engine answered, and the answer is no: nothing was done.

    ``status`` is that of HTTP: 400 for what makes no sense, 404 for what is not there, 409 for
    what is in another state, 500 for what it could not do; the message is the engine's own.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NoSuchImage(NotFound):
    """There is no such image on this machine, or in the registry it was to come from."""
