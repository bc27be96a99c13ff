"""The waiting tasks and who is next.

Order: higher priority first; among equals the owner whose turn it is (``fair_order``); of one
owner the earlier submission. What fits nowhere now keeps nodes free of later tasks, so it is
not starved by smaller ones; later tasks use the others, or go past where they are not in the
way (``placement.backfill``). A gang is one entry: all of it is placed, or nothing.

Knows: lanes of equal requests, so that a thousand equal tasks cost one question, and which
nodes need not be asked again.
Does not know: states, records; its owner says what waits and carries out what is placed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kohaku_daemon.core.cluster.fair_order import FairOrder, cost_of
from kohaku_daemon.core.placement.backfill import EndsAt, Hold
from kohaku_daemon.core.placement.choose import choose_claim
from kohaku_daemon.core.placement.gang import Member, Seat, plan_gang, seat_gang
from kohaku_daemon.core.placement.place import (
    Reach,
    Site,
    can_take,
    candidates,
    choose_held,
    could_take,
    rank,
    reach_of,
)
from kohaku_daemon.core.placement.request import Request
from protocol.ids import BatchId, NodeName, TaskId, UserName

#: Lanes that are asked once every node in service is kept free for somebody: only what may
#: go past a hold can still be placed, and with many shapes asking all would take too long.
_DEEPEST_BACKFILL: Final = 256
#: Seconds after which one more node is kept free for a task that still fits nowhere.
_WIDEN_S: Final = 1800.0

#: Placements of one pass, some 10 ms of work: whoever waits for something else has a turn
#: before the next. Only a gang may be more.
_MOST_PLACED: Final = 500

#: Tasks that are gone and not worth looking for in a line.
_FEW_GONE: Final = 1000
#: Shapes that are remembered to be hopeless or not: more than wait in any queue we know of.
_MOST_HOPES: Final = 10_000

#: What distinguishes one lane from another. A gang has a lane of its own.
_LaneKey = tuple[Request, UserName, int] | BatchId
#: Place among the lanes: smaller goes first.
_Rank = tuple[int, float, TaskId]


@dataclass(slots=True, eq=False)
class _Lane:
    """Waiting tasks of one shape, owner and priority; or one gang."""

    key: _LaneKey
    owner: UserName
    priority: int
    cost: float
    request: Request | None
    #: How many wait.
    length: int = 0
    #: Heap of the ids that wait; the gone ones are skipped when they surface.
    line: list[TaskId] = field(default_factory=list)
    #: Of a gang only.
    members: dict[TaskId, Request] = field(default_factory=dict)
    #: The nodes kept free for the first in line, and since when any was (UTC seconds).
    keeps: list[NodeName] = field(default_factory=list)
    kept_since: float = 0.0
    #: The backlog's age when the lane last found no room. Since then only nodes where something
    #: became free are worth asking; -1 before it was ever asked.
    asked_at: int = -1
    #: The backlog's age when nodes to keep were last chosen.
    chosen_at: int = -1
    #: Nodes that had room and were kept free for somebody else.
    refused: list[NodeName] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass goes by."""

    sites: dict[NodeName, Site]
    now: float
    ends_at: EndsAt
    held: dict[NodeName, Hold]
    in_service: frozenset[NodeName]
    #: Nodes by suitability for a lane, best first, as far as they have been looked at.
    ranked: dict[_LaneKey, list[tuple[tuple[bool, int, float, str], Site]]] = field(
        default_factory=dict
    )

    #: Nodes that had room for a shape when it was first asked about: they only get fuller.
    able: dict[Request, list[Site]] = field(default_factory=dict)

    def able_for(self, gang: _Lane) -> dict[NodeName, Site]:
        """Give the nodes that have room for a member of a gang."""
        found: dict[NodeName, Site] = {}
        for request in dict.fromkeys(gang.members.values()):
            able = self.able.get(request)
            if able is None:
                asked = candidates(request, self.sites)
                able = self.able[request] = [site for site in asked if can_take(request, site)]
            found.update((site.name, site) for site in able)
        return found

    @property
    def all_held(self) -> bool:
        """Whether every node in service is kept free for somebody."""
        return self.in_service <= self.held.keys()


