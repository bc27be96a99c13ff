"""Whom attacks are aimed at, and what the attacker has in hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A host, as somebody sees it who means no good."""

    authority: tuple[str, int]
    #: API token of an ordinary user, stolen or his own.
    token: str
    #: Credential of a node that was broken into.
    credential: str
    #: Name of that node.
    node: str
    #: A node that is somebody else's.
    other_node: str
    #: Where attacks come from; all of 127/8 is this machine.
    source: str = "127.0.0.2"

    @property
    def url(self) -> str:
        """Where the host is."""
        return f"http://{self.authority[0]}:{self.authority[1]}"
