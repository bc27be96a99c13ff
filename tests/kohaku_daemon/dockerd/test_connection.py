"""Asking an engine: a real one, and ones that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from kohaku_daemon.dockerd.connection import Dockerd, reading
from kohaku_daemon.dockerd.errors import EngineAbsent, EngineAway, EngineRefused
from tests.support import dockerds

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
async def engine(dockerd: dockerds.Dockerd) -> AsyncIterator[Dockerd]:
    engine = Dockerd(dockerd.socket)
    await engine.open()
    yield engine
    await engine.close()


@asynccontextmanager
async def serve(socket: Path, answer: Answer, version: str = "1.41") -> AsyncIterator[Dockerd]:
    """Pretend to be an engine that answers everything but its version like this."""

    async def tell_version(_: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": version, "Version": "99"})

    app = web.Application()
    app.router.add_get("/version", tell_version)
    app.router.add_get("/v1.41/version", tell_version)
    app.router.add_get("/v1.12/version", tell_version)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.UnixSite(runner, str(socket)).start()
    engine = Dockerd(socket)
    try:
        yield engine
    finally:
        await engine.close()
        await runner.cleanup()


async def test_a_question_is_answered_or_refused_in_the_engines_words(engine: Dockerd) -> None:
    assert engine.version.startswith("20.10")
    assert (await engine.ask("info"))["ServerVersion"] == engine.version
    with pytest.raises(EngineRefused, match="No such container: nothing") as caught:
        await engine.ask("containers/nothing/start", "POST")
    assert caught.value.status == 404


async def test_no_connection_is_kept_by_readers_that_break_off(engine: Dockerd) -> None:
    """With a limit of connections a hundred of these would block everything else."""
    for _ in range(150):
        async with engine.stream("events", timeout_s=5):
            pass
    assert (await engine.ask("info"))["ServerVersion"]


async def test_where_no_engine_is_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(EngineAbsent, match="there is no Docker engine at"):
        await Dockerd(tmp_path / "none").open()


async def test_a_socket_that_nobody_answers_is_an_engine_that_is_away(
    dockerd: dockerds.Dockerd, tmp_path: Path
) -> None:
    path = tmp_path / "d.sock"
    server = await asyncio.start_unix_server(lambda *_: None, str(path))
    server.close()
    await server.wait_closed()
    path.touch()
    engine = Dockerd(path)
    with pytest.raises(EngineAway):
        await engine.open()
    assert not await engine.accepts(1)
    await engine.close()
    assert await Dockerd(dockerd.socket).accepts(5)


async def test_asked_before_it_was_reached_it_is_away(dockerd: dockerds.Dockerd) -> None:
    with pytest.raises(EngineAway, match="has not been reached yet"):
        await Dockerd(dockerd.socket).ask("info")


async def test_one_that_is_too_old_is_none(tmp_path: Path) -> None:
    async def never(_: web.Request) -> web.Response:
        raise AssertionError

    async with serve(tmp_path / "d.sock", never, version="1.12") as engine:
        with pytest.raises(EngineAbsent, match="too old") as caught:
            await engine.open()
    assert caught.value.hint == "install Docker 20.10 or newer"


async def test_one_that_hangs_is_away_after_the_time_it_had(tmp_path: Path) -> None:
    is_over = asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        await is_over.wait()
        return web.Response()

    async with serve(tmp_path / "d.sock", hang) as engine:
        await engine.open()
        with pytest.raises(EngineAway, match=r"did not answer in 0\.05 s"):
            await engine.ask("info", timeout_s=0.05)
        is_over.set()


async def test_one_that_breaks_off_is_away(tmp_path: Path) -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "100"})
        await answer.prepare(request)
        await answer.write(b"{")
        assert request.transport is not None
        request.transport.abort()
        return answer

    async with serve(tmp_path / "d.sock", break_off) as engine:
        await engine.open()
        with pytest.raises(EngineAway, match="connection to the Docker engine broke"):
            await engine.ask("info")
        async with engine.stream("info") as response:
            with pytest.raises(EngineAway):
                async with reading():
                    await response.read()


async def test_a_reader_that_runs_out_of_time_itself_is_told_so() -> None:
    with pytest.raises(EngineAway, match=r"did not answer$"):
        async with reading():
            raise TimeoutError
