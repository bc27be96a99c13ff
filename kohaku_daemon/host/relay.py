"""Reading logs: joining a client's data connection to a runner's.

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
from dataclasses import dataclass, field
from typing import Final

import msgspec
from aiohttp import WSMsgType, web

from kohaku_daemon.core.cluster.records import TaskRecord
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.host.guard import vouch
from kohaku_daemon.host.links import Links
from kohaku_daemon.host.loop import HostLoop
from kohaku_daemon.host.streams import Streams, next_message
from kohaku_daemon.host.waiting import WaitingRoom
from kohaku_daemon.store.tasks import TaskStore
from kohaku_daemon.supervise import spawn
from protocol.errors import KohakuError, Unavailable
from protocol.ids import NodeName, TaskId, UserName
from protocol.messages.runner import OrderStream
from protocol.messages.stream import LogEnd, OpenLogs, Ticket
from protocol.models.task import TaskState

_log = logging.getLogger(__name__)

_PATH: Final = "/v1/stream/logs"
#: A runner that is there dials back at once.
_DIAL_BACK_S: Final = 15.0

_encode: Final = msgspec.msgpack.Encoder().encode


@dataclass(slots=True, eq=False)
class _Stream:
    """A stream that waits for its runner to dial back."""

    node: NodeName
    arrived: asyncio.Future[web.WebSocketResponse]
    #: Set when the client's side is done with the runner's connection.
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class Relay:
    """All logs that are being read."""

    def __init__(
        self,
        streams: Streams,
        state: ClusterState,
        store: TaskStore,
        links: Links,
        waiting: WaitingRoom,
        loop: HostLoop,
    ) -> None:
        self._client_streams = streams
        self._state = state
        self._store = store
        self._links = links
        self._waiting = waiting
        self._loop = loop
        self._streams: dict[str, _Stream] = {}

    def ticket(self, logs: OpenLogs, user: UserName) -> Ticket:
        """Make a ticket to read logs; whoever gets it has been let in already.

        Raises:
            Unavailable: Too many tickets wait to be used.
        """
        return self._client_streams.ticket(logs, _PATH, user)

    async def serve_client(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/stream/logs``: one ticket, one stream.

        Raises:
            Unauthenticated: The ticket is unknown, used, or too old.
        """
        logs = self._client_streams.punch(request, OpenLogs, "task.logs")
        vouch(request.transport)
        async with self._client_streams.accept(request, autoping=False) as socket:
            await self._serve_logs(socket, logs)
        return socket

    async def _serve_logs(self, socket: web.WebSocketResponse, logs: OpenLogs) -> None:
        # The client sends nothing but its close, and that is only noticed by reading.
        reading = spawn(next_message(socket), name="read a client's data connection")
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
        async with self._client_streams.accept(request) as socket:
            if not stream.arrived.done():  # else the client went away during the handshake
                stream.arrived.set_result(socket)
                await stream.finished.wait()
        return socket

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
