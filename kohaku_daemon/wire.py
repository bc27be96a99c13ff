"""The accepting side of a control connection: an aiohttp request in, calls to a responder out.

Knows: handshake, limits, one job for each call and its time on the event loop, exactly one
reply for each call, what of an error may be told.
Does not know: what methods do, who may call them. A ``Responder`` does.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from functools import partial
from struct import Struct
from time import perf_counter
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from kohaku_daemon.loop_time import Account, LoopTime, Purse
from protocol.carrier import Carrier
from protocol.errors import BadRequest, Internal, KohakuError, TooLarge, Unavailable
from protocol.framing import MAX_MESSAGE, decode_value
from protocol.messages.hello import Hello, Welcome
from protocol.methods import HELLO, METHODS, Door, Method, StreamingMethod
from protocol.session import (
    HELLO_TIMEOUT_S,
    KEEP_ALIVE_S,
    Called,
    CancelAsked,
    CloseCode,
    CreditCame,
    Session,
    SessionEvent,
)

_log = logging.getLogger(__name__)

_SMALL_FRAME: Final = Struct("!BB").pack
_MIDDLING_FRAME: Final = Struct("!BBH").pack
_LARGE_FRAME: Final = Struct("!BBQ").pack

#: Seconds that handlers have to clean up when their connection is closed.
_CLEAN_UP_S: Final = 5.0


class ItemSink:
    """Where a streaming handler puts its items. Holds it back as the peer asks."""

    def __init__(self, served: Served, number: int) -> None:
        self._served = served
        self._number = number
        self._more = asyncio.Event()

    @property
    def credit(self) -> int:
        """How many items the peer takes now."""
        return self._served._session.credit_of(self._number)

    @property
    def is_ready(self) -> bool:
        """Whether one item, made now, could be sent at once."""
        return self.credit > 0 and self._served._carrier.has_room

    async def ready(self) -> None:
        """Wait until one item, made now, could be sent at once."""
        while not self.is_ready:
            if self.credit == 0:
                self._more.clear()
                await self._more.wait()
            else:
                await self._served._carrier.wait_room()

    async def send(self, item: msgspec.Struct | msgspec.Raw) -> None:
        """Send one item, written already or not, as soon as the peer takes one.

        Raises:
            TooLarge: The item does not fit a message; the stream goes on without it.
        """
        await self.ready()
        self.send_now(item)

    def send_now(self, item: msgspec.Struct | msgspec.Raw) -> None:
        """Send one item while ``is_ready``.

        Raises:
            TooLarge: The item does not fit a message; the stream goes on without it.
        """
        self._served._session.send_item(self._number, item)
        self._served._carrier.flush()

    def _wake(self) -> None:
        self._more.set()


class Responder(Protocol):
    """What answers. Raise a KohakuError to refuse; anything else is a bug of ours."""

    async def hello(self, served: Served, params: Hello) -> Welcome:
        """Let the peer in, or refuse. May fill ``served.actor``."""

    async def call(
        self, served: Served, method: Method[Any, Any], params: msgspec.Struct
    ) -> msgspec.Struct:
        """Answer a call. Cancelled when the peer cancels or goes."""

    async def stream(
        self,
        served: Served,
        method: StreamingMethod[Any, Any, Any],
        params: msgspec.Struct,
        sink: ItemSink,
    ) -> msgspec.Struct:
        """Put items into the sink and give the result that ends them."""


class Served:
    """One connection that somebody made to us."""

    def __init__(
        self,
        request: web.Request,
        responder: Responder,
        *,
        door: Door = Door.CLIENT,
        keep_alive_s: float = KEEP_ALIVE_S,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        loop_time: LoopTime | None = None,
        account: Account | None = None,
    ) -> None:
        """``loop_time`` is what all connections of a daemon share, ``account`` what this one
        pays from.
        """
        self._request = request
        self._responder = responder
        self._door = door
        self._session = Session(
            "accepting",
            asyncio.get_running_loop().time(),
            keep_alive_s=keep_alive_s,
            hello_timeout_s=hello_timeout_s,
        )
        # aiohttp would answer all pings it has before anybody else has a turn: the carrier does.
        self._socket = web.WebSocketResponse(
            compress=False, max_msg_size=MAX_MESSAGE + 1, timeout=1.0, autoping=False
        )
        self._carrier = Carrier(
            self._socket,
            self._session,
            self._take,
            holds_back=True,
            abort=self._abort,
            # In the lane of the calls: what was read is answered before more is.
            in_steps=lambda reading: self._loop_time.run(reading, self._account, self),
            is_eager=lambda: self.purse.is_empty(perf_counter()),
            send_now=self._send_now,
        )
        self._jobs: dict[int, asyncio.Task[None]] = {}
        self._sinks: dict[int, ItemSink] = {}
        #: What has come is being handed on, after which all that is said then is sent.
        self._is_taking = False
        self._loop_time = loop_time or LoopTime()
        self._account = account or Account()
        #: Address of the peer, as seen by the kernel.
        self.address: str = request.remote or ""
        #: Who calls; a free slot for the responder, which fills it when it answers hello.
        self.actor: object | None = None
        #: Asked before a call's parameters are looked at; raises to refuse the call. None is a
        #: method that is not there: whom it is told is for the responder to say. Another slot
        #: that the responder fills when it answers hello.
        self.admit: Callable[[Method[Any, Any] | None], None] = lambda _: None
        #: Asked whether it takes a call that needs no job of its own; raises to refuse the call.
        #: Whoever takes it calls the function it is given with the answer, at once or later, and
        #: is not told if the peer wants no more of it. A third such slot.
        self.take: Callable[[msgspec.Struct, Callable[[msgspec.Struct], None]], bool] = _take_none

    def __repr__(self) -> str:
        return f"<Served {self._door} {self.address} {self._session!r}>"

    @property
    def purse(self) -> Purse:
        """What pays for all that comes of this connection: for the responder to say whose."""
        return self._account.purse

    @purse.setter
    def purse(self, purse: Purse) -> None:
        self._account.purse = purse

    @property
    def transport(self) -> asyncio.BaseTransport | None:
        """The socket below; None once the connection is lost."""
        return self._request.transport

    async def run(self) -> web.StreamResponse:
        """Serve until the connection closes; give what an aiohttp handler returns.

        Raises:
            HTTPException: The request is no WebSocket upgrade, or comes from a foreign web page.
        """
        refuse_foreign_origin(self._request)
        await self._socket.prepare(self._request)
        try:
            ended = await self._carrier.run()
            _log.debug("connection closed: %s", ended, extra={"address": self.address})
        finally:
            await self._end_jobs()
            if (error := self._socket.exception()) is not None:
                # They hold frames that hold the socket, which holds it.
                error.__traceback__ = error.__context__ = None
        return self._socket

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Close the connection; ``run`` returns soon after."""
        self._session.end(code, reason)
        self._carrier.flush()

    def _abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    def _send_now(self, messages: list[bytes]) -> bool:
        """Send messages in one go, if all that was sent before has left.

        aiohttp makes a system call of each, and may wait after it. A server's frames are a
        header and the message (RFC 6455 section 5.2: not masked, FIN and opcode 2).
        """
        transport = self._request.transport
        if transport is None or transport.is_closing() or self._socket.closed:
            return False
        if transport.get_write_buffer_size() > 0:
            return False
        transport.write(b"".join([_frame_header(len(data)) + data for data in messages]))
        return True

    # -- What comes in ----------------------------------------------------------------

    def _take(self, event: SessionEvent) -> None:
        match event:
            case Called():
                self._take_call(event)
            case CreditCame(id=number):
                if (sink := self._sinks.get(number)) is not None:
                    sink._wake()
            case CancelAsked(id=number):
                if (job := self._jobs.get(number)) is not None:
                    job.cancel()
            case _:
                pass  # notifies nobody here knows; we call nobody, so nobody answers us

    def _take_call(self, called: Called) -> None:
        number = called.id
        try:
            work = self._begin(called)
        except KohakuError as error:
            self._session.fail(number, error)
            return
        except Exception as reason:
            self._session.fail(number, self._explain(reason, called.method))
            return
        if work is None:
            return
        response = self._respond(number, called.method, work)
        steps = self._loop_time.run(response, self._account, self)
        job = asyncio.get_running_loop().create_task(steps, name=called.method)
        self._jobs[number] = job
        job.add_done_callback(partial(self._answer, number, called.method))
        job.add_done_callback(partial(_close, response, work))

    def _begin(self, called: Called) -> Coroutine[Any, Any, Any] | None:
        """Give the coroutine that answers a call, if it was not taken without."""
        method = METHODS.get(called.method)
        if method is not None and method.door not in (self._door, Door.BOTH):
            method = None
        if method is not HELLO:
            self.admit(method)
        if method is None:
            raise _unknown_method(called.method, self._door)
        params = decode_value(called.params, method.params, method.name)
        if method is HELLO:
            return self._greet(params)
        if isinstance(method, StreamingMethod):
            sink = self._sinks[called.id] = ItemSink(self, called.id)
            return self._responder.stream(self, method, params, sink)
        # Whose purse is empty has a job, which waits for its turn.
        if not self.purse.is_empty(perf_counter()) and self._is_taken(called.id, method, params):
            return None
        return self._responder.call(self, method, params)

    def _is_taken(self, number: int, method: Method[Any, Any], params: msgspec.Struct) -> bool:
        self._is_taking = True
        try:
            return self.take(params, partial(self._answer_taken, number, method.name))
        finally:
            self._is_taking = False

    async def _greet(self, params: Hello) -> Welcome:
        if self._session.is_open:
            raise BadRequest("hello was said already on this connection")
        welcome = await self._responder.hello(self, params)
        self._session.set_keep_alive(welcome.keep_alive_s)
        return welcome

    # -- What goes out ----------------------------------------------------------------

    async def _respond(
        self, number: int, method: str, work: Coroutine[Any, Any, msgspec.Struct]
    ) -> None:
        """Work and answer in one: the answer may be large, and to encode it is work too."""
        result = await work
        self._forget(number)
        self._reply(number, method, result)

    def _answer(self, number: int, method: str, job: asyncio.Task[None]) -> None:
        """Give the one reply that is owed, if the job ended without, and have it sent."""
        if job.cancelled():
            self._forget(number)
            self._session.fail(number, Unavailable(f"{method} was cancelled"))
        elif (reason := job.exception()) is not None:
            self._forget(number)
            self._session.fail(number, self._explain(reason, method))
        self._carrier.flush()

    def _answer_taken(self, number: int, method: str, result: msgspec.Struct) -> None:
        """Answer a call that has no job. At once if that is while it is taken; else it is what
        comes last of a commit.
        """
        self._reply(number, method, result)
        if not self._is_taking:
            self._carrier.flush_now()

    def _forget(self, number: int) -> None:
        del self._jobs[number]
        self._sinks.pop(number, None)

    def _reply(self, number: int, method: str, result: msgspec.Struct) -> None:
        try:
            self._session.reply(number, result)
        except TooLarge as error:
            _log.warning("the answer to %s is too large to send", method)
            self._session.fail(number, error)
        except Exception as reason:  # a result of ours that cannot be encoded is a bug of ours
            self._session.fail(number, self._explain(reason, method))

    def _explain(self, reason: BaseException, method: str) -> KohakuError:
        if isinstance(reason, KohakuError):
            return reason
        incident = secrets.token_hex(4)
        _log.error(
            "%s failed, incident %s",
            method,
            incident,
            exc_info=reason,
            extra={"address": self.address},
        )
        return Internal(
            f"{method} failed on the host, incident {incident}",
            hint="the host's log tells more under this incident",
        )

    async def _end_jobs(self) -> None:
        jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        if jobs:
            _, stuck = await asyncio.wait(jobs, timeout=_CLEAN_UP_S)
            for job in stuck:
                _log.error("%s does not end though its connection is closed", job.get_name())


