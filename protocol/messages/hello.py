"""The first words on a connection, and who one is."""

from __future__ import annotations

import msgspec

from protocol.ids import UserName
from protocol.models.access import Role


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """First call on every connection; anything before it closes the connection."""

    #: The newest version of the protocol the dialling side speaks.
    version: int
    #: API token (``kht_``) on /v1/ws, credential (``khr_``) on /v1/runner; empty for a stranger.
    token: str = ""
    #: Program and version, for the host's log.
    agent: str = ""
    capabilities: tuple[str, ...] = ()
    #: The oldest version it speaks; 0 if only ``version``.
    oldest: int = 0


class Welcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the host answers."""

    #: Spoken from here on: the newest that both sides know.
    version: int
    #: Snowflake id of the cluster as text; a client that saved it notices a stranger's host.
    cluster: str
    role: Role
    user: UserName = UserName("")
    #: Of the host's software.
    agent: str = ""
    capabilities: tuple[str, ...] = ()
    #: Seconds; the host pings a connection silent for as long, and closes it after twice that.
    keep_alive_s: float = 20.0


class WhoAmI(msgspec.Struct, frozen=True):
    """Ask who one is."""


class Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who one is."""

    user: UserName
    role: Role
    #: First characters of the token in use, never more.
    token: str = ""
    cluster: str = ""
