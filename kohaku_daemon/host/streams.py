"""Data connections of clients: the tickets that let them in, and their sockets.

Knows: that a ticket is used once and soon, that a socket is let go of when the host stops.
Does not know: what flows.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import WSMsgType, web

from kohaku_daemon.clock import Clock
from kohaku_daemon.core.access.tokens import token_digest
from protocol.errors import Unauthenticated, Unavailable
from protocol.framing import MAX_DATA_MESSAGE
from protocol.ids import UserName
from protocol.messages.stream import Ticket
from protocol.session import CloseCode

W = TypeVar("W", bound=msgspec.Struct)

#: Long enough for one round trip on a bad line; a ticket that is not used at once is not used.
_TICKET_S: Final = 60.0
#: Tickets that may wait to be used; more are refused.
_MOST_TICKETS: Final = 10_000
#: Tickets of one user that wait to be used, so that nobody uses up those of all.
_MOST_OF_ONE: Final = 1_000
_PING_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class _Leave:
    """What a ticket stands for."""

    wanted: msgspec.Struct
    #: UTC seconds.
    expires_at: float
    user: UserName


class Streams:
    """All tickets, and the sockets of those who came with one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        #: By digest.
        self._tickets: dict[str, _Leave] = {}
        self._open: set[web.WebSocketResponse] = set()

    def ticket(self, wanted: msgspec.Struct, path: str, user: UserName) -> Ticket:
        """Make a ticket for what is wanted; whoever gets it has been let in already.

        Raises:
            Unavailable: Too many tickets wait to be used.
        """
        now = self._clock.now()
        self._tickets = {key: kept for key, kept in self._tickets.items() if kept.expires_at > now}
        own = sum(kept.user == user for kept in self._tickets.values())
        if own >= _MOST_OF_ONE or len(self._tickets) >= _MOST_TICKETS:
            raise Unavailable("too many data connections are being opened", hint="try again")
        text = secrets.token_hex(32)
        self._tickets[token_digest(text)] = _Leave(wanted, now + _TICKET_S, user)
        return Ticket(text, path, now + _TICKET_S)

    def punch(self, request: web.Request, kind: type[W], method: str) -> W:
        """Give what the ticket of a request stands for; from now on it is used.

        Raises:
            Unauthenticated: The ticket is unknown, used, too old, or for another kind.
        """
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        known = None
        if scheme.lower() == "ticket" and text.isascii():  # digests are of text that is Unicode
            known = self._tickets.pop(token_digest(text.strip()), None)
        if (
            known is None
            or known.expires_at <= self._clock.now()
            or not isinstance(known.wanted, kind)
        ):
            raise Unauthenticated(
                "the ticket is unknown, used or too old", hint=f"ask for a new one: {method}"
            )
        return known.wanted

    @asynccontextmanager
    async def accept(
        self, request: web.Request, **options: Any
    ) -> AsyncIterator[web.WebSocketResponse]:
        """Take a connection as a WebSocket, and close it at the end.

        ``options``: of aiohttp's socket, beside what is the same for all.
        """
        socket = web.WebSocketResponse(
            compress=False,
            max_msg_size=MAX_DATA_MESSAGE + 1,
            heartbeat=_PING_S,
            timeout=1.0,
            **options,
        )
        await socket.prepare(request)
        self._open.add(socket)
        try:
            yield socket
        finally:
            self._open.discard(socket)
            await socket.close()

    async def close(self) -> None:
        """Let go of all data connections, as the host stops; readers go on later."""
        closing = [socket.close(code=CloseCode.GOING_AWAY) for socket in self._open]
        await asyncio.gather(*closing)


async def next_message(socket: web.WebSocketResponse) -> bytes | None:
    """Give the client's next message on a socket that answers no pings by itself.

    aiohttp would answer any number of them at once. None if the client has closed, or said what
    is not for it to say.
    """
    async for message in socket:
        # Else a flood that is there already would be read without anybody having a turn.
        await asyncio.sleep(0)
        match message.type:
            case WSMsgType.PING:
                await socket.pong(message.data)
            case WSMsgType.PONG:
                continue
            case WSMsgType.BINARY:
                return bytes(message.data)
            case _:
                return None
    return None