def _close(*work: Any) -> None:
    """Close coroutines of a job that was cancelled before it began them; all others are over."""
    for coroutine in work[:-1]:
        coroutine.close()


def _take_none(params: msgspec.Struct, answer: Callable[[msgspec.Struct], None]) -> bool:
    return False


def _frame_header(size: int) -> bytes:
    if size < 126:
        return _SMALL_FRAME(0x82, size)
    if size < 2**16:
        return _MIDDLING_FRAME(0x82, 126, size)
    return _LARGE_FRAME(0x82, 127, size)


def refuse_foreign_origin(request: web.Request) -> None:
    """Refuse web pages of other sites: a browser would lend them its place in the network.

    Programs send no Origin (RFC 6455 section 10.2; CWE-1385).

    Raises:
        HTTPForbidden: It has an Origin that is not the host's own.
    """
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.host:
        raise web.HTTPForbidden(text="this page may not talk to this host\n")


def _unknown_method(name: str, door: Door) -> BadRequest:
    # Loaded for this error only.
    from difflib import get_close_matches

    known = [entry.name for entry in METHODS.values() if entry.door in (door, Door.BOTH)]
    near = get_close_matches(name, known, 1)
    return BadRequest(
        f"there is no method {name!r}",
        hint=f"did you mean {near[0]}?" if near else "the list is in protocol/SPEC.md",
    )
