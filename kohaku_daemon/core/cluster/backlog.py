"""The waiting tasks and who is next.

Order: higher priority first, then earlier submission. A task that fits nowhere now keeps
one node free of later tasks (``place.choose_held``), so it is not starved by smaller ones;
tasks that can use other nodes go past it.

Knows: lanes of equal requests, so that a thousand equal tasks cost one question, and which
questions need not be asked again.
Does not know: states, records; its owner says what waits and carries out what is placed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from kohaku_daemon.core.placement.place import Site, candidates, choose_held, place
from kohaku_daemon.core.placement.request import Request
from protocol.ids import NodeName, TaskId
from protocol.models.task import Claim

#: Place in the line: smaller goes first.
Place = tuple[int, TaskId]


@dataclass(slots=True)
class _Lane:
    """Waiting tasks of one shape, as a heap; the gone ones are skipped when they surface."""

    line: list[Place] = field(default_factory=list)
    #: The node kept free for the first in line.
    keep: NodeName | None = None
    #: The backlog's age when the shape last fitted nowhere, and the nodes that were kept for
    #: earlier tasks then. It still fits nowhere while nodes only get fuller and more are kept.
    blocked_at: int = -1
    beside: frozenset[NodeName] = frozenset()


@dataclass(frozen=True, slots=True)
class Placement:
    """A waiting task and what it gets."""

    task: TaskId
    node: NodeName
    claim: Claim


class Backlog:
    """The queue."""

    def __init__(self) -> None:
        self._lanes: dict[Request, _Lane] = {}
        self._waiting: dict[TaskId, tuple[Request, Place]] = {}
        #: Grows when something becomes free: what was blocked before is asked again.
        self._age = 0
        #: Nodes kept free by the last pass, and for whom.
        self._held: dict[NodeName, TaskId] = {}
        self._changed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, task: TaskId) -> bool:
        return task in self._waiting

    def add(self, task: TaskId, request: Request, priority: int) -> None:
        """Let a task wait."""
        spot = (-priority, task)
        self._waiting[task] = (request, spot)
        heapq.heappush(self._lanes.setdefault(request, _Lane()).line, spot)
        self._changed = True

    def discard(self, task: TaskId) -> None:
        """Let a task wait no longer. Its place in the lane is dropped when it surfaces."""
        if self._waiting.pop(task, None) is not None:
            # The node kept for it, and what lay behind that, may be another's now.
            self._changed = True

    def loosen(self) -> None:
        """Note that something became free or came back: every shape is worth asking again."""
        self._age += 1
        self._changed = True

    def ahead_of(self, task: TaskId) -> int:
        """Count the tasks considered before this one."""
        own = self._waiting[task][1]
        return sum(spot < own for _, spot in self._waiting.values())

    def place_waiting(self, sites: dict[NodeName, Site]) -> Iterator[Placement]:
        """Give placements until nothing more fits. The caller enters each claim before the next."""
        if not self._changed:
            return
        self._changed = False
        held = self._held = {}
        in_service = {site.name for site in sites.values() if not site.closed}
        heads = [(spot, request) for request in list(self._lanes) if (spot := self._head(request))]
        order = [(spot, index) for index, (spot, _) in enumerate(heads)]
        heapq.heapify(order)
        while order and not held.keys() >= in_service:
            _, index = order[0]
            request = heads[index][1]
            placed = self._place(request, sites, held)
            after = self._head(request) if placed is not None else None
            if after is None:
                heapq.heappop(order)
            else:
                heapq.heapreplace(order, (after, index))
            if placed is not None:
                yield placed

    def held_for(self, node: NodeName) -> TaskId | None:
        """Give the waiting task that a node is kept free for, if there is one."""
        task = self._held.get(node)
        return task if task in self._waiting else None

    def _place(
        self, request: Request, sites: dict[NodeName, Site], held: dict[NodeName, TaskId]
    ) -> Placement | None:
        lane = self._lanes[request]
        task = lane.line[0][1]
        if not self._is_still_blocked(lane, held):
            found = place(request, candidates(request, sites), held)
            if found is not None:
                site, claim = found
                heapq.heappop(lane.line)
                del self._waiting[task]
                lane.keep, lane.blocked_at = None, -1
                return Placement(task, site.name, claim)
            kept = choose_held(request, candidates(request, sites), held, lane.keep)
            lane.keep = kept.name if kept is not None else None
            lane.blocked_at, lane.beside = self._age, frozenset(held)
        if lane.keep is not None:
            held[lane.keep] = task
        return None

    def _is_still_blocked(self, lane: _Lane, held: dict[NodeName, TaskId]) -> bool:
        return lane.blocked_at == self._age and lane.beside <= held.keys() and lane.keep not in held

    def _head(self, request: Request) -> Place | None:
        lane = self._lanes.get(request)
        if lane is None:
            return None
        while lane.line and (
            lane.line[0][1] not in self._waiting or self._waiting[lane.line[0][1]][0] != request
        ):
            heapq.heappop(lane.line)
        if not lane.line:
            del self._lanes[request]
            return None
        return lane.line[0]
