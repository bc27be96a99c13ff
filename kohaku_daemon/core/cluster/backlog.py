"""The waiting tasks and who is next.

Order: higher priority first, then earlier submission. A task that fits nowhere now keeps
one node free of later tasks (``place.choose_held``), so it is not starved by smaller ones;
tasks that can use other nodes go past it.

Knows: lanes of equal requests, so that a thousand equal tasks cost one question.
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
        #: Shapes that fitted nowhere when last asked, with the node held for them. Stays true
        #: while nodes only get fuller.
        self._blocked: dict[Request, NodeName | None] = {}
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
        gone = self._waiting.pop(task, None)
        if gone is not None and gone[0] in self._blocked:
            # The node held for it, and what lay behind that, may be another's now.
            self.loosen()

    def loosen(self) -> None:
        """Note that something became free or came back: every shape is worth asking again."""
        self._blocked.clear()
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
        held: set[NodeName] = set()
        in_service = {site.name for site in sites.values() if not site.closed}
        heads = [(spot, request) for request in list(self._lanes) if (spot := self._head(request))]
        order = [(spot, index) for index, (spot, _) in enumerate(heads)]
        heapq.heapify(order)
        while order and not held >= in_service:
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
        for request, held in self._blocked.items():
            head = self._head(request)
            if held == node and head is not None:
                return head[1]
        return None

    def _place(
        self, request: Request, sites: dict[NodeName, Site], held: set[NodeName]
    ) -> Placement | None:
        spot = self._head(request)
        assert spot is not None, "a lane in the pass has a head"
        if request not in self._blocked:
            found = place(request, candidates(request, sites), held)
            if found is not None:
                site, claim = found
                heapq.heappop(self._lanes[request].line)
                del self._waiting[spot[1]]
                return Placement(spot[1], site.name, claim)
            keep = choose_held(request, candidates(request, sites), held)
            self._blocked[request] = keep.name if keep is not None else None
        keep_name = self._blocked[request]
        if keep_name is not None:
            held.add(keep_name)
        return None

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
