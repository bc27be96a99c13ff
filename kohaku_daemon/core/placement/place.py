"""Judge nodes for one request: filter, rank, why not; and which node to hold when none fits.

Pure functions over sites. Ranking (a choice of ours, not a law): a task with GPUs goes where
one NUMA node has both them and its cores free; any task where it leaves the fewest GPUs idle
behind busy cores, then to the node with the largest share of its cores free, so that small
tasks spread and GPU nodes stay open for GPU tasks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from kohaku_daemon.core.placement.books import Books
from kohaku_daemon.core.placement.choose import (
    ailment,
    fits,
    missing,
    shortages,
    suits,
    unsuitable,
)
from kohaku_daemon.core.placement.request import Request
from kohaku_daemon.core.placement.words import NameTask, name_by_id
from protocol.ids import NodeName
from protocol.models.task import NodeVerdict


@dataclass(slots=True)
class Site:
    """One node as placement sees it."""

    name: NodeName
    books: Books = field(default_factory=Books)
    labels: dict[str, str] = field(default_factory=dict)
    #: Why it gets nothing new, such as "the node is draining"; empty if it is in service.
    closed: str = ""


def can_take(request: Request, site: Site) -> bool:
    """Say whether a site could start the request this instant."""
    return not site.closed and fits(request, site.books) and suits(request, site.books, site.labels)


def could_take(request: Request, site: Site) -> bool:
    """Say whether a site could start the request if nothing ran there. GPUs out of service do
    not count: they may never come back.
    """
    return (
        not site.closed
        and suits(request, site.books, site.labels)
        and fits(request, site.books.idle())
    )


@dataclass(frozen=True, slots=True)
class Reach:
    """The most there is of each thing on any one node in service."""

    cores: int = 0
    memory: int = 0
    gpus: int = 0
    labels: frozenset[tuple[str, str]] = frozenset()
    backends: frozenset[str] = frozenset()

    def covers(self, request: Request) -> bool:
        """Say whether some node may hold a request when idle; if not, none does."""
        return (
            request.cores <= self.cores
            and request.memory <= self.memory
            and request.gpus <= self.gpus
            and self.labels.issuperset(request.labels)
            and request.backend in self.backends
        )


def reach_of(sites: Iterable[Site]) -> Reach:
    """Give the reach of the sites that are in service."""
    there = [site for site in sites if not site.closed]
    return Reach(
        cores=max((len(site.books.inventory.cores) for site in there), default=0),
        memory=max((site.books.inventory.memory for site in there), default=0),
        gpus=max((len(site.books.inventory.claimable_gpus) for site in there), default=0),
        labels=frozenset(pair for site in there for pair in site.labels.items()),
        backends=frozenset(("", *(name for site in there for name in site.books.backends))),
    )


def could_ever(request: Request, site: Site) -> bool:
    """Say whether a site could take the request if it were idle, whole and in service."""
    return fits(request, site.books.emptied()) and not unsuitable(request, site.books, site.labels)


def choose_held(
    request: Request,
    sites: Iterable[Site],
    held: Collection[NodeName],
    before: NodeName | None = None,
) -> Site | None:
    """Choose the node to keep free of later tasks until this request fits there.

    It is the one that lacks least, and stays the one it was (``before``) while it can: as
    nothing new enters a held node, what it lacks only shrinks, so the first in line is
    served after at most the tasks that run there now. GPUs out of service do not count,
    or a node would be kept free for what may never come back.
    """
    best: Site | None = None
    least = (math.inf, NodeName(""))
    for site in sites:
        if site.closed or site.name in held:
            continue
        lacks = (-1.0 if site.name == before else missing(request, site.books), site.name)
        # Whether it could is asked of few: most lack more than the best so far.
        if lacks < least and could_take(request, site):
            best, least = site, lacks
    return best


def candidates(request: Request, sites: dict[NodeName, Site]) -> Iterable[Site]:
    """Give the sites worth asking: the one that is named, or all."""
    if request.node:
        site = sites.get(NodeName(request.node))
        return () if site is None else (site,)
    return sites.values()


def verdict(
    request: Request, site: Site, held_for: str = "", name_task: NameTask = name_by_id
) -> NodeVerdict:
    """Say why a site does not take a request now, and whether it ever could."""
    if request.node and request.node != site.name:
        reason = f"the task wants node {request.node}"
        return NodeVerdict(site.name, fits_now=False, could_ever=False, reasons=(reason,))
    never = unsuitable(request, site.books, site.labels)
    never += shortages(request, site.books.emptied(), of_all=True)
    passing = [site.closed, ailment(request, site.books)]
    if not never:
        passing += shortages(request, site.books, name_task=name_task)
    reasons = [*never, *filter(None, passing)]
    if not reasons and held_for:
        reasons = [held_for]
    return NodeVerdict(
        site.name, fits_now=not reasons, could_ever=not never, reasons=tuple(reasons)
    )


def rank(request: Request, site: Site) -> tuple[bool, int, float, str]:
    """Give how well a site suits a request that it can take: the smallest suits best."""
    books = site.books
    is_apart = request.gpus > 0 and not books.has_together(request.gpus, request.cores)
    cores = len(books.inventory.cores) or 1
    spare_gpus = len(books.free_gpus) - request.gpus
    return is_apart, spare_gpus, -len(books.free_cores) / cores, site.name
