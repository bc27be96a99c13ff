"""Who may use the event loop when: what one peer asks for does not add up to a pause for all.

Work runs in steps, from one wait to the next, and no step can be interrupted. Ten thousand
steps that become ready at the same moment (a client that asked for 256 pages of tasks, and
the commit they all waited for) would run one after the other before anybody else is heard;
250 such calls were measured to stop a host for 0.7 s.

So what runs in one round of the loop (all that was ready at one moment) has a bound, a third of
a millisecond: an answer takes some twenty rounds, and is as slow as these are long. Whoever
finds no room stands in line. Each peer has a purse: a little time on the loop is there for
everybody at once, and comes back while it is not used. Who has most left goes first, and as
purses fill up while their owners wait, everybody's time comes. Those who have used up much of
theirs are let through in one round of three only, so that what others ask for is taken forward
in between; after a longer step of somebody who has nothing left, they wait as long again. While
nobody else wants anything, all this costs next to nothing.

Time is of the processor: a machine that is busy with something else is nobody's debt.

Knows: time that was spent, who waits.
Does not know: calls, connections, people; whose purse is whose is for the caller to say.
"""

from __future__ import annotations

import asyncio
import types
from collections import OrderedDict, deque
from collections.abc import Coroutine, Generator, Hashable, Iterator
from functools import partial
from math import inf
from operator import itemgetter
from time import perf_counter, thread_time
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: Seconds on the loop that a peer may spend at once: some forty common calls.
PURSE_S: Final = 0.01
#: Seconds that come back in each second in which it spends nothing: somebody who asks for the
#: next as soon as one is answered takes some tenth of a busy loop, and is no nuisance.
INCOME: Final = 0.2
#: How full a purse is whose owner goes before those who have used up theirs.
ENOUGH: Final = 0.5
#: Seconds of debt that are remembered: nobody pays for long for one large request.
MOST_DEBT_S: Final = 0.25
#: Seconds of steps in one round, if one alone is not longer.
ROUND_S: Final = 0.0003
#: Seconds of a step of somebody who has nothing left after which the loop rests.
LONG_S: Final = 0.002
#: Rounds between two in which those are let through who have used up much. A round in which
#: nothing happens is some 20 us.
FREE_ROUNDS: Final = 2
#: Seconds that a step takes, as long as nothing is known of a peer's; and at least.
_COMMON_STEP_S: Final = 0.0003
_SHORTEST_STEP_S: Final = 0.00002
#: What a purse has to have that has anything.
_NOTHING: Final = 1e-9


class Purse:
    """The time on the loop that one peer has left."""

    __slots__ = ("_at", "_income", "_left", "_size_s", "step_s")

    def __init__(self, size_s: float = PURSE_S, income: float = INCOME) -> None:
        """Hold ``size_s`` seconds at first and at most; ``income`` come back in each second
        that passes from the end of one step to the begin of the next.
        """
        self._size_s = self._left = size_s
        self._income = income
        self._at = perf_counter()
        #: Seconds that a step takes: the longest of late.
        self.step_s = _COMMON_STEP_S

    def fill(self, now: float) -> float:
        """Say how full it is: 1.0 and more is full, 0.0 and less empty.

        ``now`` is of ``time.perf_counter``.
        """
        return (self._left + (now - self._at) * self._income) / self._size_s

    def is_empty(self, now: float) -> bool:
        """Say whether nothing is left."""
        return self._left + (now - self._at) * self._income <= 0

    def spend(self, spent_s: float, began: float, ended: float) -> None:
        """Pay for a step. What comes back comes between steps, however slow the machine is."""
        left = min(self._size_s, self._left + (began - self._at) * self._income)
        self._left = max(left - spent_s, -MOST_DEBT_S)
        self._at = ended
        self.step_s = max(spent_s, self.step_s + (spent_s - self.step_s) / 8)


class Account:
    """What a connection pays from: the purse of whoever is known to be at its other end."""

    __slots__ = ("purse",)

    def __init__(self, purse: Purse | None = None) -> None:
        self.purse = purse or Purse()


class _Lanes:
    """Those of one purse who wait: each lane has its turn after all others."""

    __slots__ = ("_lanes",)

    def __init__(self) -> None:
        self._lanes: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def put(self, lane: Hashable, place: asyncio.Future[None]) -> None:
        self._lanes.setdefault(lane, deque()).append(place)

    def take(self) -> asyncio.Future[None]:
        lane, places = self._lanes.popitem(last=False)
        place = places.popleft()
        if places:
            self._lanes[lane] = places
        return place


