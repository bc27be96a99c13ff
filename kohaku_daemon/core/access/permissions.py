"""Who may call what, and who may see and touch whose tasks.

Knows: roles, owners, the table of methods.
Does not know: how somebody proved who they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protocol.errors import Forbidden, Unauthenticated
from protocol.ids import UserName
from protocol.methods import Method
from protocol.models.access import Role
from protocol.models.task import TaskSpec


@dataclass(frozen=True, slots=True)
class Actor:
    """Somebody at the door."""

    user: UserName
    role: Role
    #: First characters of the token in use.
    token: str = ""
    #: Where the connection comes from.
    address: str = ""


STRANGER = Actor(UserName(""), Role.ANONY)


def check_call(actor: Actor, method: Method[Any, Any]) -> None:
    """Let an actor call a method, or say why not.

    Raises:
        Unauthenticated: Nobody is known and the method needs somebody.
        Forbidden: The role does not reach.
    """
    if actor.role.reaches(method.least):
        return
    if actor.role is Role.ANONY:
        raise Unauthenticated(
            f"{method.name} needs an API token",
            hint="log in with: kohaku login URL, or set KOHAKU_TOKEN",
        )
    raise Forbidden(f"{method.name} needs role {method.least}; {actor.user} is {actor.role}")


def sees_all(actor: Actor) -> bool:
    """Say whether an actor may see the contents of everybody's tasks."""
    return actor.role.reaches(Role.OPERATOR)


def check_powers(actor: Actor, spec: TaskSpec) -> None:
    """Refuse a task the powers that its owner may not have, whatever nodes allow.

    Raises:
        Forbidden: It asks for a privileged container, and is no operator's.
    """
    if spec.privileged and not actor.role.reaches(Role.OPERATOR):
        raise Forbidden(
            f"privileged containers are for operators; {actor.user} is {actor.role}",
            hint="leave out --privileged, or ask an operator to submit it",
        )


def may_see_contents(actor: Actor, owner: UserName) -> bool:
    """Say whether an actor may see a task's command, variables and output."""
    return sees_all(actor) or (actor.role.reaches(Role.USER) and actor.user == owner)


def may_steer(actor: Actor, owner: UserName) -> bool:
    """Say whether an actor may kill, pause or resume a task."""
    return may_see_contents(actor, owner)
