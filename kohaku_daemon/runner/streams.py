"""Data streams that the host orders: dials it back for each, and sends a launch's output.

Knows: the data connection, how many there may be at once, that a reader who stalls holds
back only its own stream.
Does not know: where output is kept (``logs``), who asked for it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Final

import aiohttp
import msgspec

from kohaku_daemon.runner.logs import TaskLogs
from kohaku_daemon.runner.loop import NodeLoop
from kohaku_daemon.runner.reasons import about
from kohaku_daemon.supervise import spawn
from protocol.connection import parse_url
from protocol.errors import Internal, KohakuError, Unavailable
from protocol.framing import MAX_DATA_MESSAGE
from protocol.messages.runner import OrderStream
from protocol.messages.stream import LogEnd, LogItem, OpenLogs

_log = logging.getLogger(__name__)

PATH: Final = "/v1/runner/stream/"
_STREAMS_AT_ONCE: Final = 64
_DIAL_S: Final = 10.0
#: Seconds a reader may take nothing: somebody may have stopped their terminal for a while.
_STALLED_S: Final = 600.0
_CLOSE_S: Final = aiohttp.ClientWSTimeout(ws_close=2.0)

_encode: Final = msgspec.msgpack.Encoder().encode


class LogStreams:
    """Serves the output of launches."""

    def __init__(
        self,
        host: str,
        credential: Callable[[], str],
        logs: TaskLogs,
        loop: NodeLoop,
        node: str = "",
    ) -> None:
        """``credential`` is asked for each stream: it changes when the runner joins anew."""
        self._url = parse_url(host) + PATH
        self._credential = credential
        self._logs = logs
        self._loop = loop
        self._node = node
        self._open = 0

    async def serve(self, order: OrderStream) -> None:
        """Serve one stream until its end, or until its reader has gone. Raises nothing."""
        key = f"{order.logs.task}-{order.attempt}"
        self._open += 1
        try:
            async with self._dial(order.stream) as socket, _while_read(socket):
                await self._send(socket, key, order.logs)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            # Whoever reads has gone, or will go on in a new stream where this one broke.
            _log.debug("a stream broke off: %r", error, extra=about(key, self._node))
        except Exception as bug:
            _log.error("a stream failed", exc_info=bug, extra=about(key, self._node))
        finally:
            self._open -= 1

    @asynccontextmanager
    async def _dial(self, stream: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse[bool]]:
        headers = {"Authorization": f"Bearer {self._credential()}"}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            async with asyncio.timeout(_DIAL_S):
                socket = await http.ws_connect(
                    self._url + stream,
                    headers=headers,
                    timeout=_CLOSE_S,
                    compress=0,
                    max_msg_size=MAX_DATA_MESSAGE,
                )
            try:
                yield socket
            finally:
                await socket.close()

    async def _send(
        self, socket: aiohttp.ClientWebSocketResponse[bool], key: str, wanted: OpenLogs
    ) -> None:
        async with aclosing(self._items(key, wanted)) as items:
            async for item in items:
                async with asyncio.timeout(_STALLED_S):
                    await socket.send_bytes(_encode(item))

    async def _items(self, key: str, wanted: OpenLogs) -> AsyncGenerator[LogItem, None]:
        """Give the output, and in any case a LogEnd."""
        try:
            if self._open > _STREAMS_AT_ONCE:
                raise Unavailable(f"{_STREAMS_AT_ONCE} outputs are being read from this node")
            async with aclosing(self._read(key, wanted)) as items:
                async for item in items:
                    yield item
        except KohakuError as error:
            yield LogEnd(0, 0, error=(error.code, error.message))
        except Exception as bug:
            incident = secrets.token_hex(4)
            fields = about(key, self._node)
            _log.error("cannot read output, incident %s", incident, exc_info=bug, extra=fields)
            message = f"reading the output failed on its node, incident {incident}"
            yield LogEnd(0, 0, error=(Internal.code, message))

    async def _read(self, key: str, wanted: OpenLogs) -> AsyncGenerator[LogItem, None]:
        # Also of one whose order came together with this one, and that waits for its start.
        is_known = self._loop.report(key) is not None
        output = self._logs.read(key, wanted, lambda: self._loop.is_live(key), is_known=is_known)
        async with aclosing(output) as items:
            async for item in items:
                yield item


@asynccontextmanager
async def _while_read(socket: aiohttp.ClientWebSocketResponse[bool]) -> AsyncIterator[None]:
    """End the block with TimeoutError when the reader goes: that is only seen by reading."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as scope:

        def gone(_: asyncio.Task[None]) -> None:
            scope.reschedule(loop.time())

        reading = spawn(_read_out(socket), name="reader of a stream")
        reading.add_done_callback(gone)
        try:
            yield
        finally:
            reading.remove_done_callback(gone)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _read_out(socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
    async for _ in socket:
        pass  # a reader sends nothing but its close
