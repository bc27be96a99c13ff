"""Roles open methods by the table; owners and operators open tasks."""

import pytest

from kohaku_daemon.core.access.permissions import (
    STRANGER,
    check_call,
    check_powers,
    may_see_contents,
    may_steer,
)
from protocol.errors import Forbidden, Unauthenticated
from protocol.ids import UserName
from protocol.methods import METHODS, NODE_DRAIN, TASK_SUBMIT, Door
from protocol.models.access import Role
from tests.support.builders import a_spec, a_user

ADA = UserName("ada")


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.door is Door.CLIENT])
def test_every_method_opens_at_its_rung_and_stays_open_above(name: str) -> None:
    method, roles = METHODS[name], list(Role)
    opens_at = roles.index(method.least)
    for role in roles:
        actor = a_user(role=role)
        if roles.index(role) >= opens_at:
            check_call(actor, method)
        else:
            wanted = Unauthenticated if role is Role.ANONY else Forbidden
            with pytest.raises(wanted, match=name):
                check_call(actor, method)


def test_a_stranger_is_told_to_log_in() -> None:
    with pytest.raises(Unauthenticated) as caught:
        check_call(STRANGER, TASK_SUBMIT)
    assert caught.value.message == "task.submit needs an API token"
    assert "kohaku login" in caught.value.hint


def test_who_is_known_is_told_what_is_missing() -> None:
    with pytest.raises(Forbidden) as caught:
        check_call(a_user("ada", Role.USER), NODE_DRAIN)
    assert caught.value.message == "node.drain needs role operator; ada is user"


@pytest.mark.parametrize("role", Role)
def test_privileged_containers_are_for_operators(role: Role) -> None:
    actor = a_user("ada", role)
    check_powers(actor, a_spec(image="busybox"))
    if role.reaches(Role.OPERATOR):
        check_powers(actor, a_spec(privileged=True))
        return
    with pytest.raises(Forbidden) as caught:
        check_powers(actor, a_spec(privileged=True))
    assert caught.value.message == f"privileged containers are for operators; ada is {role}"


@pytest.mark.parametrize(
    ("user", "role", "allowed"),
    [
        ("ada", Role.ANONY, False),
        ("ada", Role.VIEWER, False),
        ("ada", Role.USER, True),
        ("bob", Role.USER, False),
        ("bob", Role.OPERATOR, True),
        ("bob", Role.ADMIN, True),
    ],
)
def test_whose_tasks_somebody_may_look_into_and_steer(user: str, role: Role, allowed: bool) -> None:
    actor = a_user(user, role)
    assert may_see_contents(actor, ADA) == may_steer(actor, ADA) == allowed
