"""The way from ``up`` and ``down`` to their own host: as its admin, over the protocol.

Knows: where the host says it is, and the token it made for the user it runs as.
Does not know: what is asked of it.
"""

from __future__ import annotations

from pathlib import Path

from protocol import contexts
from protocol.client import Connection
from protocol.errors import KohakuError, Unavailable


def url_of(data: Path) -> str | None:
    """Give the address of a host that is ready, as this machine reaches it."""
    try:
        return (data / "host.url").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None


def forget_url(data: Path) -> None:
    """Remove the address that a host left when it was killed."""
    (data / "host.url").unlink(missing_ok=True)


def token_of(data: Path) -> str:
    """Read the admin's token, made at the host's first start.

    Raises:
        KohakuError: It is not there any more, or not for this user.
    """
    path = data / "admin.token"
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise KohakuError(
            f"cannot read the admin's token {path}: {error.strerror}",
            hint="the user who started this cluster can; kohaku login works with any token",
        ) from error


async def enter(data: Path) -> Connection:
    """Connect to the host of this home.

    Raises:
        Unavailable: It does not run, or does not answer.
        KohakuError: There is no token, or the host does not take it.
    """
    url = url_of(data)
    if url is None:
        raise Unavailable("the host of this machine does not run", hint="kohakud up --detach")
    return await Connection.dial(url, token=token_of(data), agent="kohakud")


def save_context(connection: Connection, data: Path) -> str:
    """Save the context ``local`` for people's commands; use it if none, or it, is in use.

    Gives the name of the context in use.
    """
    welcome = connection.welcome
    context = contexts.Context(
        "local", connection.url, token_of(data), welcome.user, welcome.cluster
    )
    in_use = contexts.load().current
    contexts.save(context, use=in_use in ("", "local"))
    return in_use or "local"
