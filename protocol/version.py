"""Which versions of the protocol may talk.

The rule: a host speaks its own version and the one before it, so that runners and
clients can be upgraded after the host. Fields are added with defaults and methods are
only ever added, so within one version nothing needs to be negotiated but capabilities.
"""

from __future__ import annotations

from typing import Final

#: Of the wire. Raised only when an old peer would misunderstand a new one.
PROTOCOL_VERSION: Final = 1

#: The oldest version this code still understands.
OLDEST_VERSION: Final = 1

#: What this peer can do beyond the base protocol, by name; unknown names are ignored.
CAPABILITIES: Final = ("streams", "watch-resume")


def can_talk(version: int) -> bool:
    """Say whether a peer of ``version`` is understood."""
    return OLDEST_VERSION <= version <= PROTOCOL_VERSION
