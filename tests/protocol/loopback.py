"""A host of a few lines on a loopback port: real sockets, scripted answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from kohaku_daemon.wire import ItemSink, Served
from protocol.errors import NotFound, Unauthenticated
from protocol.messages.hello import Hello, Welcome
from protocol.methods import Method, StreamingMethod
from protocol.models.access import Role

TOKEN = "kht_right"

Answer = Callable[[Any], Awaitable[msgspec.Struct]]
Stream = Callable[[Any, ItemSink], Awaitable[msgspec.Struct]]
Data = Callable[[web.WebSocketResponse], Awaitable[None]]


class ScriptedHost:
    """Answers what its test told it to, and remembers what was asked."""

    def __init__(self, **options: Any) -> None:
        self.answers: dict[str, Answer | Stream] = {}
        #: What a data connection with a ticket does.
        self.data: dict[str, Data] = {}
        self.asked: list[tuple[str, msgspec.Struct]] = []
        self.cancelled: list[str] = []
        self.open: list[Served] = []
        self.cluster = "77"
        self.keep_alive_s = 20.0
        self.changed = asyncio.Condition()
        self._options = options
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/ws", self._serve)
        app.router.add_get("/data", self._serve_data)
        self._runner = web.AppRunner(app, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Go away, as a host that is restarted does."""
        for served in list(self.open):
            await served.close(1001, "stopping")
        if self._runner is not None:
            await self._runner.cleanup()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something asked, cancelled or opened makes the condition true."""
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(condition)

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.asked)

    async def hello(self, served: Served, params: Hello) -> Welcome:
        if params.token != TOKEN:
            raise Unauthenticated("this token is not known here")
        return Welcome(1, self.cluster, Role.ADMIN, keep_alive_s=self.keep_alive_s)

    async def call(
        self, served: Served, method: Method[Any, Any], params: msgspec.Struct
    ) -> msgspec.Struct:
        return await self._answer(method.name, params)

    async def stream(
        self,
        served: Served,
        method: StreamingMethod[Any, Any, Any],
        params: msgspec.Struct,
        sink: ItemSink,
    ) -> msgspec.Struct:
        return await self._answer(method.name, params, sink)

    async def _answer(self, name: str, *args: Any) -> msgspec.Struct:
        await self._tell(lambda: self.asked.append((name, args[0])))
        if name not in self.answers:
            raise NotFound(f"{name} is not scripted")
        try:
            return await self.answers[name](*args)
        except asyncio.CancelledError:
            await self._tell(lambda: self.cancelled.append(name))
            raise

    async def _tell(self, change: Callable[[], None]) -> None:
        async with self.changed:
            change()
            self.changed.notify_all()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        served = Served(request, self, **self._options)
        await self._tell(lambda: self.open.append(served))
        try:
            return await served.run()
        finally:
            await self._tell(lambda: self.open.remove(served))

    async def _serve_data(self, request: web.Request) -> web.StreamResponse:
        data = self.data.get(request.headers["Authorization"].removeprefix("Ticket "))
        if data is None:
            raise web.HTTPUnauthorized
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        await data(socket)
        return socket


@asynccontextmanager
async def scripted_host(**options: Any) -> AsyncIterator[ScriptedHost]:
    """Run one for as long as the block lasts."""
    host = ScriptedHost(**options)
    await host.start()
    try:
        yield host
    finally:
        await host.stop()
