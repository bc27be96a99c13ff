"""Who may work on the event loop when: many calls of one peer do not add up to a pause for all.

Calls run in steps, from one wait to the next, and no step can be interrupted. Ten thousand
steps that become ready at the same moment (a client that asked for 256 pages of tasks, and
the commit they all waited for) would run one after the other before anybody else is heard;
250 such calls were measured to stop a host for 0.7 s.

So each peer has a purse: a little time on the loop is there for everybody at once, and comes
back while it is not used. Whoever has spent it waits in a queue with all others who have, and
these steps run a millisecond's worth at a time: then everything that is ready has its turn
first, and after a longer one the loop is left alone for as long as it took. Short steps cost
their peer nothing by this but order; peers that ask for much get at most half of the loop.

Time is of the processor: a machine that is busy with something else is nobody's debt.

Knows: time that was spent, who waits.
Does not know: calls, connections, people; whose purse is whose is for the caller to say.
"""

from __future__ import annotations

import asyncio
import types
from collections import OrderedDict, deque
from collections.abc import Coroutine, Generator, Hashable
from functools import partial
from time import perf_counter, thread_time
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: Seconds on the loop that a peer may spend at once: some two hundred common calls.
PURSE_S: Final = 0.05
#: Seconds that come back in each second in which it spends nothing: with 1.0 it may spend half
#: of its time for ever.
INCOME: Final = 1.0
#: Seconds of debt that are remembered: nobody pays for long for one large request.
MOST_DEBT_S: Final = 0.25
#: Seconds of steps that are run at once; after more of them the loop rests.
SLICE_S: Final = 0.001
#: Steps that are run at once, however short they were of late.
MOST_AT_ONCE: Final = 16


class Purse:
    """The time on the loop that one peer has left."""

    __slots__ = ("_at", "_income", "_left", "_size_s")

    def __init__(self, size_s: float = PURSE_S, income: float = INCOME) -> None:
        """Hold ``size_s`` seconds at first and at most; ``income`` come back in each second
        that passes from the end of one step to the begin of the next.
        """
        self._size_s = self._left = size_s
        self._income = income
        self._at = perf_counter()

    def is_empty(self, now: float) -> bool:
        """Say whether it has to wait; ``now`` is of ``time.perf_counter``."""
        return self._left + (now - self._at) * self._income <= 0

    def spend(self, spent_s: float, began: float, ended: float) -> None:
        """Pay for a step. What comes back comes between steps, however slow the machine is."""
        left = min(self._size_s, self._left + (began - self._at) * self._income)
        self._left = max(left - spent_s, -MOST_DEBT_S)
        self._at = ended


class Turns:
    """The queue of those whose purses are empty."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()
        #: Turns that were given, and whose steps are not over.
        self._given = 0
        #: More will be given.
        self._armed = False
        #: Seconds that the steps of these turns took.
        self._spent_s = 0.0
        #: Turns to give at once.
        self._at_once = 1

    async def run(self, work: Coroutine[Any, Any, T], purse: Purse, lane: Hashable) -> T:
        """Run a coroutine in steps that ``purse`` pays for.

        In the queue each ``lane`` has its turn after all others: calls of one connection
        wait for each other, and not the calls of a second one for all of them.
        """
        return await self._drive(work, purse, lane)

    async def rest(self, purse: Purse, lane: Hashable, spent_s: float) -> None:
        """Let others have their turn after what took ``spent_s`` of the processor and is paid."""
        if not purse.is_empty(perf_counter()):
            await asyncio.sleep(0)
            return
        await self._wait(lane)
        self._take_back(spent_s)

    @types.coroutine
    def _drive(
        self, work: Coroutine[Any, Any, T], purse: Purse, lane: Hashable
    ) -> Generator[Any, Any, T]:
        step = partial(work.send, None)
        while True:
            waited = False
            if purse.is_empty(perf_counter()):
                try:
                    yield from self._queue(lane)
                    waited = True
                except BaseException as reason:  # cancelled while it waited: the work's to know
                    step = partial(work.throw, reason)
            began, spent_before = perf_counter(), thread_time()
            try:
                awaited = step()
            except StopIteration as done:
                result: T = done.value
                return result
            finally:
                spent_s = thread_time() - spent_before
                purse.spend(spent_s, began, perf_counter())
                if waited:
                    self._take_back(spent_s)
            try:
                step = partial(work.send, (yield awaited))
            except BaseException as reason:  # whatever it is, it is thrown at who awaits it
                step = partial(work.throw, reason)

    @types.coroutine
    def _wait(self, lane: Hashable) -> Generator[Any, None, None]:
        yield from self._queue(lane)

    def _queue(self, lane: Hashable) -> Generator[Any, None, None]:
        """Wait for a turn. Who returns from here has to give it back after its step."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(lane, deque()).append(turn)
        if not self._armed and not self._given:
            self._arm(0.0)
        try:
            yield from turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._take_back(0.0)  # its turn had come
            raise

    def _take_back(self, spent_s: float) -> None:
        """Note that a step is over, and give the next turns once all of a slice are."""
        self._spent_s += spent_s
        self._given -= 1
        if self._given == 0:
            spent_s, self._spent_s = self._spent_s, 0.0
            short = spent_s < SLICE_S
            self._at_once = min(2 * self._at_once, MOST_AT_ONCE) if short else 1
            self._arm(spent_s if spent_s > 2 * SLICE_S else 0.0)

    def _arm(self, rest_s: float) -> None:
        self._armed = True
        loop = asyncio.get_running_loop()
        if rest_s == 0.0:
            loop.call_soon(self._give)
        else:
            loop.call_later(rest_s, self._give)

    def _give(self) -> None:
        """Give the next who wait their turns, of each lane one after the other."""
        self._armed = False
        while self._waiting and self._given < self._at_once:
            lane, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[lane] = queue
            if not turn.done():
                turn.set_result(None)
                self._given += 1
