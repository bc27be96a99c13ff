"""Exactly what a request would hold of one node, and why it would not fit there, in words."""

from typing import Any

import pytest

from kohaku_daemon.core.placement.books import Books
from kohaku_daemon.core.placement.choose import (
    ailment,
    choose_claim,
    fits,
    missing,
    shortages,
    unsuitable,
)
from kohaku_daemon.core.placement.request import Request, request_of
from protocol.ids import TaskId
from protocol.models.node import BackendInfo, Gpu, Inventory
from protocol.models.target import parse_target
from protocol.models.task import Claim
from tests.support.builders import GIB, a_spec, an_inventory


def some_books(*claims: Claim, **hardware: Any) -> Books:
    books = Books()
    books.refit(an_inventory(**hardware))
    for number, claim in enumerate(claims, 1):
        books.enter(TaskId(number), claim)
    return books


def test_a_request_is_the_spec_and_the_target_together() -> None:
    spec = a_spec(cores=2, memory=GIB, labels={"b": "2", "a": "1"}, backend="process")
    assert request_of(spec, parse_target("n1:1:3,2")) == Request(
        cores=2, memory=GIB, gpus=2, labels=(("a", "1"), ("b", "2")), backend="process",
        node="n1", numa=1, gpu_indices=(3, 2),
    )  # fmt: skip
    assert request_of(a_spec(gpus=4), None) == Request(cores=1, gpus=4)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(cores=3), "3 cores wanted, 2 of 8 free"),
        (Request(memory=7 * GIB), "7 GiB memory wanted, 6 GiB of 8 GiB free"),
        (
            Request(gpus=3),
            "3 GPUs wanted, 2 of 4 free: GPU 0 is held by task 1, "
            "GPU 3 is out of service: fell off the bus",
        ),
        (Request(gpus=1, gpu_indices=(0,)), "GPU 0 is held by task 1"),
        (Request(gpus=1, gpu_indices=(3,)), "GPU 3 is out of service: fell off the bus"),
        (Request(gpus=1, gpu_indices=(7,)), "GPU 7 wanted, the node has GPUs 0-3"),
        (Request(cores=2, numa=0), "2 cores wanted, 1 of 4 free on NUMA node 0"),
        (
            Request(memory=3 * GIB, numa=0),
            "3 GiB memory wanted, 2 GiB of 4 GiB free on NUMA node 0",
        ),
        (Request(numa=5), "NUMA node 5 wanted, this node has only 0, 1"),
    ],
)
def test_every_shortage_has_its_words(request_: Request, words: str) -> None:
    books = some_books(
        Claim(cores=(0, 1, 2), gpus=("GPU-0",), memory=2 * GIB, numa=0),
        Claim(cores=(4, 5, 6)),
        cores=8, gpus=4, numa=2,
    )  # fmt: skip
    books.refit(books.inventory, {"GPU-3": "fell off the bus"})
    assert shortages(request_, books) == [words]
    assert not fits(request_, books)


def test_pinned_memory_is_short_on_its_numa_node_or_on_the_whole_one() -> None:
    request = Request(memory=3 * GIB, numa=0)
    unpinned = some_books(Claim(memory=6 * GIB), numa=2)
    assert shortages(request, unpinned) == ["3 GiB memory wanted, 2 GiB of 8 GiB free"]
    wide = Request(cores=5, memory=5 * GIB, numa=1)
    assert shortages(wide, some_books(cores=8, numa=2), of_all=True) == [
        "5 cores wanted, NUMA node 1 has 4",
        "5 GiB memory wanted, NUMA node 1 has 4 GiB",
    ]


def test_all_that_is_short_is_said_at_once() -> None:
    request = Request(cores=9, memory=9 * GIB, gpus=1)
    assert shortages(request, some_books(Claim(), cores=8, max_tasks=1)) == [
        "9 cores wanted, 8 of 8 free",
        "9 GiB memory wanted, 8 GiB of 8 GiB free",
        "1 GPU wanted, the node has none",
        "1 tasks are there already, the node's limit",
    ]


