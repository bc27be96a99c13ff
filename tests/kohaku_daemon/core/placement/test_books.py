"""The books never hold anything twice, whatever is entered, struck out, broken or taken away."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kohaku_daemon.core.placement.books import Books
from kohaku_daemon.core.placement.choose import choose_claim, fits, missing, shortages
from kohaku_daemon.core.placement.request import Request
from protocol.ids import TaskId
from protocol.models.node import Claimed
from protocol.models.task import Claim
from tests.support.builders import GIB, an_inventory

INVENTORIES = st.builds(
    an_inventory,
    cores=st.sampled_from([0, 2, 4, 8]),
    memory=st.sampled_from([0, 4 * GIB, 9 * GIB + 1]),
    gpus=st.integers(0, 4),
    numa=st.integers(1, 2),
    max_tasks=st.integers(1, 6),
)
REQUESTS = st.builds(
    Request,
    cores=st.integers(0, 5),
    memory=st.sampled_from([0, GIB, 3 * GIB, 5 * GIB]),
    gpus=st.integers(0, 3),
    numa=st.sampled_from([None, None, 0, 1, 2]),
) | st.builds(
    lambda indices: Request(cores=1, gpus=len(indices), gpu_indices=tuple(indices)),
    st.lists(st.integers(0, 4), unique=True, max_size=2),
)


def some_books(**hardware: Any) -> Books:
    books = Books()
    books.refit(an_inventory(**hardware))
    return books


class BooksMachine(RuleBasedStateMachine):
    """Enter, strike and refit in any order, with a plain count beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books()
        self.next = 1

    @initialize(inventory=INVENTORIES)
    def begin(self, inventory: Any) -> None:
        self.books.refit(inventory)

    @rule(request=REQUESTS)
    def ask(self, request: Request) -> None:
        reasons = shortages(request, self.books)
        assert fits(request, self.books) == (not reasons), reasons
        if request.numa is None and not request.gpu_indices:
            assert (missing(request, self.books) == 0) == (not reasons), reasons
        if reasons:
            return
        claim = choose_claim(request, self.books)
        assert self.books.has_free(claim)
        assert (len(claim.cores), len(claim.gpus)) == (request.cores, request.gpus)
        self.books.enter(TaskId(self.next), claim)
        self.next += 1

    @precondition(lambda self: self.books.claims)
    @rule(data=st.data())
    def strike(self, data: st.DataObject) -> None:
        self.books.strike(data.draw(st.sampled_from(sorted(self.books.claims))))

    @precondition(lambda self: self.books.inventory.gpus)
    @rule(data=st.data())
    def break_gpus(self, data: st.DataObject) -> None:
        uuids = [gpu.uuid for gpu in self.books.inventory.gpus]
        broken = data.draw(st.lists(st.sampled_from(uuids), unique=True))
        self.books.refit(self.books.inventory, dict.fromkeys(broken, "fell off the bus"))

    @rule(inventory=INVENTORIES)
    def come_back_as_another_machine(self, inventory: Any) -> None:
        self.books.refit(inventory)

    @invariant()
    def nothing_is_held_twice_and_all_is_accounted_for(self) -> None:
        self.books.check()
        books, inventory = self.books, self.books.inventory
        held = [core for claim in books.claims.values() for core in claim.cores]
        assert books.free_cores | (set(held) & set(inventory.cores)) == set(inventory.cores)
        uuids = {gpu.uuid for gpu in inventory.gpus}
        held_gpus = {gpu for claim in books.claims.values() for gpu in claim.gpus}
        assert books.free_gpus == uuids - held_gpus - set(books.faults)
        for numa in inventory.numa:
            pinned = [c.memory for c in books.claims.values() if c.numa == numa.number]
            assert books.free_numa_memory[numa.number] == numa.memory - sum(pinned)

    def teardown(self) -> None:
        for task in list(self.books.claims):
            self.books.strike(task)
        assert self.books.free_cores == set(self.books.inventory.cores)
        assert self.books.free_memory == self.books.inventory.memory


TestBooks = BooksMachine.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_what_is_not_free_cannot_be_entered() -> None:
    books = some_books(cores=2)
    books.enter(TaskId(1), Claim(cores=(0,)))
    with pytest.raises(ValueError, match="of task 2 is not free"):
        books.enter(TaskId(2), Claim(cores=(0, 1)))
    with pytest.raises(ValueError, match="task 1 holds a claim already"):
        books.enter(TaskId(1), Claim(cores=(1,)))


def test_a_machine_that_came_back_smaller_still_takes_what_claims_nothing() -> None:
    books = some_books(memory=8 * GIB)
    books.enter(TaskId(1), Claim(memory=6 * GIB))
    books.refit(an_inventory(memory=4 * GIB))
    assert books.free_memory == -2 * GIB
    assert fits(Request(cores=1), books)
    assert not fits(Request(memory=GIB), books)
    books.enter(TaskId(2), choose_claim(Request(cores=1), books))


def test_a_gpu_that_breaks_while_held_is_not_free_when_its_task_ends() -> None:
    books = some_books(gpus=2)
    books.enter(TaskId(1), Claim(gpus=("GPU-0",)))
    books.refit(books.inventory, {"GPU-0": "fell off the bus"})
    books.strike(TaskId(1))
    assert books.free_gpus == {"GPU-1"}
    books.refit(books.inventory, {})
    assert books.free_gpus == {"GPU-0", "GPU-1"}


def test_the_idle_machine_with_and_without_its_faults() -> None:
    books = some_books(gpus=2)
    books.refit(books.inventory, {"GPU-0": "fell off the bus"})
    assert books.emptied().free_gpus == {"GPU-0", "GPU-1"}
    assert books.idle().free_gpus == {"GPU-1"}


def test_claims_are_summed_up() -> None:
    books = some_books(cores=8, gpus=2)
    books.enter(TaskId(1), Claim(cores=(0, 1), memory=GIB, gpus=("GPU-0",)))
    books.enter(TaskId(2), Claim(cores=(2,)))
    assert books.claimed() == Claimed(tasks=2, cores=3, memory=GIB, gpus=1)
