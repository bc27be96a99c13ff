"""The runner's one loop: events into the engine, its actions to the vault and then to the world.

Knows: that what comes together is committed together, that what arrives during a commit
gathers for the next one, how long what nobody waits for may be put off, what to do while the
disk takes nothing.
Does not know: what events mean, what has to wait for what (``core.node.ledger``), how
actions are carried out.

It is no job of its own: an event is handled in the next round of asyncio's loop, with all
others that came in this one, so that a burst of them costs one commit and one hop to a thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final, NoReturn, Protocol

from kohaku_daemon.clock import Clock
from kohaku_daemon.core.node.actions import NodeAction
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.events import NodeEvent
from kohaku_daemon.core.node.ledger import Bundle, Ledger
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle
from kohaku_daemon.runner.memory import Memory
from protocol.errors import Unavailable
from protocol.messages.runner import AttemptReport, AttemptState

_log = logging.getLogger(__name__)

#: Seconds that what nobody waits for may gather before it is written.
_PUT_OFF_S: Final = 0.1
#: Seconds a commit may take before the host is told that something is wrong.
_PATIENCE_S: Final = 5.0
#: Seconds between tries to write what could not be written: the first, and the longest.
_RETRY_FIRST_S: Final = 0.25
_RETRY_LONGEST_S: Final = 15.0


class Hands(Protocol):
    """Who carries actions out."""

    def prepare(self, actions: Sequence[NodeAction]) -> None:
        """Do what blocks and has to come before them. In a thread, right after their commit."""

    def carry_out(self, actions: Sequence[NodeAction]) -> None:
        """Begin them, in order. Must not block. ``Remember`` and ``Forget`` are not among them."""


class NodeLoop:
    """The only one that touches the engine."""

    def __init__(self, engine: NodeEngine, memory: Memory, clock: Clock) -> None:
        self._engine = engine
        self._memory = memory
        self._clock = clock
        self._ledger = Ledger()
        self._hands: Hands | None = None
        self._entries: list[NodeEvent] = []
        self._is_due = False
        self._put_off: asyncio.TimerHandle | None = None
        self._too_slow: asyncio.TimerHandle | None = None
        #: Those who wait for a bundle, by its number; some of them also for trouble.
        self._waiting: list[tuple[int, bool, asyncio.Future[None]]] = []
        self._begun = asyncio.Event()
        self._recovered = asyncio.Event()
        self._taken_in = asyncio.Event()
        #: Set to why the loop cannot go on.
        self._broken: asyncio.Future[NoReturn] | None = None
        #: Why the vault cannot be written; empty if it can.
        self.trouble = ""
        #: Set and replaced whenever ``trouble`` begins or ends.
        self.trouble_changed = asyncio.Event()

    def post(self, event: NodeEvent) -> None:
        """Let an event be handled with the next group."""
        self._entries.append(event)
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._work)

    async def committed(self) -> None:
        """Wait until all that was posted before is on the disk, and what waited for it begun."""
        await self._begun.wait()
        self._work()
        self._ledger.ripen()
        await self._wait(also_trouble=False)

    async def kept_up(self) -> None:
        """Wait until nothing waits for the disk, but no longer than it takes what it is given.

        While it does not, orders are still taken, or the one to end what fills it would wait.
        What may be put off is not waited for.
        """
        if not self.trouble:
            await self._begun.wait()
            self._work()
            await self._wait(also_trouble=True)

    async def recovered(self) -> None:
        """Wait until the fate of every launch of an earlier run is known."""
        await self._recovered.wait()

    async def taken_in(self) -> None:
        """Wait until the host has taken this run of the runner in."""
        await self._taken_in.wait()

    # What is thought of launches now, with all that was posted before -----------------------

    def attempts(self) -> tuple[AttemptReport, ...]:
        """Give what a new link is told: of every launch the host may not know the end of.

        It is no further than the disk, and so may leave the machine. Orders of an earlier link
        that the disk did not take are let go of.
        """
        self._work()
        for key in self._ledger.withdraw():
            self._engine.forget(key)
        return tuple(self._ledger.tellable(self._engine.attempts()))

    def live(self) -> list[LaunchRecord]:
        """Give the launches that run or are held."""
        return self._engine.live()

    def report(self, key: str) -> AttemptReport | None:
        """Give where a launch stands; None if it was never here, or settled long ago."""
        self._work()
        return self._engine.report(key)

    def is_live(self, key: str) -> bool:
        """Say whether a launch may still do something."""
        report = self.report(key)
        return report is not None and report.state is not AttemptState.ENDED

    def handles(self) -> list[Handle]:
        """Give the handle of each launch that its backend may not forget yet."""
        self._work()
        return [*self._engine.handles(), *self._ledger.leaving()]

    def unended(self) -> set[str]:
        """Give the keys of all launches that may still do something."""
        return {
            f"{report.task}-{report.attempt}"
            for report in self._engine.attempts()
            if report.state is not AttemptState.ENDED
        }

    # Running --------------------------------------------------------------------------------

    async def run(self, records: Iterable[LaunchRecord], hands: Hands) -> NoReturn:
        """Take what the vault kept, then handle what is posted until cancelled."""
        self._broken = asyncio.get_running_loop().create_future()
        self._hands = hands
        records = list(records)
        self._ledger = Ledger(record.key for record in records if not record.settled)
        self._begun.set()
        self._carry_out(self._ledger.take(self._engine.recover(records, self._clock.now())))
        self._work()
        try:
            await self._broken
        finally:
            self._hands = None  # what is posted from here on is found out by the next run
            for timer in (self._put_off, self._too_slow):
                if timer is not None:
                    timer.cancel()
        raise AssertionError("it ends by being cancelled, or with an exception")

    def _work(self) -> None:
        self._is_due = False
        try:
            self._handle_posted()
        except Exception as bug:  # of ours: nothing may go on as if this had been handled
            self._break(bug)

    def _handle_posted(self) -> None:
        if self._hands is None:
            return
        free: list[NodeAction] = []
        entries, self._entries = self._entries, []
        for event in entries:
            free += self._ledger.take(self._engine.handle(event, self._clock.now()))
        self._commit_if_due()
        self._carry_out(free)
        if not self._recovered.is_set() and self._engine.is_recovered:
            self._recovered.set()
        if not self._taken_in.is_set() and self._engine.is_taken_in:
            self._taken_in.set()

    def _carry_out(self, actions: Sequence[NodeAction]) -> None:
        if actions and self._hands is not None:
            self._hands.carry_out(actions)

    def _break(self, error: BaseException) -> None:
        if self._broken is not None and not self._broken.done():
            self._broken.set_exception(error)

    # Commits --------------------------------------------------------------------------------

    def _commit_if_due(self) -> None:
        if self._ledger.under_way is None and self._ledger.is_due:
            self._write(self._ledger.close(), _RETRY_FIRST_S)
        if self._put_off is None and not self._ledger.later.is_empty:
            loop = asyncio.get_running_loop()
            self._put_off = loop.call_later(_PUT_OFF_S, self._commit_put_off)

    def _commit_put_off(self) -> None:
        self._put_off = None
        self._ledger.ripen()
        self._commit_if_due()

    def _write(self, bundle: Bundle, retry_s: float) -> None:
        """Write, however often it takes: the engine is ahead of the disk and must not be alone."""
        if self._hands is None:
            return
        then = partial(self._hands.prepare, tuple(bundle.owed))
        on_done = partial(self._written, bundle, retry_s)
        self._memory.keep_launches(bundle.puts, on_done, bundle.drops, then, void=bundle.voids)
        slow = Unavailable(f"the disk has not answered for {_PATIENCE_S:g} s")
        loop = asyncio.get_running_loop()
        self._too_slow = loop.call_later(_PATIENCE_S, self._set_trouble, slow)

    def _written(self, bundle: Bundle, retry_s: float, error: BaseException | None) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
        if isinstance(error, Unavailable):
            self._set_trouble(error)
            wait_s = min(retry_s * 2, _RETRY_LONGEST_S)
            asyncio.get_running_loop().call_later(retry_s, self._write, bundle, wait_s)
            return
        if error is not None:
            self._break(error)
            return
        self._clear_trouble()
        owed = self._ledger.finish()
        try:
            self._carry_out(owed)
            self._commit_if_due()
        except Exception as bug:  # of ours, as in ``_work``
            self._break(bug)
        self._tell_waiting(bundle.number)

    def _set_trouble(self, error: Unavailable) -> None:
        if not self.trouble:
            _log.error(
                "cannot keep launches in the vault: nothing new is started, what runs goes on; "
                "trying again: %s",
                error,
            )
            self.trouble = error.message
            self._tell_trouble()
        self.trouble = error.message
        for _, also_trouble, waiting in self._waiting:
            if also_trouble and not waiting.done():
                waiting.set_result(None)

    def _clear_trouble(self) -> None:
        if self.trouble:
            self.trouble = ""
            _log.warning("launches can be kept again")
            self._tell_trouble()

    def _tell_trouble(self) -> None:
        before, self.trouble_changed = self.trouble_changed, asyncio.Event()
        before.set()

    # Waiting --------------------------------------------------------------------------------

    async def _wait(self, *, also_trouble: bool) -> None:
        if self._ledger.is_due:
            number = self._ledger.open.number
            self._commit_if_due()
        elif self._ledger.under_way is not None:
            number = self._ledger.under_way.number
        else:
            return
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((number, also_trouble, waiting))
        await waiting

    def _tell_waiting(self, number: int) -> None:
        if not self._waiting:
            return
        still = []
        for entry in self._waiting:
            if entry[0] > number and not entry[2].done():
                still.append(entry)
            elif not entry[2].done():
                entry[2].set_result(None)
        self._waiting = still
