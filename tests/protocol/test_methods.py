"""THE TABLE: every method is whole, and what it says can be encoded."""

from typing import Any

import msgspec
import pytest

from protocol import methods
from protocol.methods import METHODS, Door, Method, StreamingMethod
from protocol.models.access import Role

ALL = list(METHODS.values())


def test_every_method_of_the_module_is_in_the_table_once() -> None:
    written = [one for one in vars(methods).values() if isinstance(one, Method)]
    assert sorted(one.name for one in written) == sorted(METHODS)
    assert all(METHODS[one.name] is one for one in written)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_a_method_is_whole(method: Method[Any, Any]) -> None:
    assert method.summary.endswith(".")
    kinds = [method.params, method.result]
    if isinstance(method, StreamingMethod):
        kinds.append(method.item)
    for kind in kinds:
        assert kind.__doc__, f"{kind.__name__} says nothing about itself"
        msgspec.msgpack.Decoder(kind)  # raises if it could not be decoded


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_unknown_fields_of_a_newer_peer_are_ignored(method: Method[Any, Any]) -> None:
    assert not method.params.__struct_config__.forbid_unknown_fields
    assert not method.result.__struct_config__.forbid_unknown_fields


def test_strangers_may_say_hello_and_join_and_nothing_else() -> None:
    assert {one.name for one in ALL if one.least is Role.ANONY} == {"hello", "runner.join"}


def test_what_changes_something_is_audited_and_needs_more_than_looking() -> None:
    for one in ALL:
        if one.door is Door.CLIENT:
            assert not one.audited or one.least.reaches(Role.USER), one.name
    reading = {"list", "show", "explain", "wait", "status", "logs", "watch", "whoami", "hello"}
    for one in ALL:
        if one.door is not Door.RUNNER and one.name.rpartition(".")[2] not in reading:
            assert one.audited, one.name


def test_runners_have_a_door_of_their_own() -> None:
    assert {one.name for one in ALL if one.door is Door.RUNNER} == {
        name for name in METHODS if name.startswith("runner.")
    }
    assert {one.name for one in ALL if one.door is Door.BOTH} == {"hello"}
