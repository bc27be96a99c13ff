"""Who holds which GPU, and where a claim lies, as people read it."""

from __future__ import annotations

import pytest

from kohaku_daemon.core.placement.books import Books
from kohaku_daemon.core.placement.words import name_by_id, say_gpus_taken, say_place
from protocol.ids import TaskId
from protocol.models.task import Claim
from tests.support.builders import GIB, an_inventory


def some_books(*claims: Claim, gpus: int, numa: int = 1) -> Books:
    books = Books()
    books.refit(an_inventory(8, gpus=gpus, numa=numa))
    for number, claim in enumerate(claims, 1):
        books.enter(TaskId(number), claim)
    return books


def test_gpus_that_cannot_be_had_are_told_by_who_has_them() -> None:
    books = some_books(
        Claim(gpus=("GPU-0", "GPU-1", "GPU-4")), Claim(gpus=("GPU-3",)), gpus=6
    )  # fmt: skip
    books.give_up(TaskId(2), 3)
    books.refit(books.inventory, {"GPU-2": "lost"})
    assert say_gpus_taken(books, lambda task: f"task {task} of bob") == (
        "GPUs 0-1,4 are held by task 1 of bob, GPU 2 is out of service: lost, "
        "GPU 3 is held by attempt 3 of task 2 of bob, which was given up and has not been seen "
        "to end"
    )


def test_eight_holders_are_named_and_the_rest_counted() -> None:
    books = some_books(*(Claim(gpus=(f"GPU-{index}",)) for index in range(12)), gpus=12)
    told = say_gpus_taken(books, name_by_id)
    assert told.startswith("GPU 0 is held by task 1, GPU 1 is held by task 2, ")
    assert told.endswith("GPU 7 is held by task 8, 4 more not free either")


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (Claim(cores=(0, 1, 2), gpus=("GPU-0",)), "cores 0-2 of NUMA node 0, GPU 0 of NUMA node 0"),
        (
            Claim(cores=(3, 4), memory=GIB, numa=0),
            "core 3 of NUMA node 0, core 4 of NUMA node 1, memory of NUMA node 0",
        ),
        (
            Claim(cores=(0,), gpus=("GPU-2", "GPU-3")),
            "core 0 of NUMA node 0, GPUs 2-3 of NUMA node 1, away from its cores",
        ),
        (Claim(memory=GIB), ""),
    ],
)
def test_where_a_claim_lies(claim: Claim, words: str) -> None:
    assert say_place(claim, some_books(gpus=4, numa=2)) == words


def test_where_all_lies_together_only_gpus_are_worth_a_word() -> None:
    books = some_books(gpus=4)
    assert say_place(Claim(cores=(0, 1), memory=GIB), books) == ""
    assert say_place(Claim(cores=(0, 1), gpus=("GPU-3",)), books) == "cores 0-1, GPU 3"