def test_nothing_wanted_is_never_short_of_anything_but_a_place() -> None:
    everything = Claim(cores=(0, 1, 2, 3), memory=8 * GIB)
    assert shortages(Request(), some_books(everything)) == []
    assert shortages(Request(), some_books(everything, max_tasks=1)) != []


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(labels=(("gpu", "a100"),)), "label gpu=a100 wanted, this node has gpu=v100"),
        (Request(labels=(("zone", "x"),)), "label zone=x wanted, this node has none"),
        (Request(backend="qemu"), "backend qemu is not on this node"),
    ],
)
def test_a_node_that_is_not_the_kind_says_so(request_: Request, words: str) -> None:
    assert unsuitable(request_, some_books(), {"gpu": "v100"}) == [words]


def test_a_backend_that_cannot_start_tasks_now_is_told_apart_from_one_that_is_missing() -> None:
    backends = (BackendInfo("process"), BackendInfo("docker", False, "no daemon answers"))
    books = some_books(backends=backends)
    assert unsuitable(Request(backend="docker"), books, {}) == []
    words = "backend docker cannot start tasks: no daemon answers"
    assert ailment(Request(backend="docker"), books) == words
    assert ailment(Request(), books) == ""


def test_a_node_without_any_backend_takes_nothing() -> None:
    assert unsuitable(Request(), some_books(backends=()), {}) == [
        "backend of any kind is not on this node"
    ]


def test_how_far_a_node_is_from_having_it() -> None:
    books = some_books(Claim(cores=(0, 1), memory=6 * GIB))
    assert missing(Request(cores=2, memory=2 * GIB), books) == 0
    assert missing(Request(cores=4), books) == 0.5
    assert missing(Request(cores=4, memory=8 * GIB), books) == 0.5 + 0.75
    pinned = some_books(Claim(memory=4 * GIB, numa=0), numa=2)
    assert missing(Request(memory=2 * GIB, numa=0), pinned) == 1.0


def test_a_pinned_task_gets_cores_memory_and_gpus_of_its_numa_node() -> None:
    books = some_books(cores=8, gpus=4, numa=2)
    claim = choose_claim(Request(cores=3, memory=GIB, gpus=1, numa=1), books)
    assert claim == Claim(cores=(4, 5, 6), memory=GIB, gpus=("GPU-2",), numa=1)


def test_gpus_by_index_are_those_whatever_lies_nearer() -> None:
    books = some_books(cores=8, gpus=4, numa=2)
    claim = choose_claim(Request(gpus=2, gpu_indices=(3, 0)), books)
    assert set(claim.gpus) == {"GPU-0", "GPU-3"}


def test_gpus_by_count_come_from_one_numa_node_and_bring_their_cores() -> None:
    books = some_books(Claim(gpus=("GPU-0",)), cores=8, gpus=4, numa=2)
    assert choose_claim(Request(cores=2, gpus=2), books) == Claim(
        cores=(4, 5), gpus=("GPU-2", "GPU-3")
    )
    # One alone goes where it breaks up no pair.
    assert choose_claim(Request(cores=1, gpus=1), books) == Claim(cores=(0,), gpus=("GPU-1",))


def test_gpus_by_count_may_span_numa_nodes_if_none_has_enough() -> None:
    books = some_books(cores=8, gpus=4, numa=2)
    assert choose_claim(Request(gpus=3), books).gpus == ("GPU-0", "GPU-1", "GPU-2")


def test_gpus_are_taken_where_the_cores_are_too() -> None:
    # By GPUs alone it would be NUMA node 0, where one is left and no core.
    busy = Claim(cores=(0, 1, 2, 3), gpus=("GPU-0",))
    books = some_books(busy, cores=8, gpus=4, numa=2)
    assert choose_claim(Request(cores=2, gpus=1), books) == Claim(cores=(4, 5), gpus=("GPU-2",))
    assert choose_claim(Request(gpus=1), books).gpus == ("GPU-1",)


