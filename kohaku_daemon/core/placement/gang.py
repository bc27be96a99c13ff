"""Find room for a gang: several requests that are placed together or not at all.

Knows: filling the emptiest nodes first, so that a gang is spread over few.
Does not know: queues; whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from kohaku_daemon.core.placement.books import Books
from kohaku_daemon.core.placement.choose import choose_claim, fits
from kohaku_daemon.core.placement.place import Site, can_take, candidates, could_ever, could_take
from kohaku_daemon.core.placement.request import Request
from protocol.ids import NodeName, TaskId
from protocol.models.task import Claim

#: A member of a gang with what it asks for.
Member = tuple[TaskId, Request]


class Seat(msgspec.Struct, frozen=True, gc=False):
    """Where one member of a gang goes."""

    task: TaskId
    node: NodeName
    claim: Claim


def seat_gang(
    members: Sequence[Member],
    sites: dict[NodeName, Site],
    held: Collection[NodeName] = (),
    kept: Sequence[NodeName] = (),
) -> list[Seat] | None:
    """Find a seat for every member at once; None if one finds none. No books are changed.

    ``kept`` are the nodes that were kept free for this gang. They are tried alone as well:
    filling is greedy, and with members of several shapes it may miss what the plan found.
    """
    found = _fill(members, sites, held, can_take, lambda site: site.books)
    if found is None and kept:
        own = {name: sites[name] for name in kept if name in sites}
        found = _fill(members, own, held, can_take, lambda site: site.books)
    return found


def plan_gang(
    members: Sequence[Member], sites: dict[NodeName, Site], held: Collection[NodeName] = ()
) -> list[NodeName] | None:
    """Choose the nodes to keep free for a gang; None if it cannot fit even on idle ones."""
    seats = _fill(members, sites, held, could_take, lambda site: site.books.idle())
    return None if seats is None else list(dict.fromkeys(seat.node for seat in seats))


def fits_ever(members: Sequence[Member], sites: dict[NodeName, Site]) -> bool:
    """Say whether a gang would fit if all nodes were idle, whole and in service."""
    return _fill(members, sites, (), could_ever, lambda site: site.books.emptied()) is not None


def _fill(
    members: Sequence[Member],
    sites: dict[NodeName, Site],
    held: Collection[NodeName],
    takes: Callable[[Request, Site], bool],
    books_of: Callable[[Site], Books],
) -> list[Seat] | None:
    entered: list[tuple[Books, TaskId]] = []
    seats: list[Seat] = []
    try:
        for request, tasks in _by_request(members).items():
            waiting = tasks[::-1]
            used = {seat.node for seat in seats}
            for site in _emptiest_first(request, sites, held, takes, books_of, used):
                books = books_of(site)
                while waiting and fits(request, books):
                    seat = Seat(waiting.pop(), site.name, choose_claim(request, books))
                    books.enter(seat.task, seat.claim)
                    entered.append((books, seat.task))
                    seats.append(seat)
                if not waiting:
                    break
            if waiting:
                return None
        return seats
    finally:
        for books, task in entered:
            books.strike(task)


def _by_request(members: Sequence[Member]) -> dict[Request, list[TaskId]]:
    """Gather members by shape: those that find the fewest seats choose first."""
    shapes: dict[Request, list[TaskId]] = {}
    for task, request in members:
        shapes.setdefault(request, []).append(task)
    order = sorted(
        shapes,
        key=lambda r: (
            not r.gpu_indices, r.numa is None, not r.node, -r.gpus, -r.cores, -r.memory,
        ),
    )  # fmt: skip
    return {request: shapes[request] for request in order}


def _emptiest_first(
    request: Request,
    sites: dict[NodeName, Site],
    held: Collection[NodeName],
    takes: Callable[[Request, Site], bool],
    books_of: Callable[[Site], Books],
    used: Collection[NodeName],
) -> list[Site]:
    """Give the sites that take a request: those in use by this gang first, then the emptiest."""
    able = [
        site
        for site in candidates(request, sites)
        if site.name not in held and takes(request, site)
    ]

    def emptiness(site: Site) -> tuple[bool, int, int, int, str]:
        books = books_of(site)
        in_use = site.name in used
        return (
            not in_use,
            -len(books.free_gpus),
            -len(books.free_cores),
            -books.free_memory,
            site.name,
        )

    return sorted(able, key=emptiness)
