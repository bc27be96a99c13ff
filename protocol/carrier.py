"""Carries a session's messages over a WebSocket that is already open, at either end.

Knows: reading, writing in order, the session's timer, closing; how much may wait for a peer
that does not read; that a peer which says much at once waits for everybody else's turn.
Does not know: how the WebSocket came to be, what the events mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from protocol.session import Called, CloseCode, Ended, Session, SessionEvent

#: Bytes that may wait for a peer before whoever streams to it is held back.
ROOM: Final = 256 * 1024
#: Bytes that may wait before the peer is given up.
MOST_UNSENT: Final = 8 * 1024 * 1024
#: Bytes that are sent without waiting whether the peer takes them.
MOST_NOW: Final = 64 * 1024
#: Seconds one batch may take to leave before the peer is given up.
WRITE_TIMEOUT_S: Final = 30.0
#: Messages of one peer that are taken before everything else on the event loop has a turn: a
#: read of 256 KiB may hold 30,000 small ones, and taking them all at once was measured to stop
#: the loop for 150 ms.
TURN: Final = 16
#: Seconds in which messages are taken before it. Some are large.
TURN_S: Final = 0.0003
#: Seconds that last words (the error that answers a refused hello) and the close may take.
FAREWELL_S: Final = 2.0


class Socket(Protocol):
    """What is used of aiohttp's two classes of WebSocket, server's and client's."""

    async def receive(self) -> Any:
        """Give the next message, or one that says the socket is closed."""

    async def send_bytes(self, data: bytes) -> None:
        """Send one binary message; waits while the transport is full."""

    async def pong(self, message: bytes = b"") -> None:
        """Answer a ping of WebSocket, if the socket hands them on; it may do so itself."""

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Close with a code."""

    @property
    def close_code(self) -> int | None:
        """Say with what code it was closed."""


class Carrier:
    """Moves one session's messages until it ends.

    Whoever changes the session calls ``flush`` after it. ``on_event`` is called on the event
    loop for all that comes but the end, and must not block.
    """

    def __init__(
        self,
        socket: Socket,
        session: Session,
        on_event: Callable[[SessionEvent], None],
        *,
        holds_back: bool,
        abort: Callable[[], None] | None = None,
        in_steps: Callable[[Coroutine[Any, Any, None]], Coroutine[Any, Any, None]] | None = None,
        is_eager: Callable[[], bool] | None = None,
        send_now: Callable[[list[bytes]], bool] | None = None,
    ) -> None:
        """``holds_back``: read no more while the peer does not read.

        For the accepting end only: if both held back, both could wait for each other.
        ``abort`` drops the transport at once, with what a peer that does not read left in it.
        ``in_steps`` runs what reads, and may let it wait before each of its steps.
        ``is_eager`` says whether the peer asks for so much that each call is a turn of its own.
        ``send_now`` sends binary messages without waiting, all or none, and says whether it did:
        what is said in one turn of the event loop then leaves together, at the turn's end.
        """
        self._socket = socket
        self._session = session
        self._on_event = on_event
        self._holds_back = holds_back
        self._abort = abort
        self._in_steps = in_steps
        self._is_eager = is_eager or _is_not
        self._send_now = send_now
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[Ended] = self._loop.create_future()
        self._to_write = asyncio.Event()
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        #: Messages are taken from ``_unsent`` at the end of this turn.
        self._is_planned = False
        #: Messages were taken from it and have not left.
        self._is_writing = False
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def has_room(self) -> bool:
        """Say whether so little waits for the peer that more may be sent."""
        return self._room.is_set()

    async def wait_room(self) -> None:
        """Wait until little enough waits for the peer."""
        await self._room.wait()

    def flush(self) -> None:
        """Have sent what the session has to send, and its timer set anew."""
        self._collect()
        if self._unsent and not self._is_planned:
            if self._send_now is None:
                self._to_write.set()
            else:
                self._is_planned = True
                self._loop.call_soon(self._send_planned)

    def flush_now(self) -> None:
        """As ``flush``, for whoever knows that this turn says no more: it need not end first."""
        self._collect()
        if self._unsent:
            self._is_planned = True
            self._send_planned()

    def _collect(self) -> None:
        for data in self._session.data_to_send():
            self._unsent.append(data)
            self._unsent_bytes += len(data)
            self._idle.clear()
        if self._unsent_bytes > ROOM:
            self._room.clear()
            if self._unsent_bytes > MOST_UNSENT:
                self._session.end(CloseCode.SLOW_READER, "the peer reads too slowly")
                self._unsent.clear()
        if self._session.ended is not None:
            self._finish(self._session.ended)
        else:
            self._set_timer()

    async def run(self) -> Ended:
        """Carry until the session ends; give why it did. The WebSocket is closed then."""
        reading = self._read()
        steps = reading if self._in_steps is None else self._in_steps(reading)
        try:
            async with asyncio.TaskGroup() as jobs:
                reader = jobs.create_task(steps, name="carrier.read")
                writer = jobs.create_task(self._write(), name="carrier.write")
                self.flush()
                try:
                    ended = await self._over
                    await self._say_farewell(ended)
                finally:
                    if self._timer is not None:
                        self._timer.cancel()
                    self._room.set()
                    reader.cancel()
                    writer.cancel()
        finally:
            reading.close()  # it may never have begun; else it is over
            self._let_go()
        return ended

    def _let_go(self) -> None:
        """Let go of whoever made us, and holds us.

        What holds itself in a circle is freed by the garbage collector only, which may come
        late to what is large and was there for long: megabytes of what nobody has read.
        """
        self._on_event = _drop
        self._abort = self._in_steps = self._send_now = None
        self._is_eager = _is_not

    async def _read(self) -> None:
        left, busy_s = TURN, 0.0
        while True:
            try:
                message = await self._socket.receive()
                began = self._loop.time()
                events = await self._take(message)
            except (OSError, RuntimeError, TimeoutError) as reason:
                self._break(str(reason) or type(reason).__name__)
                return
            if events is None:
                return
            self._hand_on(events)
            busy_s += self._loop.time() - began
            if self._holds_back and not self._room.is_set():
                # Its own calls make what it does not read: take no more until it does.
                await self._room.wait()
            is_call = bool(events) and isinstance(events[0], Called)  # a message is one at most
            left -= TURN if is_call and self._is_eager() else 1
            if left <= 0 or busy_s > TURN_S:
                # What has arrived already is given out without a wait, however much it is.
                left, busy_s = TURN, 0.0
                await asyncio.sleep(0)

    async def _take(self, message: Any) -> list[SessionEvent] | None:
        """Take one message of the socket; None if it was the last."""
        kind = message.type.name
        if kind == "BINARY":
            return self._session.receive(message.data, self._loop.time())
        if kind == "TEXT":
            return self._session.receive_text()
        if kind == "PING":
            await self._socket.pong(message.data)
            return []
        if kind == "PONG":
            return []
        self._take_close(kind, message)
        return None

    async def _write(self) -> None:
        try:
            await self._write_on()
        except TimeoutError:
            self._session.end(CloseCode.SLOW_READER, "the peer does not read")
            self.flush()
        except (OSError, RuntimeError) as reason:
            self._break(str(reason) or type(reason).__name__)
        finally:
            self._idle.set()  # nobody is left to wait for

    def _send_planned(self) -> None:
        """Send what this turn has said at once, or leave it to who can wait for the peer."""
        if not self._is_planned:
            return  # it has left
        self._is_planned = False
        send_now = None if self._is_writing or self._unsent_bytes > MOST_NOW else self._send_now
        if send_now is None or not send_now(self._unsent):
            self._to_write.set()
            return
        self._unsent.clear()
        self._unsent_bytes = 0
        self._room.set()
        self._idle.set()

    async def _write_on(self) -> None:
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            batch, self._unsent = self._unsent, []
            self._is_writing = True
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                for data in batch:
                    await self._socket.send_bytes(data)
                    self._unsent_bytes -= len(data)
            self._is_writing = False
            if self._unsent_bytes <= ROOM:
                self._room.set()
            if self._unsent_bytes == 0:
                self._idle.set()

    def _hand_on(self, events: list[SessionEvent]) -> None:
        for event in events:
            if not isinstance(event, Ended):
                self._on_event(event)
        self.flush_now()

    def _take_close(self, kind: str, message: Any) -> None:
        code = self._socket.close_code or CloseCode.BROKEN
        if kind == "CLOSE":
            said = message.extra if isinstance(message.extra, str) else ""
            self._session.end(code, said or "closed by the peer")
        elif kind == "ERROR" and code == 1009:
            self._session.end(CloseCode.TOO_LARGE, "a message above the limit")
        else:
            self._session.end(code, "the connection broke")
        self.flush()

    def _break(self, reason: str) -> None:
        self._session.end(CloseCode.BROKEN, f"the connection broke: {reason}")
        self.flush()

    def _finish(self, ended: Ended) -> None:
        self._room.set()
        if not self._over.done():
            self._over.set_result(ended)

    def _set_timer(self) -> None:
        due = self._session.next_deadline()
        if self._timer is not None:
            if self._timer.when() <= due:
                return  # it finds out when it fires: most deadlines only move away
            self._timer.cancel()
            self._timer = None
        if due != float("inf"):
            self._timer = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._hand_on(self._session.tick(self._loop.time()))

    async def _say_farewell(self, ended: Ended) -> None:
        """Write what is left and close, without waiting long for a peer that may be gone."""
        try:
            async with asyncio.timeout(FAREWELL_S):
                if ended.code == CloseCode.SLOW_READER:
                    raise TimeoutError
                await self._idle.wait()
                await self._socket.close(code=_spoken(ended.code), message=_fit(ended.reason))
        except (TimeoutError, OSError, RuntimeError):
            if self._abort is not None:
                self._abort()


def _spoken(code: int) -> int:
    """Give a code that may be sent: 1006 says that none was (RFC 6455 section 7.4.1)."""
    return CloseCode.GOING_AWAY if code == CloseCode.BROKEN else code


def _fit(reason: str) -> bytes:
    """Cut a reason to what a close frame holds: 123 bytes of UTF-8 (RFC 6455 section 5.5)."""
    return reason.encode()[:120].decode("utf-8", "ignore").encode()


def _drop(event: SessionEvent) -> None:
    pass


def _is_not() -> bool:
    return False
