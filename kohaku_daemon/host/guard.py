"""What stands before aiohttp on every connection: a deadline for headers, bounds for strangers.

aiohttp's server keeps a silent or half-spoken connection for ever (measured with 3.14) and
counts none. Only asyncio's public protocol interface is used, so it survives upgrades.

Everybody is a stranger at first: an address may hold so many connections of strangers, and
each may say so much. Whoever shows a token, a credential or a ticket is vouched for by the
door that knows it, and counts no more: one machine may run any number of tools, whatever its
neighbours behind the same address do. Who has a token is let alone: it is known who it is,
and it can be revoked.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Final, cast

from kohaku_daemon.host.refusals import Refusals
from protocol.errors import Unavailable

#: Seconds for the whole request header. Nomad gives a handshake 5 s; a slow line gets more.
HEADER_DEADLINE_S: Final = 10.0
#: Bytes a stranger may send in all. A request, a hello and a join are a few KiB; without a
#: bound 256 connections that each hold back the last byte of a large message are 64 MiB.
MOST_OF_STRANGERS: Final = 64 * 1024
#: aiohttp refuses larger headers itself; this bounds what is looked through for their end.
_END_OF_HEADER: Final = b"\r\n\r\n"


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


class GuardedConnection(asyncio.Protocol):
    """Passes everything on to aiohttp's protocol, once it has been let in."""

    def __init__(self, make_inner: Callable[[], asyncio.Protocol], census: Census) -> None:
        self._make_inner = make_inner
        self._census = census
        self._inner: asyncio.Protocol | None = None
        self._address = ""
        self._counted = False
        #: Bytes that may still come while nobody has vouched for it.
        self._allowed = MOST_OF_STRANGERS
        self._abort: Callable[[], None] = _nothing
        self._tail = b""
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let a connection in, or drop it."""
        peer = transport.get_extra_info("peername")
        self._address = household(peer[0]) if peer else ""
        self._abort = cast("asyncio.Transport", transport).abort
        self._counted = self._census.enter(self._address)
        if not self._counted:
            self._abort()
            return
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(HEADER_DEADLINE_S, self._abort)
        self._inner = self._make_inner()
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.vouch()
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def vouch(self) -> None:
        """Count the connection no more: it is over, or its owner is no stranger."""
        if self._counted:
            self._counted = False
            self._census.leave(self._address)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on; the end of the header ends the deadline."""
        if self._inner is None:
            return
        if self._counted:
            self._allowed -= len(data)
            if self._allowed < 0:
                self._census.tell_talker(self._address)
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
        self._inner.data_received(data)

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


def vouch(transport: asyncio.BaseTransport | None) -> None:
    """Say that whoever made a connection has shown who it is. None is a connection that ended."""
    protocol = transport.get_protocol() if transport is not None else None
    if isinstance(protocol, GuardedConnection):
        protocol.vouch()
