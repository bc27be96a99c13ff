"""A host for tests of the runner: the real wire on loopback, and a mind of its own.

It can lose its answer to a join, hold back its answers to reports, cut every link, go away
and come back on the same port. What runners said is kept in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import web

from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.wire import ItemSink, Served
from protocol.client import decode_log
from protocol.errors import Conflict, Unauthenticated
from protocol.ids import NodeName, UserName
from protocol.messages.hello import Hello, Welcome
from protocol.messages.runner import (
    AttemptReport,
    AttemptState,
    HeartbeatTaken,
    Join,
    Joined,
    Order,
    Orders,
    Register,
    Registered,
    Report,
    Reported,
)
from protocol.messages.stream import LogItem
from protocol.methods import Door, Method, StreamingMethod
from protocol.models.access import Role
from protocol.models.node import Readings
from protocol.version import PROTOCOL_VERSION

JOIN_TOKEN = "khj_" + "1" * 64


class FakeHost:
    """Everything a runner sees of a host."""

    def __init__(self) -> None:
        self.port = 0
        #: Join tokens that may still be used.
        self.tokens = {JOIN_TOKEN}
        #: Name of the node of each credential.
        self.nodes: dict[str, str] = {}
        self.hellos: list[str] = []
        self.joins: list[Join] = []
        self.registers: list[Register] = []
        self.reports: list[AttemptReport] = []
        self.beats: list[Readings] = []
        self.streams: dict[str, list[LogItem]] = {}
        self.stream_tokens: list[str] = []
        self.ended_streams: set[str] = set()
        #: Streams that are opened and not read.
        self.stalled_streams: set[str] = set()
        self._stream_sockets: dict[str, web.WebSocketResponse] = {}
        #: Whether runners are refused as second ones of a node, and how often that was so.
        self.refuses = False
        self.refusals = 0
        #: Let the next join be taken and its answer be lost.
        self.loses_join_answer = False
        #: Cleared: reports are taken and not answered.
        self.answers_reports = asyncio.Event()
        self.answers_reports.set()
        self._orders: asyncio.Queue[tuple[Order, ...]] = asyncio.Queue()
        self._links: set[Served] = set()
        self._transports: set[asyncio.Transport] = set()
        self._runner: web.AppRunner | None = None

    # What tests do ------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def links(self) -> int:
        return len(self._links)

    def state(self, task: int, attempt: int = 1) -> AttemptState | None:
        """Give what was last said of an attempt, in a register or a report."""
        said = [
            report for report in self.reports if (report.task, report.attempt) == (task, attempt)
        ]
        return said[-1].state if said else None

    def has_ended(self, task: int) -> bool:
        """Say whether the end of a task was ever told."""
        return any(
            report.task == task and report.state is AttemptState.ENDED for report in self.reports
        )

    def order(self, *orders: Order) -> None:
        self._orders.put_nowait(orders)

    async def arrive(self) -> None:
        """Listen; on the same port as before, if there was one."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/runner", self._serve_link),
                web.get("/v1/runner/stream/{stream}", self._serve_stream),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def leave(self) -> None:
        """Vanish, with every link."""
        self.cut()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def cut(self) -> None:
        """Break every connection without a word."""
        for transport in self._transports:
            transport.abort()

    async def close_stream(self, name: str) -> None:
        await self._stream_sockets[name].close()

    def remove_nodes(self) -> None:
        self.nodes.clear()
        self.cut()

    # What runners see ---------------------------------------------------------------

    async def _serve_link(self, request: web.Request) -> web.StreamResponse:
        served = Served(request, self, door=Door.RUNNER)
        transport = request.transport
        assert transport is not None
        self._transports.add(transport)
        self._links.add(served)
        try:
            return await served.run()
        finally:
            self._links.discard(served)
            self._transports.discard(transport)

    async def _serve_stream(self, request: web.Request) -> web.StreamResponse:
        token = request.headers["Authorization"].removeprefix("Bearer ")
        if token not in self.nodes:
            raise web.HTTPUnauthorized
        self.stream_tokens.append(token)
        name = request.match_info["stream"]
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        transport = request.transport
        assert transport is not None
        self._transports.add(transport)
        self._stream_sockets[name] = socket
        items = self.streams.setdefault(name, [])
        try:
            if name in self.stalled_streams:
                await asyncio.Event().wait()
            async for message in socket:
                items.append(decode_log(message.data))
        finally:
            self._transports.discard(transport)
            self.ended_streams.add(name)
        return socket

    async def hello(self, served: Served, params: Hello) -> Welcome:
        self.hellos.append(params.token)
        if params.token and params.token not in self.nodes:
            raise Unauthenticated("this runner's credential is not known here")
        served.actor = Actor(UserName(self.nodes.get(params.token, "")), Role.ANONY)
        return Welcome(PROTOCOL_VERSION, "1", Role.ANONY)

    async def call(
        self, served: Served, method: Method[Any, Any], params: msgspec.Struct
    ) -> msgspec.Struct:
        match params:
            case Join():
                return self._join(served, params)
            case Register() if self.refuses:
                self.refusals += 1
                raise Conflict(f"node {params.node} is connected already")
            case Register():
                self.registers.append(params)
                self.reports += params.attempts
                return Registered(NodeName(params.node), heartbeat_s=0.05)
            case Report(reports):
                self.reports += reports
                await self.answers_reports.wait()
                return Reported()
            case Readings():
                self.beats.append(params)
                return HeartbeatTaken()
            case _:
                raise AssertionError(f"a runner should not call {method.name}")

    async def stream(
        self,
        served: Served,
        method: StreamingMethod[Any, Any, Any],
        params: msgspec.Struct,
        sink: ItemSink,
    ) -> msgspec.Struct:
        while True:
            await sink.ready()
            await sink.send(Orders(await self._orders.get()))

    def _join(self, served: Served, params: Join) -> Joined:
        self.joins.append(params)
        known = self.nodes.get(params.credential) == params.node
        if not known:
            if params.node in self.nodes.values():
                raise Conflict(f"a node called {params.node} is in the cluster already")
            if params.token not in self.tokens:
                raise Unauthenticated("the join token is unknown or used up")
            self.tokens.discard(params.token)
            self.nodes[params.credential] = params.node
        if self.loses_join_answer:
            self.loses_join_answer = False
            self.cut()
        return Joined(NodeName(params.node), "1")


def said(reports: Iterable[AttemptReport]) -> list[tuple[int, str]]:
    """Give reports in short."""
    return [(report.task, report.state.value) for report in reports]
