"""``kohakud up``: a whole cluster on this machine, or what is missing of it.

Knows: the order of a start, and when each daemon is ready.
Does not know: how a process is started or stopped (``daemons``).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from kohaku_daemon.local import daemons
from kohaku_daemon.local.address import Asked, choose_address, refuse_to_move
from kohaku_daemon.local.daemons import Daemon, StartFailed
from kohaku_daemon.local.door import enter, forget_url, save_context, url_of
from kohaku_daemon.local.home import Home
from kohaku_daemon.plaintext import is_loopback
from protocol.client import Connection
from protocol.errors import BadRequest, Conflict
from protocol.messages.node import ListNodes, MakeJoinToken
from protocol.methods import NODE_JOIN_TOKEN, NODE_LIST
from protocol.models.node import Node, NodeState

T = TypeVar("T")

#: Seconds for the host to be ready, and then for the runners to be online.
_READY_S: Final = 30.0
#: Seconds between two looks at what takes some tenths of a second.
_LOOK_S: Final = 0.02
#: More make no sense on one machine.
_MOST_RUNNERS: Final = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for; None for as last time."""

    runners: int | None = None
    backend: str | None = None
    listen: Asked | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is up."""

    url: str
    host: Daemon
    runners: tuple[Daemon, ...]
    #: Name of the context that people's commands use.
    context_in_use: str
    #: What does not work on nodes that are online all the same, each with what to do.
    troubles: tuple[str, ...]
    #: Why nodes did not come, each with what to do.
    absent: tuple[StartFailed, ...]


def up(wanted: Wanted, *, detach: bool) -> int:
    """Bring the cluster of this home up, say so, and stay until Ctrl-C unless ``detach``.

    Gives the exit status: 1 also if a node did not come. The others are up all the same.

    Raises:
        BadRequest: What is asked for, or a setting, makes no sense.
        Conflict: The address is taken, or what runs was started otherwise.
        StartFailed: The host did not become ready. What this call had started is stopped.
    """
    return asyncio.run(_up(Home(), wanted, detach=detach))


async def _up(home: Home, wanted: Wanted, *, detach: bool) -> int:
    with home.turn():
        cluster = await bring_up(home, wanted)
    watch = None if detach else _Watch((cluster.host, *cluster.runners))
    # Not before Ctrl-C is ours: whoever reads this may press it.
    sys.stdout.write(_describe(home, cluster, detach=detach))
    sys.stdout.flush()
    for trouble in cluster.troubles:
        _say(f"warning: {trouble}")
    for failure in cluster.absent:
        _say(f"kohakud: {failure.message}\n  {failure.hint}")
    if cluster.absent:
        _say("all else is up; when this is mended: kohakud up --detach")
    if watch is None:
        return 1 if cluster.absent else 0
    failed = await watch.until_asked_or_ended()
    if watch.left:
        _say("stopping the daemons; tasks go on")
        daemons.stop(cluster.runners)
        daemons.stop([cluster.host])
    _say("all daemons have stopped; kohakud up brings them back")
    return 1 if failed or cluster.absent else 0


async def bring_up(home: Home, wanted: Wanted) -> Cluster:
    """Start what is missing, and wait until it is ready or cannot be. Raises as ``up``."""
    before = home.recall()
    count = before.runners if wanted.runners is None else wanted.runners
    backend = before.backend if wanted.backend is None else wanted.backend
    if not 0 <= count <= _MOST_RUNNERS:
        raise BadRequest(f"{count} runners on one machine are not possible; 0 to 64 are")
    host = daemons.host_of(home)
    runners = [daemons.runner_of(home, f"node{number}") for number in range(1, count + 1)]
    if backend != before.backend and any(runner.pid for runner in runners):
        raise Conflict(
            "the runners that are up were started with other backends",
            hint="first: kohakud down",
        )
    try:
        url = await _bring_up_host(home, host, wanted.listen)
        # Before a runner is there to start any, so that no crash leaves tasks unnoticed.
        home.remember(msgspec.structs.replace(home.recall(), tasks_left=True))
        async with await enter(home.host) as connection:
            in_use = save_context(connection, home.host)
            nodes, failures = await _bring_up_runners(home, connection, runners, backend)
            known = await _list_names(connection)
        if nodes or not failures:
            # Else it may be the very wish that cannot be fulfilled.
            home.remember(msgspec.structs.replace(home.recall(), runners=count, backend=backend))
    except BaseException:  # Ctrl-C and a cancelled wait above all
        # Nothing stays behind a host that did not start, or a start that somebody gave up.
        daemons.stop(daemon for daemon in (*runners, host) if daemon.was_started_here)
        raise
    # What did not come would be in the way of the next try.
    absent = [runner for runner in runners if runner.name in failures]
    await asyncio.to_thread(daemons.stop, [one for one in absent if one.was_started_here])
    return Cluster(
        url,
        host,
        tuple(runner for runner in runners if runner.name not in failures),
        in_use,
        tuple(_list_troubles(home, nodes)),
        tuple(_advise_absent(name, failures[name], known) for name in failures),
    )


# --- the order of a start -------------------------------------------------------------------


async def _bring_up_host(home: Home, host: Daemon, asked: Asked | None) -> str:
    if host.pid is not None:
        url = await _until(lambda: url_of(home.host), "is not ready", [host])
        refuse_to_move(url, asked)
        return url
    address = choose_address(home.recall(), asked)
    forget_url(home.host)
    host.start("--listen", address.flag)
    url = await _until(lambda: url_of(home.host), "is not ready", [host])
    home.remember(address.kept_in(home.recall(), port=urlsplit(url).port or 0))
    return url


async def _bring_up_runners(
    home: Home, connection: Connection, runners: list[Daemon], backend: str
) -> tuple[list[Node], dict[str, StartFailed]]:
    """Give the nodes that came, and by name why others did not."""
    known = await _list_names(connection)
    strangers = [runner for runner in runners if runner.name not in known]
    await _stop_removed(strangers)
    missing = [runner for runner in runners if runner.pid is None]
    flags = ["--host", connection.url]
    if not is_loopback(urlsplit(connection.url).hostname or ""):
        # The host accepted that risk, and what goes to its own machine meets no network.
        flags.append("--insecure-plaintext")
    if backend:
        flags += ["--backend", backend]
    token = home.root / "join.token"
    try:
        if strangers:
            made = await connection.call(NODE_JOIN_TOKEN, MakeJoinToken(uses=len(strangers)))
            _write_secret(token, made.token)
        failures: dict[str, StartFailed] = {}
        for runner in missing:
            joins = ["--join-token-file", str(token)] if runner in strangers else []
            try:
                runner.start(*flags, *joins)
            except StartFailed as error:
                failures[runner.name] = error
        return await _until_online(connection, runners, failures)
    finally:
        token.unlink(missing_ok=True)


async def _list_names(connection: Connection) -> set[str]:
    return {str(node.name) for node in (await connection.call(NODE_LIST, ListNodes())).nodes}


async def _stop_removed(strangers: Iterable[Daemon]) -> None:
    """Stop runners whose nodes were removed: a runner takes a join token only as it starts."""
    removed = [runner for runner in strangers if runner.pid is not None]
    for runner in removed:
        _say(f"{runner.name} runs, but its node was removed; it joins anew; tasks go on")
    await asyncio.to_thread(daemons.stop, removed)


async def _until_online(
    connection: Connection, runners: list[Daemon], failures: dict[str, StartFailed]
) -> tuple[list[Node], dict[str, StartFailed]]:
    """Wait for the runners that may come; give their nodes, and why others do not come."""
    deadline = asyncio.get_running_loop().time() + _READY_S
    while True:
        nodes = (await connection.call(NODE_LIST, ListNodes())).nodes
        online = {str(node.name): node for node in nodes if node.state is NodeState.ONLINE}
        # Without its process a node is online only until the host has noticed.
        late = [
            runner
            for runner in runners
            if runner.name not in failures and (runner.name not in online or not runner.pid)
        ]
        if not late:
            return [online[one.name] for one in runners if one.name not in failures], failures
        for runner in late:
            try:
                runner.check()
                _check_time([runner], "is not online", deadline)
            except StartFailed as error:
                failures[runner.name] = error
        await asyncio.sleep(_LOOK_S)


async def _until(ask: Callable[[], T | None], complaint: str, late: list[Daemon]) -> T:
    deadline = asyncio.get_running_loop().time() + _READY_S
    while True:
        found = ask()
        if found is not None:
            return found
        await _look_again(late, complaint, deadline)


async def _look_again(late: list[Daemon], complaint: str, deadline: float) -> None:
    for daemon in late:
        daemon.check()
    _check_time(late, complaint, deadline)
    await asyncio.sleep(_LOOK_S)


def _check_time(late: list[Daemon], complaint: str, deadline: float) -> None:
    if asyncio.get_running_loop().time() > deadline:
        raise late[0].failure(f"{complaint} after {_READY_S:g} s")


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(text)


# --- staying --------------------------------------------------------------------------------


class _Watch:
    """Waits for Ctrl-C, or for the end of every daemon by other hands."""

    def __init__(self, watched: Iterable[Daemon]) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Daemon | None] = asyncio.Queue()
        #: Daemons that still run.
        self.left = {daemon for daemon in watched if self._follow(daemon)}
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._news.put_nowait, None)

    async def until_asked_or_ended(self) -> bool:
        """Say of each daemon that it has ended. Gives whether one failed."""
        failed = False
        while self.left:
            daemon = await self._next()
            if daemon is None:
                break
            self.left.discard(daemon)
            failed |= _tell_end(daemon)
        return failed

    async def _next(self) -> Daemon | None:
        try:
            return await self._news.get()
        except asyncio.CancelledError:
            # Ctrl-C came before the handler: asyncio.run then cancels, which is asking too.
            return None

    def _follow(self, daemon: Daemon) -> bool:
        pid = daemon.pid
        if pid is None:
            return False
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        self._loop.add_reader(fd, self._ended, daemon, fd)
        return True

    def _ended(self, daemon: Daemon, fd: int) -> None:
        self._loop.remove_reader(fd)
        os.close(fd)
        self._news.put_nowait(daemon)


def _tell_end(daemon: Daemon) -> bool:
    """Say that a daemon has ended, and whether it failed."""
    status = daemon.status()
    if not status:
        _say(f"{daemon.name} has stopped")
        return False
    _say(daemon.failure(f"ended with status {status}").message)
    return True


# --- words ----------------------------------------------------------------------------------


def _describe(home: Home, cluster: Cluster, *, detach: bool) -> str:
    lines = [f"the cluster is up: {cluster.url}"]
    lines += _table(
        [("host", cluster.host), *((runner.name, runner) for runner in cluster.runners)]
    )
    lines.append(f"what they say is in {home.logs}")
    if cluster.context_in_use != "local":
        lines.append(
            f"commands go to the context {cluster.context_in_use}; for this cluster: "
            "kohaku context use local"
        )
    lines += [
        "",
        "try:   kohaku status",
        "       kohaku task submit --follow -- echo hello",
        f"stop:  {'kohakud down' if detach else 'Ctrl-C'}; tasks go on",
    ]
    return "\n".join(lines) + "\n"


def _advise_absent(name: str, failure: StartFailed, known: Collection[str]) -> StartFailed:
    hints = [failure.hint] if failure.hint else []
    if name in known:
        # Also where its files are lost or damaged: a removed node joins anew at the next up.
        hints.append(f"to give the node up, and what it knows: kohaku node remove {name}")
    return StartFailed(failure.message, hint="\n  ".join(hints) or "see: kohakud check")


def _list_troubles(home: Home, nodes: Iterable[Node]) -> Iterator[str]:
    for node in nodes:
        backends = node.inventory.backends
        alone = not any(info.healthy for info in backends)
        for info in backends:
            if not info.healthy:
                what = f"backend {info.name} of {node.name} does not work"
                yield (
                    f"{f'no task can run on {node.name}' if alone else what}: {info.message}\n"
                    f"  {_advise(home, node)}"
                )


def _advise(home: Home, node: Node) -> str:
    shut = home.find_shut() if os.geteuid() == 0 else None
    if shut is None:
        return f"see: kohakud check, and {home.logs / f'{node.name}.log'}"
    return (
        f"tasks run as users of their own, and {shut} is closed to them: set KOHAKU_HOME to a "
        f"folder elsewhere, or: chmod o+x {shut}; then kohakud down, kohakud up"
    )


def _table(rows: Iterable[tuple[str, Daemon]]) -> list[str]:
    return [f"  {name:<8} process {daemon.pid}" for name, daemon in rows]


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
