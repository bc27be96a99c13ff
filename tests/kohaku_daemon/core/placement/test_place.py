"""Which node of several: filter, rank, what is kept free, and the verdict people read."""

from typing import Any

from kohaku_daemon.core.placement.place import (
    Site,
    can_take,
    candidates,
    choose_held,
    could_take,
    rank,
    reach_of,
    verdict,
)
from kohaku_daemon.core.placement.request import Request
from protocol.ids import NodeName, TaskId
from protocol.models.node import BackendInfo
from protocol.models.task import Claim, NodeVerdict
from tests.support.builders import an_inventory


def a_site(name: str, *claims: Claim, closed: str = "", **hardware: Any) -> Site:
    labels = hardware.pop("labels", {})
    site = Site(NodeName(name), labels=labels, closed=closed)
    site.books.refit(an_inventory(**hardware))
    for number, claim in enumerate(claims, 1):
        site.books.enter(TaskId(number), claim)
    return site


def chosen(request: Request, *sites: Site) -> str | None:
    able = [site for site in sites if can_take(request, site)]
    best = min(able, key=lambda site: rank(request, site), default=None)
    return best.name if best is not None else None


def test_small_tasks_spread_by_share_of_free_cores() -> None:
    half, idle = a_site("a", Claim(cores=(0, 1))), a_site("b", cores=2)
    assert chosen(Request(cores=1), half, idle) == "b"


def test_equal_nodes_are_taken_by_name() -> None:
    assert chosen(Request(cores=1), a_site("b"), a_site("a")) == "a"


def test_a_task_without_gpus_leaves_gpu_nodes_open() -> None:
    busy = a_site("cpu", Claim(cores=(0, 1, 2)))
    assert chosen(Request(cores=1), a_site("gpu", gpus=2), busy) == "cpu"
    assert chosen(Request(cores=2), a_site("gpu", gpus=2), busy) == "gpu"


def test_a_gpu_task_goes_where_it_leaves_fewest_gpus_idle() -> None:
    assert chosen(Request(gpus=2), a_site("eight", gpus=8), a_site("two", gpus=2)) == "two"


def test_a_gpu_task_goes_where_gpus_and_cores_share_a_numa_node() -> None:
    # On "apart" free GPUs are on NUMA node 0 and free cores on 1; it would leave fewer idle.
    apart = a_site("apart", Claim(cores=(0, 1, 2), gpus=("GPU-1",)), cores=8, gpus=2, numa=2)
    near = a_site("near", cores=8, gpus=4, numa=2)
    assert chosen(Request(cores=2, gpus=1), apart, near) == "near"
    assert chosen(Request(cores=1, gpus=1), apart, near) == "apart"
    assert chosen(Request(cores=2), apart, near) == "apart"
    # What was remembered of it is forgotten with what it depends on.
    apart.books.strike(TaskId(1))
    assert chosen(Request(cores=2, gpus=1), apart, near) == "apart"
    apart.books.refit(apart.books.inventory, {"GPU-0": "lost", "GPU-1": "lost"})
    assert chosen(Request(cores=2, gpus=1), apart, near) == "near"


def test_apart_is_better_than_nowhere() -> None:
    apart = a_site("apart", Claim(cores=(0, 1, 2), gpus=("GPU-1",)), cores=8, gpus=2, numa=2)
    assert chosen(Request(cores=2, gpus=1), apart) == "apart"


def test_closed_full_and_unsuitable_nodes_are_passed_over() -> None:
    full = a_site("a", Claim(cores=(0, 1, 2, 3)))
    closed = a_site("b", closed="the node is draining")
    other = a_site("c", labels={"zone": "x"})
    sick = a_site("d", labels={"zone": "y"}, backends=(BackendInfo("process", False, "broken"),))
    good = a_site("y", labels={"zone": "y"})
    request = Request(cores=1, labels=(("zone", "y"),))
    assert chosen(request, full, closed, other, sick, good) == "y"
    assert chosen(request, full, closed, other, sick) is None


def test_a_named_node_is_the_only_one_asked() -> None:
    sites = {site.name: site for site in (a_site("a"), a_site("b"))}
    assert [site.name for site in candidates(Request(node="b"), sites)] == ["b"]
    assert list(candidates(Request(node="gone"), sites)) == []
    assert [site.name for site in candidates(Request(), sites)] == ["a", "b"]