class Backlog:
    """The queue."""

    def __init__(self) -> None:
        self._lanes: dict[_LaneKey, _Lane] = {}
        self._waiting: dict[TaskId, _Lane] = {}
        self._waits_of: dict[UserName, int] = {}
        self._turns = FairOrder()
        #: Grows with everything that becomes free, is placed or is no longer kept.
        self._age = 0
        #: Every lane asked before this age has to ask all nodes again.
        self._renewed_at = 0
        #: When something last became free on a node, the latest last.
        self._freed: OrderedDict[NodeName, int] = OrderedDict()
        #: Nodes kept free by the last pass, and for whom.
        self._held: dict[NodeName, Hold] = {}
        self._changed = False
        #: Which shapes some node in service could hold, as far as that was asked, and the most
        #: there is; both until nodes change.
        self._hopes: dict[Request, bool] = {}
        self._reach: Reach | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, task: TaskId) -> bool:
        return task in self._waiting

    def add(self, task: TaskId, request: Request, owner: UserName, priority: int) -> None:
        """Let a task wait."""
        key = (request, owner, priority)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key, owner, priority, cost_of(request), request)
        self._enter(task, lane)
        heapq.heappush(lane.line, task)

    def add_gang(
        self, gang: BatchId, members: Sequence[Member], owner: UserName, priority: int
    ) -> None:
        """Let tasks wait that are placed together or not at all."""
        cost = sum(cost_of(request) for _, request in members)
        lane = _Lane(gang, owner, priority, cost, None, members=dict(members))
        self._lanes[gang] = lane
        for task, _ in members:
            self._enter(task, lane)

    def discard(self, task: TaskId) -> None:
        """Let a task wait no longer. Its place in the lane is dropped when it surfaces."""
        lane = self._waiting.get(task)
        if lane is not None:
            if lane.request is None or self._head(lane) == task:
                # The nodes kept for it, and what lay behind that, may be another's now.
                self._release(lane)
            self._leave(task, lane)
            self._changed = True

    def loosen(self, node: NodeName) -> None:
        """Note that something became free on a node."""
        self._age += 1
        self._freed[node] = self._age
        self._freed.move_to_end(node)
        self._changed = True

    def renew(self) -> None:
        """Note that nodes came, went or changed: every lane is worth asking everywhere again."""
        self._age += 1
        self._renewed_at = self._age
        self._freed.clear()
        self._hopes.clear()
        self._reach = None
        self._changed = True

    def ahead_of(self, task: TaskId) -> int:
        """Count the tasks that will be considered before this one, as turns stand now."""
        own = self._waiting[task]
        lanes = self._lanes.values()
        before = sum(lane.length for lane in lanes if lane.priority > own.priority)
        level: dict[UserName, list[_Lane]] = {}
        for lane in lanes:
            if lane.priority == own.priority:
                level.setdefault(lane.owner, []).append(lane)
        turn = self._turns.of(own.owner)
        for lane in level.pop(own.owner):
            count = bisect_left(self._line_of(lane), task)
            before += count
            turn += count * self._cost_each(lane)
        return before + sum(
            self._count_turns(owner, others, (turn, task)) for owner, others in level.items()
        )

    def held_for(self, node: NodeName) -> TaskId | None:
        """Give the waiting task that a node is kept free for, if there is one."""
        hold = self._held.get(node)
        return hold.task if hold is not None and hold.task in self._waiting else None

    @property
    def is_settled(self) -> bool:
        """Say whether nothing has changed since the last pass, and that came to its end."""
        return not self._changed

    def shapes(self) -> Iterator[tuple[Request | None, int]]:
        """Give each shape that waits with how many of it do; None stands for a gang."""
        for lane in self._lanes.values():
            if lane.length:
                yield lane.request, lane.length

    def has_hope(self, request: Request, sites: dict[NodeName, Site]) -> bool:
        """Say whether a node in service could hold a shape when idle."""
        hope = self._hopes.get(request)
        if hope is None:
            if self._reach is None:
                self._reach = reach_of(sites.values())
            hope = self._reach.covers(request) and any(
                could_take(request, site) for site in candidates(request, sites)
            )
            if len(self._hopes) >= _MOST_HOPES:
                self._hopes.clear()
            self._hopes[request] = hope
        return hope

    def place_waiting(
        self, sites: dict[NodeName, Site], now: float, ends_at: EndsAt
    ) -> Iterator[Seat]:
        """Give placements until nothing more fits, or so many that the next pass goes on.

        The caller takes them all, and enters each claim before the next.
        """
        if not self._changed:
            return
        self._changed = False
        self._held = {}
        in_service = frozenset(site.name for site in sites.values() if not site.closed)
        current = _Pass(sites, now, ends_at, self._held, in_service)
        order = [
            (place, number, lane)
            for number, lane in enumerate(list(self._lanes.values()))
            if (place := self._rank(lane)) is not None
        ]
        heapq.heapify(order)
        deep = 0
        placed = 0
        #: Ranked after the last turn that anybody had: its rank here is its present one.
        newest: _Lane | None = None
        while order and deep < _DEEPEST_BACKFILL:
            if placed >= _MOST_PLACED:
                self._changed = True
                break
            place, number, lane = order[0]
            present = place if lane is newest else self._rank(lane)
            if present is not None and present > place:
                # Its owner has had turns since it was put here.
                heapq.heapreplace(order, (present, number, lane))
                continue
            seats = self._seat(lane, present[2], current) if present is not None else []
            for seat in seats:
                self._leave(seat.task, lane)
                yield seat
            if seats:
                placed += len(seats)
                self._turns.take(lane.owner, lane.cost)
                # With its turn gone, nodes may be kept for others than were asked first before.
                self._age += 1
                after = self._rank(lane)
                newest = None if after is None else lane
                if after is not None:
                    heapq.heapreplace(order, (after, number, lane))
                    continue
            heapq.heappop(order)
            deep += current.all_held
        # Those who kept nodes and had turns since come later in the next pass.
        self._age += placed > 0

    def _enter(self, task: TaskId, lane: _Lane) -> None:
        self._waiting[task] = lane
        lane.length += 1
        self._turns.join(lane.owner)
        self._waits_of[lane.owner] = self._waits_of.get(lane.owner, 0) + 1
        self._changed = True

    def _leave(self, task: TaskId, lane: _Lane) -> None:
        del self._waiting[task]
        lane.length -= 1
        lane.members.pop(task, None)
        if len(lane.line) > 2 * lane.length + _FEW_GONE:
            # Else many that were ended from behind would surface all at once.
            lane.line = [one for one in lane.line if self._waiting.get(one) is lane]
            heapq.heapify(lane.line)
        self._waits_of[lane.owner] -= 1
        if not self._waits_of[lane.owner]:
            del self._waits_of[lane.owner]
            self._turns.leave(lane.owner)

    def _release(self, lane: _Lane) -> None:
        """Let go of the nodes kept for a lane's head, which it needs no longer."""
        if lane.keeps:
            lane.keeps = []
            self._age += 1
        lane.asked_at = lane.chosen_at = -1

    def _rank(self, lane: _Lane) -> _Rank | None:
        head = self._head(lane)
        return None if head is None else (-lane.priority, self._turns.of(lane.owner), head)

    def _head(self, lane: _Lane) -> TaskId | None:
        """Give who is first in a lane; drop the lane if nobody is."""
        if lane.request is None:
            if lane.members:
                return min(lane.members)
        else:
            line = lane.line
            while line and self._waiting.get(line[0]) is not lane:
                heapq.heappop(line)
            if line:
                return line[0]
        if self._lanes.get(lane.key) is lane:
            del self._lanes[lane.key]
        return None

    def _count_turns(self, owner: UserName, lanes: list[_Lane], until: tuple[float, TaskId]) -> int:
        """Count the turns that an owner will have until somebody else's."""
        turn = self._turns.of(owner)
        if len(lanes) == 1:
            line, each = self._line_of(lanes[0]), self._cost_each(lanes[0])
            places = range(len(line))
            return bisect_left(places, until, key=lambda place: (turn + place * each, line[place]))
        lines = [[(task, self._cost_each(lane)) for task in self._line_of(lane)] for lane in lanes]
        count = 0
        for task, cost in heapq.merge(*lines):
            if (turn, task) >= until:
                break
            count += 1
            turn += cost
        return count

    def _line_of(self, lane: _Lane) -> list[TaskId]:
        """Give those who wait in a lane, in order."""
        if lane.request is None:
            return sorted(lane.members)
        line = sorted(lane.line)
        if len(line) == lane.length:
            return line
        # Some are gone, or came back and are there twice.
        return [task for task in dict.fromkeys(line) if self._waiting.get(task) is lane]

    def _cost_each(self, lane: _Lane) -> float:
        return lane.cost if lane.request is not None else lane.cost / len(lane.members)

    def _seat(self, lane: _Lane, head: TaskId, current: _Pass) -> list[Seat]:
        """Find room for the first of a lane, or keep nodes free for it."""
        seats = self._find_seats(lane, head, current)
        if seats:
            self._release(lane)
            return seats
        lane.asked_at = self._age
        self._keep(lane, current)
        return []

    def _find_seats(self, lane: _Lane, head: TaskId, current: _Pass) -> list[Seat]:
        if lane.request is None:
            if lane.asked_at == self._age:
                return []
            members = list(lane.members.items())
            return seat_gang(members, current.able_for(lane), current.held, lane.keeps) or []
        ranked = current.ranked.get(lane.key)
        if ranked is None:
            asked = self._to_ask(lane, current)
            lane.refused = []
            able = (site for site in asked if can_take(lane.request, site))
            ranked = [(rank(lane.request, site), site) for site in able]
            ranked.sort(key=lambda pair: pair[0])
            current.ranked[lane.key] = ranked
        return self._take_best(lane, head, lane.request, ranked, current)

    def _take_best(
        self,
        lane: _Lane,
        head: TaskId,
        request: Request,
        ranked: list[tuple[tuple[bool, int, float, str], Site]],
        current: _Pass,
    ) -> list[Seat]:
        """Give a seat on the best node. A sorted list is a heap too; ranks are mended as found."""
        while ranked:
            was, site = ranked[0]
            if not can_take(request, site):
                heapq.heappop(ranked)
                continue
            present = rank(request, site)
            if present > was:
                heapq.heapreplace(ranked, (present, site))
                continue
            hold = current.held.get(site.name)
            if hold is not None and not hold.lets_pass(
                request, site.books, current.now, current.ends_at
            ):
                lane.refused.append(site.name)
                heapq.heappop(ranked)
                continue
            return [Seat(head, site.name, choose_claim(request, site.books))]
        return []

    def _to_ask(self, lane: _Lane, current: _Pass) -> list[Site]:
        """Give the nodes worth asking: all, or those that changed since the lane fitted nowhere."""
        sites = current.sites
        if lane.asked_at < self._renewed_at:
            return list(sites.values() if lane.request is None else candidates(lane.request, sites))
        fresh = dict.fromkeys(lane.refused)
        for name, age in reversed(self._freed.items()):
            if age <= lane.asked_at:
                break
            fresh[name] = None
        named = lane.request.node if lane.request is not None else ""
        return [sites[name] for name in fresh if name in sites and named in {"", name}]

    def _keep(self, lane: _Lane, current: _Pass) -> None:
        """Keep nodes free for the first of a lane that fits nowhere."""
        held = current.held
        if not lane.keeps:
            lane.kept_since = current.now
        if (
            lane.chosen_at < self._renewed_at
            or any(name in held for name in lane.keeps)
            or (len(lane.keeps) < self._width(lane, current.now) and lane.chosen_at < self._age)
        ):
            before, lane.keeps = lane.keeps, self._choose_keeps(lane, current)
            if not set(before) <= set(lane.keeps):
                self._age += 1  # what it lets go of may be kept for others
            lane.chosen_at = self._age
        head = self._head(lane)
        assert head is not None, "an empty lane was asked for"
        for name in lane.keeps:
            held[name] = Hold(name, head, lane.request)

    def _width(self, lane: _Lane, now: float) -> int:
        """Give how many nodes may be kept for the first of a lane.

        One, and one more for every so long that it did not suffice: what runs on it may never
        end, while others end all the time. The nodes of a gang are planned as a whole.
        """
        if lane.request is None or not lane.keeps:
            return 1
        return 1 + max(0, int((now - lane.kept_since) / _WIDEN_S))

    def _choose_keeps(self, lane: _Lane, current: _Pass) -> list[NodeName]:
        sites, held = current.sites, current.held
        if lane.request is None:
            members = list(lane.members.items())
            own = {name: sites[name] for name in lane.keeps if name in sites and name not in held}
            # The same ones while they will do, as for a single task.
            if own and len(own) == len(lane.keeps) and plan_gang(members, own) is not None:
                return lane.keeps
            return plan_gang(members, sites, held) or []
        if current.all_held:
            return []
        kept: list[NodeName] = []
        for _ in range(self._width(lane, current.now)):
            before = next((name for name in lane.keeps if name not in kept), None)
            name = self._choose_one(lane.request, {*held, *kept}, before, sites)
            if name is None:
                break
            kept.append(name)
        return kept

    def _choose_one(
        self,
        request: Request,
        held: Collection[NodeName],
        before: NodeName | None,
        sites: dict[NodeName, Site],
    ) -> NodeName | None:
        if before is not None and before not in held:
            site = sites.get(before)
            if site is not None and could_take(request, site):
                return before
        found = choose_held(request, candidates(request, sites), held, before)
        return None if found is None else found.name
