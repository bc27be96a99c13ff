"""Going past a hold: only where the holder is not delayed by it."""

import math

import pytest

from kohaku_daemon.core.placement.backfill import Hold, find_start
from kohaku_daemon.core.placement.books import Books
from kohaku_daemon.core.placement.request import Request
from protocol.ids import NodeName, TaskId
from protocol.models.task import Claim
from tests.support.builders import an_inventory

N1 = NodeName("n1")
NOW = 1000.0


def books_with(*claims: Claim, cores: int = 4, gpus: int = 0) -> Books:
    books = Books()
    books.refit(an_inventory(cores, gpus=gpus))
    for number, claim in enumerate(claims, 1):
        books.enter(TaskId(number), claim)
    return books


def ends(**at: float) -> dict[TaskId, float]:
    return {TaskId(int(name[1:])): when for name, when in at.items()}


def passes(holder: Request | None, request: Request, books: Books, **at: float) -> bool:
    known = ends(**at)
    hold = Hold(N1, TaskId(99), holder)
    return hold.lets_pass(request, books, NOW, lambda task: known.get(task, math.inf))


def test_what_the_holder_has_enough_of_may_be_taken_down_to_its_need() -> None:
    books = books_with(Claim(gpus=("GPU-0",)), cores=8, gpus=1)
    waits_for_gpu = Request(cores=2, gpus=1)
    assert passes(waits_for_gpu, Request(cores=6), books)
    assert not passes(waits_for_gpu, Request(cores=7), books)


def test_what_the_holder_lacks_is_left_alone() -> None:
    books = books_with(Claim(cores=(0, 1)))
    assert not passes(Request(cores=4), Request(cores=1), books)
    assert passes(Request(cores=4), Request(cores=0), books)


def test_a_task_that_surely_ends_before_the_holder_could_begin_may_go_past() -> None:
    books = books_with(Claim(cores=(0, 1)), Claim(cores=(2,)))
    holder = Request(cores=4)
    known = {"t1": NOW + 100, "t2": NOW + 50}
    assert passes(holder, Request(cores=1, longest_s=100), books, **known)
    assert not passes(holder, Request(cores=1, longest_s=101), books, **known)
    assert not passes(holder, Request(cores=1), books, **known)


def test_nobody_goes_past_where_nobody_knows_when_the_holder_begins() -> None:
    books = books_with(Claim(cores=(0, 1)), Claim(cores=(2,)))
    short = Request(cores=1, longest_s=1)
    assert not passes(Request(cores=4), short, books, t2=NOW + 50)
    assert not passes(None, Request(cores=0), books)


@pytest.mark.parametrize("named", [Request(cores=2, numa=0), Request(gpus=1, gpu_indices=(0,))])
def test_named_parts_are_not_counted_on(named: Request) -> None:
    books = books_with(Claim(cores=(0, 1, 2), gpus=("GPU-0",)), gpus=1)
    assert find_start(named, books, lambda _: NOW) == math.inf
    assert not passes(named, Request(cores=1), books)
    assert not passes(Request(cores=4), named, books)


def test_the_start_is_the_first_end_after_which_all_is_there() -> None:
    books = books_with(Claim(cores=(0,)), Claim(cores=(1,)), Claim(cores=(2,)))
    known = ends(t1=30.0, t2=10.0, t3=20.0)
    assert find_start(Request(cores=3), books, known.__getitem__) == 20.0
