"""Which versions of the protocol may talk.

The rule: a host speaks its own version and the one before it, so that runners and
clients can be upgraded after the host. Each side says in ``hello`` what it speaks, and the
newest that both know is spoken. Fields are added with defaults and methods are only ever
added, so within one version nothing needs to be negotiated but capabilities.
"""

from __future__ import annotations

from typing import Final

#: Of the wire. Raised only when an old peer would misunderstand a new one.
PROTOCOL_VERSION: Final = 1

#: The oldest version this code still understands.
OLDEST_VERSION: Final = 1

#: What this peer can do beyond the base protocol, by name; unknown names are ignored.
CAPABILITIES: Final = ("streams", "watch-resume")


def agree(newest: int, oldest: int = 0) -> int | None:
    """Give the version that is spoken with a peer: the newest that both know, if there is one.

    The peer speaks all versions from ``oldest`` to ``newest``; without ``oldest`` (0) it is one
    that only said which it prefers, and it is held to that.
    """
    spoken = min(newest, PROTOCOL_VERSION)
    return spoken if spoken >= max(OLDEST_VERSION, oldest or newest) else None
