"""Tasks in Docker containers against the same containers made by hand through Docker's API.

Knows: a Docker engine of the bench's own, in namespaces of its own (``tests.support.dockerds``);
what "the same by hand" is. Does not know: how environments travel (``environments``).

Both sides name the same image, network and command, and both remove the container: by hand it is
created, started, waited for and removed, one call after the other over one kept connection.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiodocker
from engines import docker_engine
from frame import Row, interleave
from stage import Stage, cluster, cpu_s

from kohaku_daemon.dockerd.connection import Dockerd
from protocol.client import Cluster
from protocol.ids import TaskId
from protocol.messages.stream import LogEnd, Source
from protocol.messages.task import WaitTasks
from protocol.methods import TASK_WAIT
from protocol.models.task import TaskSpec

_IMAGE: Final = "bench:1"
_ENVIRONMENT: Final = "bench"
_TRUE: Final = ("true",)
#: One after the other, in each round.
_SAMPLES: Final = 12
#: For the rate, and how many at once.
_TASKS: Final = 24
_AT_ONCE: Final = 4
_LINE: Final = "x" * 99
_LOG_BYTES: Final = 100_000_000
#: Through aiodocker they come at some 4 MB/s, so fewer are enough for a rate.
_FOLLOWED_BYTES: Final = 20_000_000
_PATIENCE_S: Final = 300.0


@dataclass(slots=True)
class _Figures:
    """What is seen beside the rates, of each round."""

    runner_percent: list[float] = field(default_factory=list)
    runner_grown_mib: list[float] = field(default_factory=list)


def containers(rounds: int) -> list[Row]:
    """Docker: one container after the other, four at a time, and the capture of 100 MB of log."""
    figures = _Figures()
    with docker_engine(image=_IMAGE, live_restore=True) as engine, _cluster(engine) as place:
        image = _pack(place)
        hand = _Hand(engine.socket, image)
        one, one_by_hand = interleave(
            rounds,
            lambda: statistics.median(asyncio.run(_one_by_one(place))),
            lambda: statistics.median(asyncio.run(hand.one_by_one())),
        )
        four, four_by_hand = interleave(
            rounds,
            lambda: asyncio.run(_rate(place)),
            lambda: asyncio.run(hand.rate()),
        )
        captured, followed = interleave(
            rounds,
            lambda: asyncio.run(_capture(place, figures)),
            lambda: asyncio.run(_follow_by_aiodocker(engine.socket, image)),
        )
    added = [mine - theirs for mine, theirs in zip(one, one_by_hand, strict=True)]
    by_hand = "create, start, wait, remove by Docker's API"
    return [
        Row(
            "containers.one", "true in a container, submission to known exit, p50", "ms", one,
            by_hand, one_by_hand, "<= 1.1 x",
        ),
        Row("containers.added", "what of that is ours, p50", "ms", added, goal="<= 15 ms"),
        Row(
            "containers.rate", f"true in containers, {_AT_ONCE} at once", "tasks/s", four,
            by_hand, four_by_hand, ">= 0.95 x",
        ),
        Row(
            "containers.logs", "capture of 100 MB of output", "MB/s", captured,
            "docker logs -f through aiodocker", followed, ">= 5 x",
        ),
        Row(
            "containers.logs_cpu", "CPU of the runner meanwhile, of one core", "%",
            figures.runner_percent[-rounds:], goal="<= 5 %",
        ),
        Row(
            "containers.logs_memory", "growth of the runner meanwhile", "MiB",
            figures.runner_grown_mib[-rounds:], goal="<= 32 MiB",
        ),
    ]  # fmt: skip


@contextmanager
def _cluster(engine: Any) -> Iterator[Stage]:
    socket = str(engine.socket)
    with cluster(
        "docker",
        KOHAKU_RUNNER_DOCKER_SOCKET=socket,
        KOHAKU_HOSTD_DOCKER_SOCKET=socket,
        KOHAKU_RUNNER_MAX_TASKS=str(_AT_ONCE),
        KOHAKU_RUNNER_LOG_CAP="1G",
    ) as place:
        yield place


def _pack(place: Stage) -> str:
    """Make the environment; give the id of its image."""
    place.run("kohaku", "environment", "create", _ENVIRONMENT, "--from", _IMAGE)
    place.run("kohaku", "environment", "pack", _ENVIRONMENT)
    shown = json.loads(place.run("kohaku", "environment", "show", _ENVIRONMENT, "--json"))
    return str(shown["versions"][0]["image"])


# Ours -------------------------------------------------------------------------------


def _spec(*command: str) -> TaskSpec:
    return TaskSpec(command=command, cores=0, container=_ENVIRONMENT)


async def _one_by_one(place: Stage) -> list[float]:
    """Submit one and wait for it, again and again; milliseconds of each."""
    samples = []
    async with asyncio.timeout(_PATIENCE_S), place.connect() as there:
        for _ in range(_SAMPLES):
            began = time.perf_counter()
            submitted = await there.submit(_spec(*_TRUE))
            await there.call(TASK_WAIT, WaitTasks(tasks=tuple(submitted.ids())))
            samples.append((time.perf_counter() - began) * 1e3)
    return samples


async def _rate(place: Stage) -> float:
    async with asyncio.timeout(_PATIENCE_S), place.connect() as there:
        began = time.perf_counter()
        submitted = await there.submit(_spec(*_TRUE), array=_TASKS)
        await there.wait(submitted)
        return _TASKS / (time.perf_counter() - began)


async def _capture(place: Stage, figures: _Figures) -> float:
    """Have a task write; the rate is from submission to the last byte in the runner's file."""
    runner = place.pid("runner-node1")
    before_s, before_kib = cpu_s(runner), _begin_peak(runner)
    async with asyncio.timeout(_PATIENCE_S), place.connect() as there:
        began = time.perf_counter()
        submitted = await there.submit(_spec("sh", "-c", _write(_LOG_BYTES)))
        await there.wait(submitted)
        wall_s = time.perf_counter() - began
        used_s, grown_kib = cpu_s(runner) - before_s, _kib(runner, "VmHWM") - before_kib
        await _check_size(there, next(submitted.ids()))
    figures.runner_percent.append(100 * used_s / wall_s)
    figures.runner_grown_mib.append(grown_kib / 1024)
    return _LOG_BYTES / wall_s / 1e6


