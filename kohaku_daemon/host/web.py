"""The host's HTTP side: its routes, and who may use which.

``/healthz`` and ``/readyz`` are for anybody, ``/metrics`` for an API token, ``/v1/ws`` and
``/v1/runner`` ask who is there in their first message, data connections need a ticket or a
credential. Everything else is refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kohaku_daemon.core.access.tokens import TokenKind, is_token
from kohaku_daemon.host.clients import ClientDoor
from kohaku_daemon.host.environment_files import ROUTE, EnvironmentFiles
from kohaku_daemon.host.gate import bearer
from kohaku_daemon.host.guard import Census, Entrance, GuardedConnection, account_of, vouch
from kohaku_daemon.host.meters import Meters
from kohaku_daemon.host.metrics import render_metrics
from kohaku_daemon.host.parts import Parts
from kohaku_daemon.host.runners import RunnerDoor
from kohaku_daemon.loop_time import LoopTime
from kohaku_daemon.wire import Responder, Served, refuse_foreign_origin
from protocol.errors import Forbidden, KohakuError, Unauthenticated
from protocol.methods import Door
from protocol.models.access import Role
from protocol.session import CloseCode

_log = logging.getLogger(__name__)

_STATUS: Final[dict[type[KohakuError], int]] = {Unauthenticated: 401, Forbidden: 403}

#: Bad request, no such path, no such method: each would tell a stranger what is here.
_TELLING: Final = frozenset({400, 404, 405})

#: What handlers and those who listen share.
LOOP_TIME: Final = web.AppKey("loop_time", LoopTime)

#: Nobody sends us a body.
_LARGEST_BODY: Final = 1024
#: Connections that may wait to be let in.
_BACKLOG: Final = 1024
#: Those that are let in in one round of the loop. asyncio takes one number for both, and a
#: thousand at once are 0.1 s (measured), which somebody may choose to cost everybody.
_LET_IN: Final = 8


def make_app(parts: Parts, meters: Meters) -> web.Application:
    """Make the application."""
    loop_time = LoopTime()
    routes = _Routes(parts, meters, loop_time)
    app = web.Application(client_max_size=_LARGEST_BODY, middlewares=[routes.refuse])
    app[LOOP_TIME] = loop_time
    app.on_shutdown.append(routes.close)
    app.on_response_prepare.append(_be_nobody)
    app.add_routes(
        [
            web.get("/healthz", routes.health),
            web.get("/readyz", routes.ready),
            web.get("/metrics", routes.metrics),
            web.get("/v1/ws", routes.client),
            web.get("/v1/runner", routes.runner),
            web.get("/v1/stream/logs", routes.logs),
            web.get("/v1/stream/shell", routes.shell),
            web.get("/v1/runner/stream/{stream}", routes.runner_stream),
            web.get(ROUTE, routes.environment_file),
        ]
    )
    return app


def _is_no_garbage(record: logging.LogRecord) -> bool:
    """Say whether to log what aiohttp has to say.

    Of requests that are no HTTP it would log a traceback each, as fast as a stranger sends
    them. What escapes a handler of ours is a bug and stays.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


#: Where aiohttp logs, instead of its own logger.
HTTP_LOG: Final = logging.getLogger(f"{__name__}.http")
HTTP_LOG.addFilter(_is_no_garbage)