def test_cores_that_must_span_begin_near_the_gpus() -> None:
    books = some_books(Claim(cores=(4,)), cores=8, gpus=2, numa=2)
    books.refit(books.inventory, {"GPU-0": "lost"})
    assert choose_claim(Request(cores=5, gpus=1), books) == Claim(
        cores=(0, 1, 5, 6, 7), gpus=("GPU-1",)
    )


def test_a_claim_that_fits_one_numa_node_leaves_its_memory_unpinned() -> None:
    claim = choose_claim(Request(cores=1, memory=GIB, gpus=1), some_books(gpus=2, numa=2))
    assert claim.numa is None


def divided_books(*claims: Claim) -> Books:
    """Give a node of two GPUs, the first of which is divided in two."""
    gpus = (
        Gpu(0, "GPU-a", divided=True),
        Gpu(100, "MIG-0", parent="GPU-a"),
        Gpu(102, "MIG-2", parent="GPU-a"),
        Gpu(1, "GPU-b"),
    )
    books = Books()
    books.refit(Inventory(cores=(0, 1), gpus=gpus))
    for number, claim in enumerate(claims, 1):
        books.enter(TaskId(number), claim)
    return books


def test_instances_are_claimed_in_place_of_the_gpu_they_divide() -> None:
    books = divided_books()
    assert set(choose_claim(Request(gpus=3), books).gpus) == {"GPU-b", "MIG-0", "MIG-2"}
    assert shortages(Request(gpus=4), books.emptied(), of_all=True) == [
        "4 GPUs wanted, the node has 3"
    ]
    assert choose_claim(Request(gpus=1, gpu_indices=(102,)), books).gpus == ("MIG-2",)
    whole = Request(gpus=1, gpu_indices=(0,))
    assert not fits(whole, books)
    assert shortages(whole, books) == ["GPU 0 is divided: its instances are GPUs 100,102"]
    with pytest.raises(ValueError, match="not free"):
        books.enter(TaskId(1), Claim(gpus=("GPU-a",)))


def test_a_gpu_divided_into_nothing_is_no_gpu_to_have() -> None:
    books = Books()
    books.refit(Inventory(cores=(0,), gpus=(Gpu(0, "GPU-a", divided=True),)))
    why = "1 GPU wanted, the node has none, only GPUs that are divided and have no instances"
    assert shortages(Request(gpus=1), books) == [why]
    named = Request(gpus=1, gpu_indices=(0,))
    assert shortages(named, books) == ["GPU 0 is divided: it has no instances yet"]


def test_gpus_whose_place_nobody_knows_are_given_by_index() -> None:
    books = Books()
    books.refit(Inventory(cores=(0, 1), gpus=(Gpu(1, "b"), Gpu(0, "a"), Gpu(2, "c"))))
    assert choose_claim(Request(cores=1, gpus=2), books) == Claim(cores=(0,), gpus=("a", "b"))


def test_cores_fill_the_numa_node_they_fit_best_and_span_only_if_they_must() -> None:
    books = some_books(Claim(cores=(4, 5)), cores=8, numa=2)
    assert choose_claim(Request(cores=2), books).cores == (6, 7)
    assert choose_claim(Request(cores=3), books).cores == (0, 1, 2)
    assert choose_claim(Request(cores=5), books).cores == (0, 1, 2, 3, 6)


@pytest.mark.parametrize(
    ("gpus", "why"),
    [
        (0, "GPU 8 wanted, the node has no GPU"),
        (1, "GPU 8 wanted, the node has only GPU 0"),
        (2, "GPU 8 wanted, the node has GPUs 0-1"),
    ],
)
def test_a_gpu_that_is_named_and_not_there_says_which_are(gpus: int, why: str) -> None:
    books = Books()
    books.refit(an_inventory(gpus=gpus))
    assert shortages(Request(gpus=1, gpu_indices=(8,)), books) == [why]