async def _check_size(there: Cluster, task: TaskId) -> None:
    async for item in there.logs(task, sources=(Source.STDOUT,), tail_lines=1):
        if isinstance(item, LogEnd) and item.stdout_end != _LOG_BYTES:
            raise RuntimeError(f"{item.stdout_end} bytes of {_LOG_BYTES} came")


def _write(size: int) -> str:
    return f"yes {_LINE} | head -c {size}"


def _begin_peak(pid: int) -> int:
    """Have the peak of a process counted anew (man 5 proc); give what it has now, in KiB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _kib(pid, "VmRSS")


def _kib(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


# By hand ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hand:
    """Containers made through Docker's API."""

    socket: Path
    image: str

    async def one_by_one(self) -> list[float]:
        """One container after the other; milliseconds of each."""
        samples = []
        engine = Dockerd(self.socket)
        await engine.open()
        try:
            for _ in range(_SAMPLES):
                began = time.perf_counter()
                await self._run(engine)
                samples.append((time.perf_counter() - began) * 1e3)
        finally:
            await engine.close()
        return samples

    async def rate(self) -> float:
        """Give how many a second, some at once."""
        engine = Dockerd(self.socket)
        await engine.open()
        places = asyncio.Semaphore(_AT_ONCE)

        async def run() -> None:
            async with places:
                await self._run(engine)

        try:
            began = time.perf_counter()
            await asyncio.gather(*(run() for _ in range(_TASKS)))
            return _TASKS / (time.perf_counter() - began)
        finally:
            await engine.close()

    async def _run(self, engine: Dockerd) -> None:
        made = await engine.ask(
            "containers/create", "POST", body={"Image": self.image, "Cmd": list(_TRUE)}
        )
        name = f"containers/{made['Id']}"
        await engine.ask(f"{name}/start", "POST")
        ended = await engine.ask(f"{name}/wait", "POST")
        if ended["StatusCode"] != 0:
            raise RuntimeError(f"a container ended with {ended['StatusCode']}")
        await engine.ask(name, "DELETE")


async def _follow_by_aiodocker(socket: Path, image: str) -> float:
    """Give the rate at which ``docker logs -f`` gives what a container writes."""
    async with aiodocker.Docker(url=f"unix://{socket}") as docker:
        container = await docker.containers.create(
            {
                "Image": image,
                "Cmd": ["sh", "-c", _write(_FOLLOWED_BYTES)],
                "HostConfig": {"LogConfig": {"Type": "json-file"}},
            }
        )
        began, got = time.perf_counter(), 0
        await container.start()
        async for text in container.log(stdout=True, follow=True):
            got += len(text)
            if got >= _FOLLOWED_BYTES:
                break
        wall_s = time.perf_counter() - began
        await container.delete(force=True)
    if got != _FOLLOWED_BYTES:
        raise RuntimeError(f"{got} bytes of {_FOLLOWED_BYTES} came")
    return got / wall_s / 1e6
