"""Data streams that the host orders: dials it back for each, and sends a launch's output.

Knows: the data connection, how much of it goes on at once, that a reader who stalls holds
back only its own stream.
Does not know: where output is kept (``logs``), who asked for it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Final

import aiohttp
import msgspec

from kohaku_daemon.runner.logs import TaskLogs
from kohaku_daemon.supervise import spawn
from protocol.connection import parse_url
from protocol.errors import Internal, KohakuError, NotFound, Unavailable
from protocol.framing import MAX_DATA_MESSAGE
from protocol.messages.runner import OrderStream
from protocol.messages.stream import LogEnd, LogItem

_log = logging.getLogger(__name__)

PATH: Final = "/v1/runner/stream/"
_STREAMS_AT_ONCE: Final = 64
_DIAL_S: Final = 10.0
#: Seconds a reader may take nothing: somebody may have stopped their terminal for a while.
_STALLED_S: Final = 600.0
_CLOSE_S: Final = aiohttp.ClientWSTimeout(ws_close=2.0)

_encode: Final = msgspec.msgpack.Encoder().encode

_Socket = aiohttp.ClientWebSocketResponse[bool]


class LogStreams:
    """Serves the output of launches."""

    def __init__(
        self,
        host: str,
        credential: Callable[[], str],
        logs: TaskLogs,
        is_live: Callable[[str], bool],
    ) -> None:
        """``is_live`` says whether a launch may still write, given its key."""
        self._url = parse_url(host) + PATH
        self._credential = credential
        self._logs = logs
        self._is_live = is_live
        self._open = 0

    async def serve(self, order: OrderStream) -> None:
        """Serve one stream until it is at its end, or its reader has gone. Raises nothing."""
        key = f"{order.logs.task}-{order.attempt}"
        self._open += 1
        try:
            async with self._dial(order.stream) as socket, _while_there(socket):
                await self._send(socket, key, order)
        except (KohakuError, aiohttp.ClientError, OSError, TimeoutError) as error:
            # Whoever reads has gone, or reads on with a new stream from where this one broke.
            _log.debug("a stream broke off: %s", error, extra={"launch": key})
        except Exception as bug:
            _log.error("a stream failed", exc_info=bug, extra={"launch": key})
        finally:
            self._open -= 1

    @asynccontextmanager
    async def _dial(self, stream: str) -> AsyncIterator[_Socket]:
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

    async def _send(self, socket: _Socket, key: str, order: OrderStream) -> None:
        try:
            async with aclosing(self._items(key, order)) as items:
                async for item in items:
                    await _send_item(socket, item)
        except KohakuError as error:
            await _send_item(socket, LogEnd(0, 0, error=(error.code, error.message)))
        except (aiohttp.ClientError, OSError):
            raise
        except Exception as bug:
            incident = secrets.token_hex(4)
            _log.error("reading output failed, incident %s", incident, exc_info=bug)
            message = f"reading the output failed on its node, incident {incident}"
            await _send_item(socket, LogEnd(0, 0, error=(Internal.code, message)))

    def _items(self, key: str, order: OrderStream) -> AsyncIterator[LogItem]:
        raise NotImplementedError


async def _send_item(socket: _Socket, item: LogItem) -> None:
    async with asyncio.timeout(_STALLED_S):
        await socket.send_bytes(_encode(item))


@asynccontextmanager
async def _while_there(socket: _Socket) -> AsyncIterator[None]:
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


async def _read_out(socket: _Socket) -> None:
    async for _ in socket:
        pass  # the reader sends nothing but its close