class _Routes:
    """One method a route."""

    def __init__(self, parts: Parts, meters: Meters, loop_time: LoopTime) -> None:
        self._parts = parts
        self._meters = meters
        self._clients = ClientDoor(parts)
        self._runners = RunnerDoor(parts)
        self._files = EnvironmentFiles(parts.config.environments)
        self._served: set[Served] = set()
        self._loop_time = loop_time

    async def health(self, request: web.Request) -> web.StreamResponse:
        """The process answers."""
        return web.Response(text="ok\n")

    async def ready(self, request: web.Request) -> web.StreamResponse:
        """It can do its work."""
        loop = self._parts.loop
        if loop.trouble:
            why = f": {loop.reason}" if loop.reason else ""
            return web.Response(status=503, text=f"nothing can be stored{why}\n")
        return web.Response(text="ready\n")

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Numbers for Prometheus."""
        actor = self._parts.gate.actor(_token(request), request.remote or "")
        if not actor.role.reaches(Role.VIEWER):
            raise Unauthenticated("metrics need an API token")
        text, kind = render_metrics(self._parts, self._meters)
        return web.Response(body=text, headers={"Content-Type": kind})

    async def client(self, request: web.Request) -> web.StreamResponse:
        """Control connection of a client."""
        return await self._serve(self._control(request, self._clients, Door.CLIENT))

    async def runner(self, request: web.Request) -> web.StreamResponse:
        """Link of a runner."""
        served = self._control(request, self._runners, Door.RUNNER)
        try:
            return await self._serve(served)
        finally:
            self._runners.closed(served)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """Data connection of a client that reads logs."""
        return await self._parts.relay.serve_client(request)

    async def shell(self, request: web.Request) -> web.StreamResponse:
        """Data connection of a client that runs a command in an environment."""
        return await self._parts.shells.serve(request)

    async def runner_stream(self, request: web.Request) -> web.StreamResponse:
        """Data connection of a runner."""
        node = self._parts.gate.node(_token(request), request.remote or "")
        vouch(request.transport)
        return await self._parts.relay.serve_runner(request, node)

    async def environment_file(self, request: web.Request) -> web.StreamResponse:
        """Packed environment, for a runner."""
        node = self._parts.gate.node(_token(request), request.remote or "")
        vouch(request.transport)
        return await self._files.serve(request, node)

    async def close(self, app: web.Application) -> None:
        """Tell everybody that the host stops."""
        self._files.close()
        for served in tuple(self._served):
            await served.close(CloseCode.GOING_AWAY, "the host stops")
        await self._parts.streams.close()

    @web.middleware
    async def refuse(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Answer refusals as text; keep nobody's plain connection open.

        A web page of another site is told 403 on every path, whatever it shows. Any other
        stranger is told 401 for whatever is not for anybody, whether or not it exists.
        """
        try:
            refuse_foreign_origin(request)
            response = await self._answer(request, handler)
        except KohakuError as error:
            status = _STATUS.get(type(error), 400)
            response = web.Response(status=status, text=f"{error.code}: {error.message}\n")
            if status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        except web.HTTPException as error:
            response = web.Response(status=error.status, text=error.text)
        except ConnectionError as error:
            # It went away before it could be answered, which is its own affair.
            _log.debug("a peer went away: %s", error)
            response = web.Response(status=400)
        if not response.prepared:
            response.force_close()
        return response

    async def _answer(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status in _TELLING and not self._is_known(request):
                raise Unauthenticated(f"{request.path} needs an API token") from error
            raise

    def _is_known(self, request: web.Request) -> bool:
        token = _token(request)
        if is_token(TokenKind.RUNNER, token):
            return bool(self._parts.gate.node(token, request.remote or ""))
        return self._parts.gate.actor(token, request.remote or "").role.reaches(Role.VIEWER)

    def _control(self, request: web.Request, responder: Responder, door: Door) -> Served:
        return Served(
            request,
            responder,
            door=door,
            keep_alive_s=self._parts.config.keep_alive_s,
            loop_time=self._loop_time,
            account=account_of(request.transport),
        )

    async def _serve(self, served: Served) -> web.StreamResponse:
        self._served.add(served)
        try:
            return await served.run()
        finally:
            self._served.discard(served)


async def _be_nobody(request: web.Request, response: web.StreamResponse) -> None:
    """Drop aiohttp's ``Server``: a stranger need not know which versions of what are here."""
    response.headers.popall("Server", None)


def _token(request: web.Request) -> str:
    return bearer(request.headers.get("Authorization", ""))


async def listen(
    runner: web.AppRunner, address: str, port: int, census: Census
) -> tuple[asyncio.Server, int]:
    """Listen, and give the server with the port it got.

    Raises:
        OSError: The address cannot be used, or the port is taken.
    """
    assert runner.server is not None, "the runner was set up"
    make = cast("Callable[[], asyncio.Protocol]", runner.server)
    assert runner.app is not None
    entrance = Entrance(census, runner.app[LOOP_TIME])
    server = await asyncio.get_running_loop().create_server(
        lambda: GuardedConnection(make, entrance), address, port, backlog=_LET_IN
    )
    for bound in server.sockets:
        with socket.socket(fileno=os.dup(bound.fileno())) as same:
            same.listen(_BACKLOG)  # again, which is allowed (man 2 listen), for the kernel's queue
    return server, int(server.sockets[0].getsockname()[1])
