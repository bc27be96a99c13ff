"""What stands before aiohttp on every connection: a deadline for headers, bounds for strangers.

aiohttp's server keeps a silent or half-spoken connection for ever (measured with 3.14) and
counts none. Only asyncio's public protocol interface is used, so it survives upgrades.

Everybody is a stranger at first: an address may hold so many connections of strangers, and
each may say so much. Whoever shows a token, a credential or a ticket is vouched for by the
door that knows it, and counts no more: one machine may run any number of tools, whatever its
neighbours behind the same address do. Who has a token may say as much as it likes: it is known
who it is, and it can be revoked.

What comes is taken apart on the event loop before anybody looks at it, and 256 KiB may be
40,000 messages. So it is read in pieces that take about as long each, and whoever is at the
other end pays for them; while its purse is empty it is read when its time comes.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address
from time import perf_counter, thread_time
from typing import Final, TypeVar, cast

from kohaku_daemon.host.refusals import Refusals
from kohaku_daemon.host.valve import Valve
from kohaku_daemon.loop_time import Account, LoopTime, Purse
from protocol.errors import Unavailable

T = TypeVar("T")

#: Seconds for the whole request header. Nomad gives a handshake 5 s; a slow line gets more.
HEADER_DEADLINE_S: Final = 10.0
#: Bytes a stranger may send in all. A request, a hello and a join are a few KiB; without a
#: bound 256 connections that each hold back the last byte of a large message are 64 MiB.
MOST_OF_STRANGERS: Final = 64 * 1024
#: aiohttp refuses larger headers itself; this bounds what is looked through for their end.
_END_OF_HEADER: Final = b"\r\n\r\n"
#: Seconds on the loop that come back to the strangers of an address in each second: some fifty
#: handshakes. More are served while the loop has nothing else to do.
_STRANGERS_INCOME: Final = 0.1
#: Addresses whose strangers' purses are remembered.
_MOST_PURSES: Final = 4096
#: Bytes that are read at once: at first, at least, at most.
_FIRST_PIECE: Final = 16 * 1024
_LEAST_PIECE: Final = 4 * 1024
_LARGEST_PIECE: Final = 256 * 1024
#: Seconds that a piece should take at most; it doubles where it takes a quarter of that.
_PIECE_S: Final = 0.001


def household(address: str) -> str:
    """Give what is counted as one address: of IPv6 the network of 64 bits.

    Every machine there may take as many addresses as it likes (RFC 4291 section 2.5.4).
    """
    if ":" not in address:
        return address
    whole = IPv6Address(address.partition("%")[0])
    if whole.ipv4_mapped is not None:
        return str(whole.ipv4_mapped)
    return f"{IPv6Address(int(whole) >> 64 << 64)}/64"


class Census:
    """How many connections of strangers each address holds."""

    def __init__(self, most: int, refusals: Refusals) -> None:
        self._most = most
        self._refusals = refusals
        self._open = Counter[str]()

    def enter(self, address: str) -> bool:
        """Count a connection, unless the address has its share."""
        if self._open[address] >= self._most:
            why = f"{self._most} from this address have not shown a token"
            self._refusals.note(address, "a connection", Unavailable(why))
            return False
        self._open[address] += 1
        return True

    def tell_talker(self, address: str) -> None:
        """Tell the log that a stranger said too much."""
        why = f"more than {MOST_OF_STRANGERS} bytes came before a token"
        self._refusals.note(address, "a stranger's flood", Unavailable(why))

    def leave(self, address: str) -> None:
        """Count a connection no more."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


class Entrance:
    """What all connections have in common."""

    def __init__(self, census: Census, loop_time: LoopTime) -> None:
        self.census = census
        self.loop_time = loop_time
        #: Where each read puts what came, for as long as it takes to take a copy.
        self.buffer: Final = memoryview(bytearray(_LARGEST_PIECE))
        #: Of the strangers of each address, the one that came last at the end: who goes away
        #: and comes back finds what it has spent.
        self._purses: OrderedDict[str, Purse] = OrderedDict()

    def purse(self, address: str) -> Purse:
        """Give the purse of the strangers of an address."""
        purse = self._purses.get(address)
        if purse is None:
            purse = self._purses[address] = Purse(income=_STRANGERS_INCOME)
            if len(self._purses) > _MOST_PURSES:
                self._purses.popitem(last=False)
        self._purses.move_to_end(address)
        return purse


