"""All members of a gang find a seat at once, or none does."""

from kohaku_daemon.core.placement.gang import Member, plan_gang, seat_gang
from kohaku_daemon.core.placement.place import Site
from kohaku_daemon.core.placement.request import Request
from protocol.ids import NodeName, TaskId
from protocol.models.task import Claim
from tests.support.builders import an_inventory


def sites_of(*cores: int, taken: dict[str, int] | None = None) -> dict[NodeName, Site]:
    sites = {}
    for number, count in enumerate(cores, 1):
        site = Site(NodeName(f"n{number}"))
        site.books.refit(an_inventory(count))
        sites[site.name] = site
    for number, (name, held) in enumerate((taken or {}).items(), 900):
        sites[NodeName(name)].books.enter(TaskId(number), Claim(cores=tuple(range(held))))
    return sites


def members(*cores: int) -> list[Member]:
    return [(TaskId(number), Request(cores=count)) for number, count in enumerate(cores, 1)]


def where(seats: object) -> dict[int, str] | None:
    if not isinstance(seats, list):
        return None
    return {int(seat.task): str(seat.node) for seat in seats}


def test_it_fills_the_emptiest_node_first() -> None:
    assert where(seat_gang(members(2, 2), sites_of(4, 8))) == {1: "n2", 2: "n2"}
    assert where(seat_gang(members(4, 4), sites_of(4, 4))) == {1: "n1", 2: "n2"}


def test_one_without_a_seat_leaves_all_standing_and_the_books_as_they_were() -> None:
    sites = sites_of(4, 4, taken={"n2": 2})
    assert seat_gang(members(4, 4), sites) is None
    assert [len(site.books.free_cores) for site in sites.values()] == [4, 2]


def test_claims_of_one_gang_do_not_overlap() -> None:
    seats = seat_gang(members(2, 2), sites_of(4))
    assert seats is not None
    assert sorted(core for seat in seats for core in seat.claim.cores) == [0, 1, 2, 3]


def test_nodes_kept_for_others_are_not_used() -> None:
    assert seat_gang(members(4, 4), sites_of(4, 4), held=[NodeName("n2")]) is None


def test_the_plan_is_tried_where_filling_the_rest_as_well_goes_wrong() -> None:
    # The three-core member would take the wide node, and leave the wider member standing.
    sites = sites_of(3, 5)
    mixed = [
        (TaskId(1), Request(cores=3, memory=1)),
        (TaskId(2), Request(cores=5)),
    ]
    assert where(seat_gang(mixed, sites)) == {2: "n2", 1: "n1"}
    assert plan_gang(mixed, sites) == ["n2", "n1"]


def test_the_plan_looks_at_idle_nodes_and_says_if_even_those_are_too_few() -> None:
    sites = sites_of(4, 4, taken={"n1": 4, "n2": 1})
    assert plan_gang(members(4, 4), sites) == ["n1", "n2"]
    assert plan_gang(members(4, 4, 1), sites) is None
    assert [len(site.books.free_cores) for site in sites.values()] == [0, 3]


def test_members_that_name_a_node_go_there() -> None:
    named = [(TaskId(1), Request(cores=4)), (TaskId(2), Request(cores=4, node="n1"))]
    assert where(seat_gang(named, sites_of(4, 4))) == {2: "n1", 1: "n2"}
