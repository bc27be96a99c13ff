"""The host daemon: put the parts together, run them, stop in order."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aiohttp import web

from kohaku_daemon.clock import Clock, SystemClock
from kohaku_daemon.core.access.tokens import TokenKind, make_token, token_digest, token_prefix
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import Ticked
from kohaku_daemon.core.cluster.fleet import Fleet
from kohaku_daemon.core.cluster.records import PutDocument, TokenRecord
from kohaku_daemon.core.cluster.recovery import restore_engine
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.host.config import HostConfig
from kohaku_daemon.host.environments import Workshop
from kohaku_daemon.host.gate import Gate
from kohaku_daemon.host.guard import Census
from kohaku_daemon.host.lately import LATELY_S, Lately
from kohaku_daemon.host.links import Links
from kohaku_daemon.host.loop import HostLoop
from kohaku_daemon.host.meters import Meters
from kohaku_daemon.host.parts import Parts
from kohaku_daemon.host.refusals import Refusals
from kohaku_daemon.host.relay import Relay
from kohaku_daemon.host.retention import keep_house
from kohaku_daemon.host.shells import Shells
from kohaku_daemon.host.streams import Streams
from kohaku_daemon.host.subscriptions import Hub
from kohaku_daemon.host.waiting import WaitingRoom
from kohaku_daemon.host.web import HTTP_LOG, listen, make_app
from kohaku_daemon.host.world import Outside
from kohaku_daemon.store.documents import Documents
from kohaku_daemon.store.pair import open_pair, reading_records
from kohaku_daemon.store.tasks import TaskStore
from protocol.errors import Unavailable
from protocol.ids import UserName
from protocol.models.access import Role
from protocol.snowflake import INSTANCES, SnowflakeSource

_log = logging.getLogger(__name__)

ADMIN_TOKEN_FILE: Final = "admin.token"
_TICK_S: Final = 1.0
#: Seconds that open connections have to end when the host stops.
_FAREWELL_S: Final = 2.0


async def run_host(
    config: HostConfig, *, stop: asyncio.Event, on_ready: Callable[[str], None]
) -> None:
    """Run until ``stop`` is set. ``on_ready`` gets the URL once clients can connect.

    Raises:
        KohakuError: A store cannot be opened, or the address cannot be listened on.
    """
    _allow_many_connections()
    clock = SystemClock()
    config.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    ids = SnowflakeSource(0)
    ((cluster_id, _),) = ids.take(1, clock.now())
    documents, store = open_pair(
        config.data,
        new_cluster=str(cluster_id),
        synchronous="FULL" if config.synchronous == "full" else "NORMAL",
    )
    try:
        meters = Meters()
        with reading_records(config.data):
            parts = _make_parts(config, clock, documents, store, meters)
        await _serve(parts, meters, stop, on_ready)
    finally:
        store.close()


def _allow_many_connections() -> None:
    """Use all the descriptors we are allowed: each client, runner and reader of logs takes one.

    The usual soft limit of 1024 is for programs that use select(2); we start none.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _make_parts(
    config: HostConfig,
    clock: Clock,
    documents: Documents,
    store: TaskStore,
    meters: Meters,
) -> Parts:
    now = clock.now()
    _ensure_admin(documents, config.data / ADMIN_TOKEN_FILE, now)
    book = documents.read()
    state = ClusterState(
        cluster=book.cluster,
        fleet=Fleet(join_tokens=dict(book.join_tokens)),
        environments=dict(book.environments),
        registries=dict(book.registries),
    )
    state.fleet.load(book.nodes.values(), now)
    engine = ClusterEngine(
        state,
        # Of another instance after a restore: ids given since the backup are not given again.
        SnowflakeSource(book.epoch % INSTANCES, store.highest_id()),
        last_event=store.last_event_id(),
        heartbeat_s=config.heartbeat_s,
        lost_after_s=config.lost_after_s,
        environment_versions=config.environment_versions,
    )
    live = list(store.live_tasks())
    batches = store.batches({task.batch for task in live}).values()
    restore_engine(engine, batches, live, store.standing, now)
    hub = Hub(secrets.token_hex(8))
    links = Links()
    waiting = WaitingRoom()
    lately = Lately(store.ends_since(now - LATELY_S))
    refusals = Refusals(clock.monotonic)
    workshop = Workshop(config, state, hub)
    streams = Streams(clock)
    world = Outside(state, links, hub, waiting, lately, workshop)
    loop = HostLoop(engine, store, documents, world, clock, meters=meters)
    return Parts(
        config=config,
        clock=clock,
        engine=engine,
        store=store,
        loop=loop,
        hub=hub,
        waiting=waiting,
        lately=lately,
        links=links,
        gate=Gate(state, book.tokens.values(), clock, refusals),
        streams=streams,
        relay=Relay(streams, state, store, links, waiting, loop),
        workshop=workshop,
        shells=Shells(streams, workshop),
        refusals=refusals,
        started_at=now,
    )


async def _serve(
    parts: Parts, meters: Meters, stop: asyncio.Event, on_ready: Callable[[str], None]
) -> None:
    config = parts.config
    runner = web.AppRunner(
        make_app(parts, meters), access_log=None, shutdown_timeout=_FAREWELL_S, logger=HTTP_LOG
    )
    await runner.setup()
    try:
        server, port = await listen(
            runner,
            config.listen,
            config.port,
            Census(config.max_strangers_per_address, parts.refusals),
        )
    except OSError as error:
        await runner.cleanup()
        hint = "give an address of this machine: --listen ADDRESS:PORT"
        if error.errno == errno.EADDRINUSE:
            hint = "stop what uses it, or choose another port: --listen ADDRESS:PORT"
        raise Unavailable(
            f"cannot listen on {config.listen}:{config.port}: {error.strerror}", hint=hint
        ) from error
    async with asyncio.TaskGroup() as jobs:
        jobs.create_task(parts.loop.run(), name="commit")
        aside = [
            jobs.create_task(_tick(parts), name="tick"),
            jobs.create_task(keep_house(parts.store, config, parts.clock), name="retention"),
            jobs.create_task(parts.workshop.run(parts.loop), name="environments"),
        ]
        _log.info("cluster %s: %d live tasks", parts.state.cluster, len(parts.state.tasks))
        try:
            on_ready(f"http://{_printable(config.listen)}:{port}")
            await stop.wait()
            _log.info("stopping; tasks go on")
        finally:
            server.close()
            await runner.cleanup()
        for job in aside:
            job.cancel()
        parts.loop.stop()


async def _tick(parts: Parts) -> None:
    while True:
        await asyncio.sleep(_TICK_S)
        parts.loop.tell(Ticked(parts.clock.monotonic()))


def _ensure_admin(documents: Documents, path: Path, now: float) -> None:
    """Make the first admin's token at the first start. It is in its file and nowhere else.

    The file is written before its digest is stored: a crash in between makes a new one.
    """
    if documents.read().tokens:
        return
    token = make_token(TokenKind.API, secrets.token_bytes(32))
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "w") as file:
        file.write(token + "\n")
        file.flush()
        os.fsync(file.fileno())
    record = TokenRecord(
        digest=token_digest(token),
        prefix=token_prefix(token),
        user=UserName("admin"),
        role=Role.ADMIN,
        created_at=now,
    )
    documents.apply([PutDocument(record)])
    _log.info("the first admin's token is in %s", path)


def _printable(address: str) -> str:
    """Give the address as this machine's own programs reach it, as part of a URL."""
    if address in {"0.0.0.0", ""}:
        return "127.0.0.1"
    if address == "::":
        return "[::1]"
    return f"[{address}]" if ":" in address else address
