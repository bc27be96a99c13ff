"""Data connections: tickets for clients, and joining a client's connection to a runner's.

Knows: that bytes flow from one WebSocket to the other no faster than the reader takes them;
each message waits for the socket, so a reader that stalls holds back its own runner's stream
and nothing else.
Does not know: what flows. Runners may sit behind a NAT, so the runner dials back for each
stream: the order to do so goes over its link. A reader that stalls for longer than a ping may
stay unanswered is cut off, and its runner with it; it goes on from the last byte it had.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import msgspec
from aiohttp import WSMsgType, web

from kohaku_daemon.clock import Clock
from kohaku_daemon.core.access.tokens import token_digest
from kohaku_daemon.core.cluster.records import TaskRecord
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.host.guard import vouch
from kohaku_daemon.host.links import Links
from kohaku_daemon.host.loop import HostLoop
from kohaku_daemon.host.waiting import WaitingRoom
from kohaku_daemon.store.tasks import TaskStore
from kohaku_daemon.supervise import spawn
from protocol.errors import KohakuError, Unauthenticated, Unavailable
from protocol.framing import MAX_DATA_MESSAGE
from protocol.ids import NodeName, TaskId, UserName
from protocol.messages.runner import OrderStream
from protocol.messages.stream import LogEnd, OpenLogs, Ticket
from protocol.models.task import TaskState
from protocol.session import CloseCode

_log = logging.getLogger(__name__)

#: Long enough for one round trip on a bad line; a ticket that is not used at once is not used.
_TICKET_S: Final = 60.0
#: Tickets that may wait to be used; more are refused.
_MOST_TICKETS: Final = 10_000
#: Tickets of one user that wait to be used, so that nobody uses up those of all.
_MOST_OF_ONE: Final = 1_000
#: A runner that is there dials back at once.
_DIAL_BACK_S: Final = 15.0
_PING_S: Final = 20.0

_encode: Final = msgspec.msgpack.Encoder().encode


@dataclass(slots=True, eq=False)
class _Stream:
    """A stream that waits for its runner to dial back."""

    node: NodeName
    arrived: asyncio.Future[web.WebSocketResponse]
    #: Set when the client's side is done with the runner's connection.
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class Relay:
    """All tickets and streams."""

    def __init__(
        self,
        state: ClusterState,
        store: TaskStore,
        links: Links,
        waiting: WaitingRoom,
        clock: Clock,
        loop: HostLoop,
    ) -> None:
        self._state = state
        self._store = store
        self._links = links
        self._waiting = waiting
        self._clock = clock
        self._loop = loop
        #: By digest: what may be read, until when, and whose it is.
        self._tickets: dict[str, tuple[OpenLogs, float, UserName]] = {}
        self._streams: dict[str, _Stream] = {}
        self._open: set[web.WebSocketResponse] = set()

    def ticket(self, logs: OpenLogs, user: UserName) -> Ticket:
        """Make a ticket to read logs; whoever gets it has been let in already.

        Raises:
            Unavailable: Too many tickets wait to be used.
        """
        now = self._clock.now()
        self._tickets = {key: kept for key, kept in self._tickets.items() if kept[1] > now}
        own = sum(kept[2] == user for kept in self._tickets.values())
        if own >= _MOST_OF_ONE or len(self._tickets) >= _MOST_TICKETS:
            raise Unavailable("too many data connections are being opened", hint="try again")
        text = secrets.token_hex(32)
        self._tickets[token_digest(text)] = (logs, now + _TICKET_S, user)
        return Ticket(text, "/v1/stream/logs", now + _TICKET_S)

    async def serve_client(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/stream/logs``: one ticket, one stream.

        Raises:
            Unauthenticated: The ticket is unknown, used, or too old.
        """
        logs = self._punch(request.headers.get("Authorization", ""))
        vouch(request.transport)
        # Pings are answered in ``_read_out``: aiohttp would answer any number of them at once.
        async with self._accept(request, autoping=False) as socket:
            await self._serve_logs(socket, logs)
        return socket

    async def _serve_logs(self, socket: web.WebSocketResponse, logs: OpenLogs) -> None:
        # The client sends nothing but its close, and that is only noticed by reading.
        reading = spawn(_read_out(socket), name="read a client's data connection")
        working = spawn(self._send_logs(socket, logs), name=f"logs of task {logs.task}")
        try:
            await asyncio.wait({reading, working}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for job in (reading, working):
                job.cancel()
            await asyncio.gather(reading, working, return_exceptions=True)

    async def serve_runner(self, request: web.Request, node: NodeName) -> web.StreamResponse:
        """Answer ``GET /v1/runner/stream/ID``: a runner that dials back as it was ordered to.

        Raises:
            HTTPException: Nobody waits for that stream, or not for this runner.
        """
        number = request.match_info["stream"]
        stream = self._streams.get(number)
        if stream is None or stream.node != node:
            raise web.HTTPNotFound(text="nobody waits for this stream\n")
        del self._streams[number]
        async with self._accept(request) as socket:
            if not stream.arrived.done():  # else the client went away during the handshake
                stream.arrived.set_result(socket)
                await stream.finished.wait()
        return socket

    async def close(self) -> None:
        """Let go of all data connections, as the host stops; readers go on later."""
        closing = [socket.close(code=CloseCode.GOING_AWAY) for socket in self._open]
        await asyncio.gather(*closing)

    @asynccontextmanager
    async def _accept(
        self, request: web.Request, *, autoping: bool = True
    ) -> AsyncIterator[web.WebSocketResponse]:
        socket = web.WebSocketResponse(
            compress=False,
            max_msg_size=MAX_DATA_MESSAGE + 1,
            heartbeat=_PING_S,
            timeout=1.0,
            autoping=autoping,
        )
        await socket.prepare(request)
        self._open.add(socket)
        try:
            yield socket
        finally:
            self._open.discard(socket)
            await socket.close()

    def _punch(self, header: str) -> OpenLogs:
        scheme, _, text = header.partition(" ")
        known = None
        if scheme.lower() == "ticket" and text.isascii():  # digests are of text that is Unicode
            known = self._tickets.pop(token_digest(text.strip()), None)
        if known is None or known[1] <= self._clock.now():
            raise Unauthenticated(
                "the ticket is unknown, used or too old", hint="ask for a new one: task.logs"
            )
        return known[0]

    async def _send_logs(self, socket: web.WebSocketResponse, logs: OpenLogs) -> None:
        try:
            record = await self._begun(logs)
            if record is None or not record.attempt:
                await socket.send_bytes(_encode(LogEnd(0, 0)))  # it never ran: no output
            else:
                attempt = logs.attempt or record.attempt
                await self._relay(socket, _node_of(record, attempt), attempt, logs)
        except KohakuError as error:
            await socket.send_bytes(_encode(LogEnd(0, 0, 0, (error.code, error.message))))
        except ConnectionError as error:
            _log.debug("a reader of logs went away: %s", error)

    async def _begun(self, logs: OpenLogs) -> TaskRecord | None:
        """Give the task; if its output is to be followed, once there is that attempt, or once
        the task has a node or is over.
        """
        while True:
            live = self._state.tasks.get(logs.task)
            if live is None or not logs.follow or _is_made(live, logs.attempt):
                # Memory is ahead of what was ordered: the order to launch must go out first.
                await self._loop.settled()
                return live or self._store.task(logs.task)
            await self._waiting.wait_begun(logs.task)

    async def _relay(
        self, socket: web.WebSocketResponse, node: NodeName, attempt: int, logs: OpenLogs
    ) -> None:
        link = self._links.get(node)
        if link is None:
            raise Unavailable(
                f"node {node} is away, and the output of task {logs.task} is there",
                hint="try again when it is back; see: kohaku node show " + node,
            )
        stream = _Stream(node, asyncio.get_running_loop().create_future())
        number = secrets.token_hex(16)
        self._streams[number] = stream
        try:
            link.put(OrderStream(stream=number, attempt=attempt, logs=logs))
            source = await self._dialled_back(stream, logs.task)
            async for message in source:
                if message.type is not WSMsgType.BINARY:
                    break
                await socket.send_bytes(message.data)
        finally:
            self._streams.pop(number, None)
            stream.finished.set()

    async def _dialled_back(self, stream: _Stream, task: TaskId) -> web.WebSocketResponse:
        try:
            async with asyncio.timeout(_DIAL_BACK_S):
                return await stream.arrived
        except TimeoutError:
            raise Unavailable(
                f"node {stream.node} did not open the stream for the output of task {task}",
                hint="look at its runner's log",
            ) from None


def _is_made(task: TaskRecord, attempt: int | None) -> bool:
    """Say whether an attempt is there to be read; without a number the present or the next."""
    if attempt is not None and attempt <= task.attempt:
        return True  # though the task may be queued again, for another one
    return task.state is not TaskState.QUEUED


def _node_of(task: TaskRecord, attempt: int) -> NodeName:
    """Give the node an attempt was on: history has those of earlier ones."""
    nodes = (change.node for change in task.history if change.attempt == attempt and change.node)
    return NodeName(next(nodes, task.node))


async def _read_out(socket: web.WebSocketResponse) -> None:
    """Read until the client closes, or says what is not for it to say."""
    async for message in socket:
        if message.type is WSMsgType.PING:
            await socket.pong(message.data)
        elif message.type is not WSMsgType.PONG:
            return
        await asyncio.sleep(0)
