"""Each task of a batch whose machines are known is told where the others are."""

from collections.abc import Iterable
from typing import Any

import pytest
from msgspec.structs import replace

from kohaku_daemon.core.cluster.ended import EndedTasks
from kohaku_daemon.core.cluster.events import RetryAsked
from kohaku_daemon.core.task.validation import MOST_HOSTS
from protocol.ids import NodeName
from protocol.messages.runner import AttemptState, Order, OrderStart
from protocol.models.task import Cause, Exit
from tests.support.builders import (
    a_cluster,
    a_node,
    a_spec,
    a_submission,
    a_user,
    an_inventory,
    registered,
)
from tests.support.playbook import Playbook

CALLED = replace(an_inventory(cores=2), hostname="box.lab.example")


def a_play(*names: str) -> Playbook:
    """Make nodes of two cores; the machine of n1 says what it is called."""
    machines = (CALLED if name == "n1" else an_inventory(cores=2) for name in names)
    return Playbook(a_cluster(a_node(*one) for one in zip(names, machines, strict=True)))


def told(orders: Iterable[Order]) -> dict[int, tuple[str, ...]]:
    """Give what each ordered task is told, by its index."""
    return {order.index: order.hosts for order in orders if isinstance(order, OrderStart)}


def submit(play: Playbook, **more: Any) -> None:
    play.tell(a_submission(a_spec(cores=more.pop("cores", 1)), **more))
    assert play.refusal is None
    play.finish()


def test_targets_name_the_machines_before_all_are_placed() -> None:
    play = a_play("n1", "n2")
    submit(play, targets=["n2", "n1", "n2", "n2"])
    play.place()
    hosts = ("n2", "box.lab.example", "n2", "n2")
    assert told(play.orders) == dict.fromkeys((0, 1, 2), hosts)
    play.hear(1, AttemptState.ENDED, node="n2", exit_=Exit(Cause.EXITED, code=0))
    play.place()
    assert told(play.orders) == {3: hosts}


def test_a_gang_is_told_where_all_of_it_is() -> None:
    play = a_play("n1", "n2")
    submit(play, array=2, gang=True, cores=2)
    play.place()
    (hosts,) = set(told(play.orders).values())
    assert sorted(hosts) == ["box.lab.example", "n2"]
    members = play.engine.state.tasks_on(NodeName("n2")).values()
    assert hosts.index("n2") == next(task.index for task in members)


@pytest.mark.parametrize("name", ["", "a,b", "-x", "x" * 65, "a b", "\u00fc"])
def test_a_machine_without_a_name_to_go_by_is_called_as_its_node(name: str) -> None:
    machine = replace(CALLED, hostname=name)
    play = Playbook(a_cluster([a_node("n1", machine)]))
    submit(play, targets=["n1"])
    play.place()
    assert told(play.orders) == {0: ("n1",)}


def test_who_goes_wherever_there_is_room_is_told_nothing() -> None:
    play = a_play("n1", "n2")
    submit(play, array=2)
    submit(play, request_id="request-2")
    play.place()
    assert told(play.orders) == {0: (), 1: ()}


@pytest.mark.parametrize("size", [MOST_HOSTS, MOST_HOSTS + 1])
def test_the_names_are_told_of_batches_that_can_be_listed(size: int) -> None:
    play = a_play("n1")
    submit(play, targets=["n1"] * size)
    play.place()
    assert len(told(play.orders)[0]) == (size if size == MOST_HOSTS else 0)


def test_an_order_that_is_repeated_says_the_same() -> None:
    play = a_play("n1", "n2")
    submit(play, array=2, gang=True, cores=2)
    play.place()
    first = told(play.orders)
    play.tell(registered("n1", CALLED))
    (again,) = told(play.orders).items()
    assert again in first.items()


def test_a_part_of_a_batch_that_is_tried_again_is_told_nothing() -> None:
    play = a_play("n1")
    submit(play, targets=["n1", "n1"])
    play.place()
    play.hear(1, AttemptState.ENDED, exit_=Exit(Cause.EXITED, code=0))
    play.hear(2, AttemptState.ENDED, exit_=Exit(Cause.EXITED, code=3))
    ended = EndedTasks("retry-001")
    ended.take([play.task(1), play.task(2)])
    source = play.kept.batches[play.task(1).batch]
    play.tell(RetryAsked(a_user(), "retry-001", b"", source, None, ended))
    play.place()
    assert told(play.orders) == {1: ()}
