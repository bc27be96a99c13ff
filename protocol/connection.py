"""One connection to a host, over aiohttp: dialling, waiting for answers, streams, data.

Knows: aiohttp's client, addresses, who here waits for which call.
Does not know: reconnecting (``client``), what methods do.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Generic
from urllib.parse import urlsplit

import aiohttp
import msgspec

from protocol.carrier import Carrier
from protocol.errors import (
    BadRequest,
    Forbidden,
    KohakuError,
    NotFound,
    TimedOut,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from protocol.framing import (
    MAX_DATA_MESSAGE,
    MAX_MESSAGE,
    decode_answer,
    pack_value,
    unpack_value,
)
from protocol.messages.hello import Hello, Welcome
from protocol.methods import HELLO, I, Method, P, R, StreamingMethod
from protocol.session import (
    Answered,
    Called,
    CloseCode,
    Ended,
    Failed,
    ItemCame,
    Session,
    SessionEvent,
)
from protocol.version import CAPABILITIES, OLDEST_VERSION, PROTOCOL_VERSION, agree

#: Port of a host whose address names none.
DEFAULT_PORT: Final = 8000
#: Seconds to wait for the close handshake of a peer that may be gone.
_CLOSE_TIMEOUT: Final = aiohttp.ClientWSTimeout(ws_close=1.0)
_SCHEMES: Final = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


def parse_url(text: str) -> str:
    """Read where a host is: ``http://H:P``, ``https://``, ``ws://``, ``wss://``, ``H:P`` or ``H``.

    Gives ``http://…`` or ``https://…`` without path. Without a scheme the port is 8000
    where none is named.

    Raises:
        BadRequest: It names no host.
    """
    bare = "://" not in text
    try:
        parts = urlsplit(f"http://{text}" if bare else text)
        scheme = _SCHEMES[parts.scheme]
        port, host = parts.port, parts.hostname
        if not host or " " in host or not host.isprintable():
            raise ValueError(text)
        if parts.username or parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError(text)
    except (ValueError, KeyError):
        raise BadRequest(
            f"{text!r} is not the address of a host",
            hint="write it as HOST, HOST:PORT, http://HOST:PORT or https://HOST:PORT",
        ) from None
    if bare and port is None:
        port = DEFAULT_PORT
    name = f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}" if port is None else f"{scheme}://{name}:{port}"


class Connection:
    """One WebSocket to a host, from its welcome to its end."""

    #: What the host answered to hello.
    welcome: Welcome

    def __init__(self, url: str, http: aiohttp.ClientSession, socket: Any) -> None:
        """Not for use: ``dial`` makes one."""
        self._url = url
        self._http = http
        self._loop = asyncio.get_running_loop()
        self._session = Session("dialling", self._loop.time())
        self._carrier = Carrier(socket, self._session, self._take, holds_back=False)
        self._answers: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._streams: dict[int, ItemStream[Any, Any]] = {}
        #: Done when the connection has ended; its result says why.
        self.closed: asyncio.Future[Ended] = self._loop.create_future()
        # The loop itself keeps weak references only: this one keeps the job alive.
        self._job = self._loop.create_task(self._carry(), name=f"connection {url}")

    @classmethod
    async def dial(
        cls,
        url: str,
        *,
        token: str = "",
        path: str = "/v1/ws",
        agent: str = "",
        timeout_s: float = 10.0,
    ) -> Connection:
        """Connect and say hello.

        Raises:
            Unavailable: Nobody who speaks this protocol answers there in time.
            Unsupported: The host and this program know no version of the protocol in common.
            KohakuError: The host refused, such as Unauthenticated.
        """
        url = parse_url(url)
        http = _make_http()
        connection = None
        try:
            async with asyncio.timeout(timeout_s):
                socket = await _open_socket(http, url + path, MAX_MESSAGE + 1, {})
                connection = cls(url, http, socket)
                hello = Hello(PROTOCOL_VERSION, token, agent, CAPABILITIES, OLDEST_VERSION)
                connection.welcome = await connection.call(HELLO, hello, timeout_s=timeout_s)
                _check_version(url, connection.welcome)
        except BaseException as reason:
            await (http.close() if connection is None else connection.close())
            if isinstance(reason, TimeoutError | TimedOut):
                raise Unavailable(f"{url} does not answer within {timeout_s:g} s") from None
            raise
        connection._session.set_keep_alive(connection.welcome.keep_alive_s)
        connection._carrier.flush()
        return connection

    def __repr__(self) -> str:
        return f"<Connection {self._url} {self._session!r}>"

    @property
    def url(self) -> str:
        """Where the host is, as ``parse_url`` writes it."""
        return self._url

    @property
    def is_open(self) -> bool:
        """Say whether calls can be made."""
        return self._session.is_open

    async def call(self, method: Method[P, R], params: P, timeout_s: float | None = 30.0) -> R:
        """Call a method and wait for its answer; cancelled there if cancelled here.

        Raises:
            KohakuError: The host refused.
            TimedOut: No answer in time. What was asked may still happen.
            Unavailable: The connection ended before the answer. It may have happened.
        """
        result = await self._ask(method.name, params, timeout_s)
        return decode_answer(result, method.result, method.name)

    async def call_raw(self, name: str, params: Any, timeout_s: float | None = 30.0) -> Any:
        """Call by name with plain values, and give plain values. Raises as ``call``."""
        raw = msgspec.Raw(pack_value(params))
        return unpack_value(bytes(await self._ask(name, raw, timeout_s)))

    @asynccontextmanager
    async def stream(
        self, method: StreamingMethod[P, R, I], params: P, *, window: int = 8
    ) -> AsyncIterator[ItemStream[I, R]]:
        """Call a streaming method; at most ``window`` items wait here. Leaving it cancels."""
        number = self._session.call(
            method.name, params, self._loop.time(), timeout_s=None, credit=window
        )
        stream: ItemStream[I, R] = ItemStream(self, number, method, window)
        self._streams[number] = stream
        self._carrier.flush()
        try:
            yield stream
        finally:
            if self._streams.get(number) is stream:
                del self._streams[number]
                self._session.cancel(number)
                self._carrier.flush()

    async def open_data(self, path: str, ticket: str, *, timeout_s: float = 10.0) -> DataStream:
        """Open a data connection with a ticket.

        Raises:
            Unauthenticated, Forbidden, NotFound: The host does not take the ticket.
            Unavailable: It cannot be reached.
        """
        url = self._url + path
        headers = {"Authorization": f"Ticket {ticket}"}
        http = _make_http()  # of its own, so that the data outlives this connection
        try:
            async with asyncio.timeout(timeout_s):
                socket = await _open_socket(http, url, MAX_DATA_MESSAGE + 1, headers)
        except BaseException as reason:
            await http.close()
            if isinstance(reason, TimeoutError):
                raise Unavailable(f"{url} does not answer within {timeout_s:g} s") from None
            raise
        return DataStream(http, socket, url)

    async def close(self) -> None:
        """Close. Calls without an answer end with Unavailable."""
        self._session.end(CloseCode.NORMAL, "closed here")
        self._carrier.flush()
        await asyncio.shield(self._job)

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        reason: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ask(self, name: str, params: object, timeout_s: float | None) -> msgspec.Raw:
        number = self._session.call(name, params, self._loop.time(), timeout_s=timeout_s)
        answer: asyncio.Future[msgspec.Raw] = self._loop.create_future()
        self._answers[number] = answer
        self._carrier.flush()
        try:
            return await answer
        except asyncio.CancelledError:
            self._session.cancel(number)
            self._carrier.flush()
            raise
        finally:
            if self._answers.get(number) is answer:
                del self._answers[number]

    async def _carry(self) -> None:
        ended = Ended(CloseCode.INTERNAL, "the client failed")
        try:
            ended = await self._carrier.run()
        finally:
            self._lose_all(ended)
            await self._http.close()
            self.closed.set_result(ended)

    def _lose_all(self, ended: Ended) -> None:
        self._session.end(ended.code, ended.reason)
        error = Unavailable(f"the connection to {self._url} ended: {ended.reason}")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        for stream in self._streams.values():
            stream._end(error)
        self._streams.clear()

    def _take(self, event: SessionEvent) -> None:
        match event:
            case Answered(id=number, result=result):
                if number in self._streams:
                    self._streams.pop(number)._finish(result)
                elif not (answer := self._answers[number]).done():
                    answer.set_result(result)
            case Failed(id=number, error=error):
                if number in self._streams:
                    self._streams.pop(number)._end(error)
                elif not (answer := self._answers[number]).done():
                    answer.set_exception(error)
            case ItemCame(id=number, item=item):
                if (stream := self._streams.get(number)) is not None:
                    stream._put(item)
            case Called(id=number, method=method):
                self._session.fail(number, Unsupported(f"a client answers no {method}"))
            case _:
                pass  # notifies nobody here knows; cancels of what was refused at once

    def _grant(self, number: int, n: int) -> None:
        self._session.grant(number, n)
        self._carrier.flush()


class ItemStream(Generic[I, R]):
    """Items of one streaming call, in order. Reading slowly slows the sender."""

    def __init__(
        self,
        connection: Connection,
        number: int,
        method: StreamingMethod[Any, R, I],
        window: int,
    ) -> None:
        self._connection = connection
        self._number = number
        self._method = method
        self._waiting: deque[msgspec.Raw] = deque()
        self._change = asyncio.Event()
        self._taken = 0
        #: Credit goes back in halves of the window, so that not every item costs a message.
        self._group = max(window // 2, 1)
        self._result: msgspec.Raw | None = None
        self._error: KohakuError | None = None

    @property
    def result(self) -> R:
        """What ended the stream, after its last item.

        Raises:
            Unavailable: It has not ended.
        """
        if self._result is None:
            raise Unavailable(f"{self._method.name} has not ended")
        return decode_answer(self._result, self._method.result, self._method.name)

    def __aiter__(self) -> ItemStream[I, R]:
        return self

    async def __anext__(self) -> I:
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self._result is not None:
                raise StopAsyncIteration
            self._change.clear()
            await self._change.wait()
        item = self._waiting.popleft()
        self._taken += 1
        if self._taken >= self._group:
            self._connection._grant(self._number, self._taken)
            self._taken = 0
        return decode_answer(item, self._method.item, self._method.name)

    def _put(self, item: msgspec.Raw) -> None:
        self._waiting.append(item)
        self._change.set()

    def _finish(self, result: msgspec.Raw) -> None:
        self._result = result
        self._change.set()

    def _end(self, error: KohakuError) -> None:
        self._error = error
        self._change.set()


class DataStream:
    """One data connection: binary messages both ways, until either side closes."""

    def __init__(
        self, http: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse[bool], url: str
    ) -> None:
        """Not for use: ``Connection.open_data`` makes one."""
        self._http = http
        self._socket = socket
        self._url = url

    def __repr__(self) -> str:
        return f"<DataStream {self._url}>"

    def __aiter__(self) -> DataStream:
        return self

    async def __anext__(self) -> bytes:
        """Give the next message.

        Raises:
            Unavailable: The connection broke; a clean close ends the iteration.
        """
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            return bytes(message.data)
        if message.type is aiohttp.WSMsgType.CLOSE and message.data == CloseCode.NORMAL:
            raise StopAsyncIteration
        await self._socket.close()
        raise Unavailable(f"the data connection to {self._url} broke")

    async def send(self, data: bytes) -> None:
        """Send one message of at most ``MAX_DATA_MESSAGE`` bytes.

        Raises:
            Unavailable: The connection is closed.
        """
        try:
            await self._socket.send_bytes(data)
        except (OSError, RuntimeError) as reason:
            raise Unavailable(f"the data connection to {self._url} broke: {reason}") from None

    async def close(self) -> None:
        """Close it. Closing again does nothing."""
        try:
            await self._socket.close()
        finally:
            await self._http.close()

    async def __aenter__(self) -> DataStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        reason: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _make_http() -> aiohttp.ClientSession:
    # The default connector lets through 100 sockets and has the next wait for ever.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )


def _check_version(url: str, welcome: Welcome) -> None:
    if agree(welcome.version) is None:
        newer = welcome.version > PROTOCOL_VERSION
        raise Unsupported(
            f"{url} wants to speak version {welcome.version} of the protocol; this program "
            f"speaks {OLDEST_VERSION} to {PROTOCOL_VERSION}",
            hint="upgrade this program" if newer else "upgrade the host first, then the others",
        )


async def _open_socket(
    http: aiohttp.ClientSession, url: str, max_bytes: int, headers: dict[str, str]
) -> aiohttp.ClientWebSocketResponse[bool]:
    try:
        return await http.ws_connect(
            url,
            headers=headers,
            timeout=_CLOSE_TIMEOUT,
            compress=0,
            max_msg_size=max_bytes,
        )
    except aiohttp.WSServerHandshakeError as refusal:
        raise _explain_refusal(refusal, url) from None
    except (aiohttp.ClientError, ssl.SSLError, OSError) as reason:
        raise Unavailable(
            f"cannot connect to {url}: {_render_failure(reason)}",
            hint="is the host running, and is this its address?",
        ) from None


def _explain_refusal(refusal: aiohttp.WSServerHandshakeError, url: str) -> KohakuError:
    said = f"{url} answered {refusal.status}"
    match refusal.status:
        case 401:
            return Unauthenticated(f"{said}: it does not take this ticket or token")
        case 403:
            return Forbidden(said)
        case 404:
            return NotFound(said, hint="is this the address of a KohakuRiver host?")
        case _:
            return Unavailable(said)


def _render_failure(reason: BaseException) -> str:
    inner = getattr(reason, "os_error", None) or reason
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
