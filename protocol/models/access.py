"""Who may do how much: the ladder of roles."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """A rung of the ladder. Each may do all that the ones before it may."""

    ANONY = "anony"
    VIEWER = "viewer"
    USER = "user"
    OPERATOR = "operator"
    ADMIN = "admin"

    def reaches(self, least: Role) -> bool:
        """Say whether this role is at least ``least``."""
        return _RUNG[self] >= _RUNG[least]


_RUNG: Final = {role: rung for rung, role in enumerate(Role)}