class LoopTime:
    """The time on the loop that all peers of a daemon share."""

    def __init__(self) -> None:
        self._waiting: dict[Purse, _Lanes] = {}
        #: Those that were let through, and whose steps are not over.
        self._inside = 0
        #: Seconds that were spent in this round, or in some short ones: where it ends is only
        #: looked at when somebody waits for it, for a call of the loop's in each is dear.
        self._round_s = 0.0
        self._paid_at = 0.0
        #: Who paid last, and whether more than one has since somebody was let through.
        self._last: Purse | None = None
        self._are_several = False
        #: Rounds until those are let through again who have used up much.
        self._free_rounds = 0
        #: Until when nobody is who has nothing left.
        self._rests_until = 0.0
        #: Begins the next round, or comes after the rest.
        self._handle: asyncio.Handle | None = None
        self._is_soon = False

    async def run(self, work: Coroutine[Any, Any, T], account: Account, lane: Hashable) -> T:
        """Run a coroutine in steps that ``account`` pays for.

        Of those who wait with one purse, each ``lane`` has its turn after all others: calls
        of one connection wait for each other, and not those of a second one for all of them.
        """
        return await self._drive(work, account, lane)

    def pay(self, purse: Purse, spent_s: float, began: float, ended: float) -> None:
        """Pay for what was done; times are of ``time.perf_counter``, ``spent_s`` is CPU time."""
        purse.spend(spent_s, began, ended)
        if began - self._paid_at > ROUND_S:
            self._round_s = 0.0
        self._paid_at = ended
        self._round_s += spent_s
        if purse is not self._last:
            self._last = purse
            self._are_several = True
        if spent_s > LONG_S and purse.fill(ended) <= 0:
            self._rests_until = ended + spent_s

    def stand(self, purse: Purse, lane: Hashable) -> asyncio.Future[None]:
        """Stand in line; done when it is time. Whoever was let through has to ``leave``."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(purse, _Lanes()).put(lane, place)
        if not self._is_soon:
            self._arm(0.0)
        return place

    def leave(self) -> None:
        """Note that what somebody was let through for is done."""
        self._inside -= 1

    @types.coroutine
    def _drive(
        self, work: Coroutine[Any, Any, T], account: Account, lane: Hashable
    ) -> Generator[Any, Any, T]:
        step = partial(work.send, None)
        while True:
            purse = account.purse
            waited = not self._may_pass(purse)
            if waited:
                try:
                    yield from self._wait(purse, lane)
                except BaseException as reason:  # cancelled while it waited: the work's to know
                    waited = False
                    step = partial(work.throw, reason)
            began, spent_before = perf_counter(), thread_time()
            try:
                awaited = step()
            except StopIteration as done:
                result: T = done.value
                return result
            finally:
                del step  # what it throws holds this frame, which must not hold it
                self.pay(purse, thread_time() - spent_before, began, perf_counter())
                if waited:
                    self.leave()
            try:
                step = partial(work.send, (yield awaited))
            except BaseException as reason:  # whatever it is, it is thrown at who awaits it
                step = partial(work.throw, reason)

    def _may_pass(self, purse: Purse) -> bool:
        if self._round_s >= ROUND_S:
            return False
        return not (self._waiting or self._inside) or purse.fill(perf_counter()) >= ENOUGH

    def _wait(self, purse: Purse, lane: Hashable) -> Generator[Any, None, None]:
        place = self.stand(purse, lane)
        try:
            yield from place
        except BaseException:  # mostly that it is cancelled: its turn goes to the next
            if place.done() and not place.cancelled():
                self.leave()  # its time had come
            raise

    def _arm(self, wait_s: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        loop = asyncio.get_running_loop()
        self._is_soon = wait_s <= 0
        if self._is_soon:
            self._handle = loop.call_soon(self._begin_round)
        else:
            self._handle = loop.call_later(wait_s, self._begin_round)

    def _begin_round(self) -> None:
        self._handle, self._is_soon = None, False
        self._round_s = 0.0
        if not self._waiting:
            self._free_rounds = max(0, self._free_rounds - 1)
            return
        if self._inside == 0:
            self._let_through()
        if self._waiting and not self._is_soon:
            is_rest = self._inside == 0 and self._free_rounds == 0
            self._arm(self._rests_until - perf_counter() if is_rest else 0.0)

    def _let_through(self) -> None:
        """Let through what fits into a round, one of each purse before a second of one."""
        now = perf_counter()
        enough = ENOUGH
        if self._free_rounds:
            self._free_rounds -= 1
        else:
            enough = -inf if now >= self._rests_until else _NOTHING
        left_s = ROUND_S
        are_several, self._are_several = self._are_several or len(self._waiting) > 1, False
        for purse, fill in self._in_order(now, enough):
            lanes = self._waiting[purse]
            place = lanes.take()
            if not lanes:
                del self._waiting[purse]
            if not place.done():
                place.set_result(None)
                self._inside += 1
                if fill < ENOUGH and are_several:
                    self._free_rounds = FREE_ROUNDS
                left_s -= max(purse.step_s, _SHORTEST_STEP_S)
                if left_s <= 0:
                    return

    def _in_order(self, now: float, enough: float) -> Iterator[tuple[Purse, float]]:
        """Give those who have enough, the fullest first, each again while it waits elsewhere."""
        fills = ((purse, purse.fill(now)) for purse in self._waiting)
        order = [entry for entry in fills if entry[1] >= enough]
        order.sort(key=itemgetter(1), reverse=True)
        while order:
            yield from order
            order = [entry for entry in order if entry[0] in self._waiting]
