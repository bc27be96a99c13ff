"""Environments on their way from the host to a node, against ``docker load`` of the same image.

Knows: a real host, a Docker engine of the bench's own, and the node's own parts between both:
pieces over HTTP, checked, kept, decompressed, loaded. Does not know: tasks (``containers``).

The image holds noise, which no compression makes smaller: all its bytes travel. The baseline
reads the same image from a file of this machine, as ``docker save`` wrote it, uncompressed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from engines import docker_engine
from frame import Row, interleave
from stage import Stage, stage

from kohaku_daemon.backends.docker.images.bringing import Images
from kohaku_daemon.core.access.tokens import TokenKind, make_token
from kohaku_daemon.dockerd.connection import Dockerd
from kohaku_daemon.dockerd.images import EngineImages
from kohaku_daemon.packing.pieces import PieceReader
from kohaku_daemon.packing.unpacking import unpack
from kohaku_daemon.runner.downloads import Downloads
from kohaku_daemon.runner.images import HostImages
from protocol.connection import Connection
from protocol.messages.runner import Join
from protocol.methods import RUNNER_JOIN
from protocol.models.environment import Version, WantedImage

_TAG: Final = "bench-environment:1"
_NAME: Final = "bench"
_SIZE: Final = 500_000_000
_CREDENTIAL: Final = make_token(TokenKind.RUNNER, bytes(32))
_PATIENCE_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class _Case:
    """One image, in all the places where a measurement finds it."""

    place: Stage
    socket: Path
    #: As ``docker save`` writes it.
    tar: Path
    version: Version
    #: Growth of the host at its peak while it sent the image, of each round.
    grown_mib: list[float] = field(default_factory=list)
    #: CPU seconds of the host meanwhile.
    host_s: list[float] = field(default_factory=list)


def environments(rounds: int) -> list[Row]:
    """Bringing an environment of 500 MB from the host to a node's engine."""
    with docker_engine() as maker, docker_engine() as engine, stage() as place:
        place.start_host(KOHAKU_HOSTD_DOCKER_SOCKET=str(maker.socket))
        case = asyncio.run(_prepare(place, maker, engine))
        asyncio.run(_join(place))
        ours, theirs, shared = interleave(
            rounds,
            lambda: asyncio.run(_bring(case, shared=False)),
            lambda: _load(case),
            lambda: asyncio.run(_bring(case, shared=True)),
        )
    by_hand = "cat FILE | docker load"
    return [
        Row(
            "environments.host", "500 MB through the host to a node", "MB/s", ours,
            by_hand, theirs, ">= 0.7 x",
        ),
        Row(
            "environments.shared", "500 MB from shared storage to a node", "MB/s", shared,
            by_hand, theirs, ">= 0.7 x",
        ),
        Row(
            "environments.host_memory", "growth of the host at its peak meanwhile", "MiB",
            [max(case.grown_mib)], goal="<= 16 MiB",
            note="the most of all rounds, the first of a fresh host included",
        ),
        Row(
            "environments.host_cpu", "CPU of the host for 500 MB", "s", case.host_s[-rounds:],
        ),
    ]  # fmt: skip


async def _prepare(place: Stage, maker: Any, engine: Any) -> _Case:
    """Have the host pack an environment of 500 MB, and save the same image to a file."""
    from tests.support.docker_images import big_image

    maker.load(await asyncio.to_thread(big_image, place.folder / "made.tar", _TAG, _SIZE))
    for command in (["create", _NAME, "--from", _TAG], ["pack", _NAME]):
        await asyncio.to_thread(place.run, "kohaku", "environment", *command)
    shown = await asyncio.to_thread(place.run, "kohaku", "environment", "show", _NAME, "--json")
    version = msgspec.convert(json.loads(shown)["versions"][0], Version, strict=False)
    tar = place.folder / "image.tar"
    # A load of the very file that the host packed: in another engine than the one that made it.
    folder = place.folder / "data" / "host" / "environments"
    with tar.open("wb") as file:
        async for part in unpack(PieceReader(folder, version).pieces()):
            await asyncio.to_thread(file.write, part)
    return _Case(place, engine.socket, tar, version)


async def _join(place: Stage) -> None:
    """Become a node of the host."""
    token = await asyncio.to_thread(place.join_token)
    async with await Connection.dial(place.url, path="/v1/runner") as link:
        await link.call(RUNNER_JOIN, Join(token=token, node="node1", credential=_CREDENTIAL))


@asynccontextmanager
async def _open(socket: Path) -> Any:
    connection = Dockerd(socket)
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


async def _bring(case: _Case, *, shared: bool) -> float:
    """Bring the image as a node does; give its rate, and remove it again."""
    folder = case.place.folder
    downloads = Downloads(case.place.url, lambda: _CREDENTIAL, folder / "parts")
    source = HostImages(downloads, folder / "data" / "host" if shared else None)
    wanted = WantedImage(environment=_NAME, version=case.version)
    async with asyncio.timeout(_PATIENCE_S), _open(case.socket) as connection:
        images = Images(connection, source, notes=folder / "images.json")
        grown_mib, used_s = _watch(case.place)
        began = time.perf_counter()
        await images.fetch(wanted, _say_nothing)
        wall_s = time.perf_counter() - began
        if not shared:
            case.grown_mib.append(grown_mib())
            case.host_s.append(used_s())
        tag = f"kohaku/{_NAME}:{case.version.digest[:12]}"
        if not await EngineImages(connection).remove(tag):
            raise RuntimeError("the image cannot be removed")
    return _SIZE / wall_s / 1e6


def _load(case: _Case) -> float:
    began = time.perf_counter()
    subprocess.run(
        f"cat {case.tar} | docker --host unix://{case.socket} load --quiet",
        shell=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    wall_s = time.perf_counter() - began
    subprocess.run(
        ["docker", "--host", f"unix://{case.socket}", "rmi", case.version.image],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return _SIZE / wall_s / 1e6


def _watch(place: Stage) -> tuple[Callable[[], float], Callable[[], float]]:
    """Begin to count; give how much the host has grown since at its peak, and what it used."""
    pid = place.pid("host")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted anew (man 5 proc)
    had_kib, had_s = _kib(pid, "VmRSS"), place.cpu_s("host")
    return (
        lambda: (_kib(pid, "VmHWM") - had_kib) / 1024,
        lambda: place.cpu_s("host") - had_s,
    )


def _kib(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def _say_nothing(text: str) -> None:
    pass