class GuardedConnection(asyncio.BufferedProtocol):
    """Passes everything on to aiohttp's protocol, once it has been let in."""

    def __init__(self, make_inner: Callable[[], asyncio.Protocol], entrance: Entrance) -> None:
        self._make_inner = make_inner
        self._entrance = entrance
        self._inner: asyncio.Protocol | None = None
        self._address = ""
        self._counted = False
        #: What pays for all that comes of this connection.
        self.account = Account()
        #: Bytes that may still come while nobody has vouched for it.
        self._allowed = MOST_OF_STRANGERS
        self._abort: Callable[[], None] = _nothing
        self._valve: Valve | None = None
        #: Its place in the line, while it is not read.
        self._place: asyncio.Future[None] | None = None
        self._piece = _FIRST_PIECE
        self._tail = b""
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let a connection in, or drop it."""
        peer = transport.get_extra_info("peername")
        self._address = household(peer[0]) if peer else ""
        whole = cast("asyncio.Transport", transport)
        self._abort = whole.abort
        self._counted = self._entrance.census.enter(self._address)
        if not self._counted:
            self._abort()
            return
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(HEADER_DEADLINE_S, self._abort)
        self.account.purse = self._entrance.purse(self._address)
        self._valve = Valve(whole)
        self._inner = self._make_inner()
        self._pay(self._inner.connection_made, self._valve)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self._place is not None:
            self._place.cancel()
        self._leave_census()
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def vouch(self, purse: Purse) -> None:
        """Count the connection no more, for its owner is no stranger: ``purse`` is the owner's."""
        self.account.purse = purse
        self._leave_census()

    def _leave_census(self) -> None:
        if self._counted:
            self._counted = False
            self._entrance.census.leave(self._address)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Give the place for what comes next, so large as it may be."""
        return self._entrance.buffer[: self._piece]

    def buffer_updated(self, nbytes: int) -> None:
        """Pass bytes on; the end of the header ends the deadline."""
        if self._inner is None:
            return
        data = bytes(self._entrance.buffer[:nbytes])
        if self._counted:
            self._allowed -= nbytes
            if self._allowed < 0:
                self._entrance.census.tell_talker(self._address)
                self._abort()
                return
        if self._deadline is not None:
            seen = self._tail + data
            if _END_OF_HEADER in seen:
                self._deadline.cancel()
                self._deadline = None
                self._tail = b""
            else:
                self._tail = seen[-3:]
        spent_s = self._pay(self._inner.data_received, data)
        if spent_s > _PIECE_S:
            self._piece = max(self._piece // 2, _LEAST_PIECE)
        elif nbytes == self._piece and spent_s < _PIECE_S / 4:
            self._piece = min(self._piece * 2, _LARGEST_PIECE)

    def _pay(self, work: Callable[[T], None], argument: T) -> float:
        """Have something done that the other end pays for; give the seconds it took."""
        purse = self.account.purse
        began, spent_before = perf_counter(), thread_time()
        try:
            work(argument)
        finally:
            spent_s = thread_time() - spent_before
            ended = perf_counter()
            self._entrance.loop_time.pay(purse, spent_s, began, ended)
        if self._place is None and purse.is_empty(ended):
            self._wait(purse)
        return spent_s

    def _wait(self, purse: Purse) -> None:
        """Read no more until its time comes."""
        assert self._valve is not None
        self._valve.hold()
        self._place = self._entrance.loop_time.stand(purse, self)
        self._place.add_done_callback(self._go_on)

    def _go_on(self, place: asyncio.Future[None]) -> None:
        self._place = None
        if place.cancelled() or self._valve is None:
            return
        self._entrance.loop_time.leave()  # what comes pays when it comes, if it does
        self._valve.release()

    def eof_received(self) -> bool | None:
        """Pass it on."""
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        """Pass it on."""
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        if self._inner is not None:
            self._inner.resume_writing()


def _nothing() -> None:
    pass


def vouch(transport: asyncio.BaseTransport | None, purse: Purse | None = None) -> None:
    """Say that whoever made a connection has shown who it is. None is a connection that ended.

    From here on ``purse`` pays for what comes; without one the connection has one of its own.
    """
    guard = _guard_of(transport)
    if guard is not None:
        guard.vouch(purse or Purse())


def account_of(transport: asyncio.BaseTransport | None) -> Account | None:
    """Give what a connection pays from; None is a connection that ended, or is not guarded."""
    guard = _guard_of(transport)
    return guard.account if guard is not None else None


def _guard_of(transport: asyncio.BaseTransport | None) -> GuardedConnection | None:
    protocol = transport.get_protocol() if transport is not None else None
    return protocol if isinstance(protocol, GuardedConnection) else None