def kept(request: Request, *sites: Site, before: str = "", held: tuple[str, ...] = ()) -> str:
    site = choose_held(
        request, sites, [NodeName(name) for name in held], NodeName(before) if before else None
    )
    return site.name if site is not None else ""


def test_the_node_kept_free_lacks_least_and_stays_the_same() -> None:
    near, far = a_site("near", Claim(cores=(0,))), a_site("far", Claim(cores=(0, 1)))
    assert kept(Request(cores=4), near, far) == "near"
    assert kept(Request(cores=4), near, far, before="far") == "far"
    assert kept(Request(cores=4), near, far, held=("near",)) == "far"
    far.closed = "the node is draining"
    assert kept(Request(cores=4), near, far, before="far") == "near"


def test_no_node_is_kept_free_for_what_could_never_be_there() -> None:
    assert kept(Request(cores=5), a_site("a")) == ""
    assert kept(Request(cores=4, labels=(("x", "y"),)), a_site("a")) == ""
    broken = a_site("b", gpus=2)
    broken.books.refit(broken.books.inventory, {"GPU-1": "fell off the bus"})
    assert kept(Request(gpus=2), broken) == ""
    assert kept(Request(gpus=1), broken) == "b"


def said(request: Request, site: Site, held_for: str = "") -> tuple[bool, bool, tuple[str, ...]]:
    one = verdict(request, site, held_for)
    assert isinstance(one, NodeVerdict)
    assert one.node == site.name
    return one.fits_now, one.could_ever, one.reasons


def test_verdicts() -> None:
    busy = a_site("a", Claim(cores=(0, 1, 2)), gpus=1)
    assert said(Request(cores=1), busy) == (True, True, ())
    assert said(Request(cores=2), busy) == (False, True, ("2 cores wanted, 1 of 4 free",))
    assert said(Request(cores=5), busy) == (False, False, ("5 cores wanted, the node has 4",))
    assert said(Request(node="b"), busy) == (False, False, ("the task wants node b",))
    assert said(Request(labels=(("x", "y"),)), busy) == (
        False, False, ("label x=y wanted, this node has none",),
    )  # fmt: skip


def test_a_verdict_tells_who_the_node_is_kept_for_only_if_nothing_else_is_wrong() -> None:
    site, why = a_site("a", Claim(cores=(0,))), "kept free for task 7"
    assert said(Request(cores=1), site, why) == (False, True, (why,))
    assert said(Request(cores=4), site, why) == (False, True, ("4 cores wanted, 3 of 4 free",))


def test_what_is_out_of_service_may_come_back() -> None:
    site = a_site("a", gpus=1, closed="the node is draining")
    site.books.refit(site.books.inventory, {"GPU-0": "fell off the bus"})
    assert said(Request(gpus=1), site) == (
        False,
        True,
        (
            "the node is draining",
            "1 GPU wanted, 0 of 1 free: GPU 0 is out of service: fell off the bus",
        ),
    )


def test_what_is_beyond_the_reach_of_all_nodes_no_node_could_take() -> None:
    sick = BackendInfo("docker", False, "no daemon")
    sites = [
        a_site("a", cores=8, labels={"zone": "x"}),
        a_site("b", gpus=2, backends=(BackendInfo("process"), sick)),
        a_site("c", cores=64, gpus=8, closed="the node is draining", labels={"zone": "y"}),
    ]
    reach = reach_of(sites)
    requests = [
        Request(cores=cores, memory=memory, gpus=gpus, labels=labels, backend=backend)
        for cores in (0, 8, 9)
        for memory in (0, 2**33, 2**34)
        for gpus in (0, 2, 3)
        for labels in ((), (("zone", "x"),), (("zone", "y"),))
        for backend in ("", "process", "docker", "qemu")
    ]
    beyond = [request for request in requests if not reach.covers(request)]
    assert not any(could_take(request, site) for request in beyond for site in sites)
    assert any(could_take(request, site) for request in requests for site in sites)
    assert Request(cores=9) in beyond
    assert Request(labels=(("zone", "y"),)) in beyond
