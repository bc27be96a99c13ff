"""Owners take turns."""

from collections import Counter

from kohaku_daemon.core.cluster.fair_order import FairOrder, cost_of
from kohaku_daemon.core.placement.request import Request
from protocol.ids import UserName

ADA, BOB = UserName("ada"), UserName("bob")


def next_of(turns: FairOrder, **costs: float) -> str:
    owner = min((UserName(name) for name in costs), key=lambda one: (turns.of(one), one))
    turns.take(owner, costs[owner])
    return owner


def test_who_waits_for_equal_things_takes_turns() -> None:
    turns = FairOrder()
    turns.join(ADA)
    turns.join(BOB)
    assert [next_of(turns, ada=1, bob=1) for _ in range(4)] == ["ada", "bob", "ada", "bob"]


def test_who_asks_for_more_goes_less_often() -> None:
    turns = FairOrder()
    turns.join(ADA)
    turns.join(BOB)
    assert Counter(next_of(turns, ada=8, bob=1) for _ in range(90)) == {"ada": 10, "bob": 80}


def test_who_begins_to_wait_is_next_and_has_saved_nothing_up() -> None:
    turns = FairOrder()
    turns.join(ADA)
    for _ in range(1000):
        turns.take(ADA, 1)
    turns.join(BOB)
    assert turns.of(BOB) < turns.of(ADA)
    assert [next_of(turns, ada=1, bob=1) for _ in range(4)] == ["bob", "ada", "bob", "ada"]


def test_leaving_and_coming_back_does_not_win_a_turn() -> None:
    turns = FairOrder()
    turns.join(ADA)
    turns.take(ADA, 100)
    turns.leave(ADA)
    turns.join(ADA)
    assert turns.of(ADA) == 100


def test_the_dearest_part_of_a_request_counts() -> None:
    assert cost_of(Request()) == 1
    assert cost_of(Request(cores=6, gpus=1)) == 8
    assert cost_of(Request(cores=2, memory=64 * 2**30)) == 16
