"""One open link to the host, from register to its end.

Knows: the order of things on a link: say everything, take orders, report what changes, beat.
Does not know: how the link came to be, or when to dial again (``uplink``).

Whatever goes wrong with a call ends the link: on the next one everything is said anew, so
nothing has to be remembered of a link that failed.

A runner whose vault cannot be written stays on its link and beats on. Its heartbeats say what
is wrong, so that the host gives it nothing new; what was ordered meanwhile waits here.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, suppress
from typing import Final, NoReturn, Protocol

from kohaku_daemon.core.node.events import (
    KillOrdered,
    NodeEvent,
    PauseOrdered,
    ReportsTaken,
    ResumeOrdered,
    StartOrdered,
)
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.runner.loop import NodeLoop
from kohaku_daemon.runner.outbox import Outbox, pages
from kohaku_daemon.supervise import spawn, until_one_fails
from protocol.connection import Connection, ItemStream
from protocol.errors import KohakuError, TimedOut, Unavailable
from protocol.messages.runner import (
    AttemptReport,
    OrderKill,
    OrderPause,
    OrderPull,
    OrderResume,
    Orders,
    OrdersEnded,
    OrderStart,
    OrderStream,
    Register,
    Registered,
    Report,
    TakeOrders,
)
from protocol.methods import (
    RUNNER_HEARTBEAT,
    RUNNER_ORDERS,
    RUNNER_REGISTER,
    RUNNER_REPORT,
)
from protocol.models.environment import WantedImage
from protocol.models.node import Inventory, Readings

#: Groups of orders that may wait here.
_WINDOW: Final = 8
#: Seconds the host has to answer what it must first commit.
_COMMIT_S: Final = 60.0
#: Seconds our own readers have before a link is given up.
_OWN_S: Final = 30.0
#: A heartbeat without answer for so many periods, or seconds, ends the link.
_BEATS_MISSED: Final = 5
_BEAT_LEAST_S: Final = 10.0


class Instrument(Protocol):
    """What a link tells of the machine."""

    @property
    def latest(self) -> Readings:
        """What was read last."""

    @property
    def changed(self) -> asyncio.Event:
        """Set once an inventory that is taken from now on is out of date."""

    async def inventory(self) -> Inventory:
        """Describe the machine."""


class Planner(Protocol):
    """Who knows the backends."""

    def plan(self, launch: Launch) -> StartOrdered:
        """Turn the order to launch into an event."""


class StreamServer(Protocol):
    """Who serves data streams."""

    async def serve(self, order: OrderStream) -> None:
        """Serve one until its end. Raises nothing."""


class ImageAsker(Protocol):
    """Who asks the host about images."""

    def linked(self, connection: Connection) -> AbstractContextManager[None]:
        """Ask on this connection while the block runs."""


class ImagePuller(Protocol):
    """Who brings images ahead of time."""

    def pull(self, image: WantedImage) -> None:
        """Begin to bring an image."""


class Link:
    """What is said on a connection that the host has welcomed."""

    def __init__(
        self,
        *,
        node: str,
        instance: str,
        loop: NodeLoop,
        outbox: Outbox,
        planner: Planner,
        instrument: Instrument,
        streams: StreamServer,
        asker: ImageAsker,
        puller: ImagePuller,
    ) -> None:
        self._node = node
        self._instance = instance
        self._loop = loop
        self._outbox = outbox
        self._planner = planner
        self._instrument = instrument
        self._streams = streams
        self._asker = asker
        self._puller = puller
        #: Set once what was registered is out of date.
        self._outdated = asyncio.Event()

    async def register(self, connection: Connection) -> Registered:
        """Say what this node has and every launch it knows.

        Raises:
            KohakuError: The host refused, or the link broke.
            Unavailable: The machine cannot be read.
        """
        self._outdated = self._instrument.changed
        try:
            async with asyncio.timeout(_OWN_S):
                inventory = await self._instrument.inventory()
        except TimeoutError:
            text = "nothing can be said to the host: this machine cannot be read"
            raise Unavailable(text) from None
        # Nothing is said that a crash could make untrue, unless the disk takes nothing now.
        await self._loop.kept_up()
        # What waits in the outbox is no newer than what the engine says now.
        self._outbox.clear()
        attempts = self._loop.attempts()
        groups = list(pages(attempts)) or [()]
        for group in groups[:-1]:
            await self._register(connection, inventory, group, more=True)
        registered = await self._register(connection, inventory, groups[-1], more=False)
        self._loop.post(ReportsTaken(attempts))
        return registered

    async def serve(self, connection: Connection, registered: Registered) -> KohakuError:
        """Take orders and report until the link ends; give why it did."""
        with self._asker.linked(connection):
            return await self._serve(connection, registered)

    async def _serve(self, connection: Connection, registered: Registered) -> KohakuError:
        async with connection.stream(RUNNER_ORDERS, TakeOrders(), window=_WINDOW) as orders:
            error = await until_one_fails(
                self._take_orders(orders),
                self._report(connection),
                self._beat(connection, registered.heartbeat_s),
                _wait_closed(connection),
                _wait_outdated(self._outdated),
                name="link",
            )
        if isinstance(error, TimedOut):
            return Unavailable(f"the host does not answer: {error.message}")
        return error

    async def _register(
        self,
        connection: Connection,
        inventory: Inventory,
        attempts: tuple[AttemptReport, ...],
        *,
        more: bool,
    ) -> Registered:
        params = Register(
            instance=self._instance,
            inventory=inventory,
            attempts=attempts,
            more=more,
            node=self._node,
        )
        return await connection.call(RUNNER_REGISTER, params, timeout_s=_COMMIT_S)

    async def _take_orders(self, orders: ItemStream[Orders, OrdersEnded]) -> NoReturn:
        serving: set[asyncio.Task[None]] = set()
        try:
            async for group in orders:
                for order in group.orders:
                    if isinstance(order, OrderStream):
                        job = spawn(self._streams.serve(order), name=f"stream {order.stream}")
                        serving.add(job)
                        job.add_done_callback(serving.discard)
                    elif isinstance(order, OrderPull):
                        self._puller.pull(order.image)
                    else:
                        self._loop.post(self._event_of(order))
                # No more is taken than the disk can follow.
                await self._loop.kept_up()
        finally:
            # Streams end with the link that ordered them: if the host is gone without a word,
            # it is the link that notices.
            for job in serving:
                job.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
        raise Unavailable("the host let go of the link")

    def _event_of(self, order: OrderStart | OrderKill | OrderPause | OrderResume) -> NodeEvent:
        match order:
            case OrderStart():
                launch = Launch(
                    task=order.task,
                    attempt=order.attempt,
                    batch=order.batch,
                    index=order.index,
                    size=order.size,
                    spec=order.spec,
                    claim=order.claim,
                    image=order.image,
                    trusted=order.trusted,
                    hosts=order.hosts,
                )
                return self._planner.plan(launch)
            case OrderKill():
                return KillOrdered(order.task, order.attempt, order.grace_s)
            case OrderPause():
                return PauseOrdered(order.task, order.attempt)
            case OrderResume():
                return ResumeOrdered(order.task, order.attempt)

    async def _report(self, connection: Connection) -> NoReturn:
        """Say what has changed: one call under way, and what gathers meanwhile in the next."""
        while True:
            group = await self._outbox.take()
            await connection.call(RUNNER_REPORT, Report(group), timeout_s=_COMMIT_S)
            self._loop.post(ReportsTaken(group))

    async def _beat(self, connection: Connection, period_s: float) -> NoReturn:
        clock = asyncio.get_running_loop()
        patience_s = max(_BEAT_LEAST_S, _BEATS_MISSED * period_s)
        due = clock.time()
        while True:
            changed = self._loop.trouble_changed
            latest = self._instrument.latest
            await connection.call(RUNNER_HEARTBEAT, latest, timeout_s=patience_s)
            due = max(due + period_s, clock.time())
            # Trouble, and its end, is told at once: each launch ordered before would wait.
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await changed.wait()
                    due = clock.time()


async def _wait_closed(connection: Connection) -> NoReturn:
    # Waited for, not awaited: that would cancel the future of somebody else with us.
    await asyncio.wait({connection.closed})
    raise Unavailable(f"the link ended: {connection.closed.result()}")


async def _wait_outdated(outdated: asyncio.Event) -> NoReturn:
    """End a link whose inventory is no longer true: the next one says the new one.

    It happens a few times in a runner's life at most, so it needs no message of its own.
    """
    await outdated.wait()
    raise Unavailable("the backends or GPUs of this node have changed: it registers anew")
