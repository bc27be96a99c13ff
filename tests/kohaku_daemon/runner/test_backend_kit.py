"""Backends that do not work at the start, or for a while, or find nothing to work with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from kohaku_daemon.backends.base import BackendAbsent, BackendAway
from kohaku_daemon.backends.mock import MockBackend, MockWorld
from kohaku_daemon.backends.registry import BackendPlace
from kohaku_daemon.runner import backend_kit
from kohaku_daemon.runner.backend_kit import (
    BackendKit,
    BackendWatch,
    choose_default,
    open_backends,
)
from kohaku_daemon.supervise import spawn
from protocol.messages.runner import AttemptState
from protocol.models.node import BackendInfo
from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until

AILING: Final = BackendInfo("mock", healthy=False, message="no space left")


class Ailing(MockBackend):
    """A backend that works once it is mended."""

    def __init__(self, world: MockWorld | None = None, name: str = "mock") -> None:
        super().__init__(world)
        self.name = name  # type: ignore[misc]
        self.mended = False
        #: What ``open`` raises.
        self.breaks: Exception | None = None
        self.opened = 0
        #: What is wrong with it once it works, and how often that was looked at.
        self.now = ""
        self.looked = 0

    @property
    def trouble(self) -> str:
        self.looked += 1
        return self.now

    async def open(self) -> BackendInfo:
        self.opened += 1
        if self.breaks is not None:
            raise self.breaks
        if not self.mended:
            return BackendInfo(self.name, healthy=False, message="no space left")
        return BackendInfo(self.name)


@dataclass
class Told:
    """What a runner is told of its backends."""

    said: list[tuple[dict[str, str], str]] = field(default_factory=list)
    back: int = 0

    def change(self, infos: tuple[BackendInfo, ...], default: str) -> None:
        states = {one.name: "well" if one.healthy else one.message for one in infos}
        self.said.append((states, default))

    def return_(self) -> None:
        self.back += 1


def well(name: str = "mock") -> Ailing:
    backend = Ailing(name=name)
    backend.mended = True
    return backend


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_kit, "_LOOK_S", 0.001)
    monkeypatch.setattr(backend_kit, "_AGAIN_S", 0.002)
    monkeypatch.setattr(backend_kit, "_PATIENCE_S", 0.05)


@contextmanager
def registered(monkeypatch: pytest.MonkeyPatch, *backends: Ailing) -> Iterator[None]:
    """Have these made by their names, and be what ``auto`` stands for."""
    by_name = {one.name: one for one in backends}
    with monkeypatch.context() as patches:
        patches.setattr(backend_kit, "make_backend", lambda name, place: by_name[name])
        patches.setattr(backend_kit, "DEFAULT_BACKENDS", tuple(by_name))
        yield


async def opened(monkeypatch: pytest.MonkeyPatch, *backends: Ailing, name: str = "") -> BackendKit:
    with registered(monkeypatch, *backends):
        place = BackendPlace(node="n1", state_root=Path("/nowhere"))
        return await open_backends(["auto", name] if name else ["auto"], "", place)


@asynccontextmanager
async def watched(kit: BackendKit, wanted: str = "") -> AsyncIterator[tuple[BackendWatch, Told]]:
    told = Told()
    watch = BackendWatch(kit, wanted, told.change, told.return_)
    job = spawn(watch.run(), name="watch")
    try:
        yield watch, told
    finally:
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)


def looks(backend: Ailing) -> Callable[[], bool]:
    """Wait for two more tries."""
    before = backend.opened
    return lambda: backend.opened > before + 1


async def test_it_is_opened_again_until_it_works_and_only_what_changed_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ailing, other = Ailing(name="ailing"), well("other")
    kit = await opened(monkeypatch, ailing, other)
    async with watched(kit) as (_, told):
        await until(looks(ailing))
        ailing.breaks = RuntimeError("a bug")
        await until(looks(ailing))
        assert "cannot open backend ailing again" in caplog.text
        assert told.said == []
        ailing.breaks, ailing.mended = None, True
        await until(lambda: told.said)
        await until(lambda: told.back == 1)
        assert told.said == [({"ailing": "well", "other": "well"}, "other")]
        assert other.opened == 1


async def test_it_does_not_wait_when_something_has_become_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_kit, "_AGAIN_S", 1000.0)
    monkeypatch.setattr(backend_kit, "_LOOK_S", 1000.0)
    ailing = Ailing()
    kit = await opened(monkeypatch, ailing)
    async with watched(kit) as (watch, told):
        await asyncio.sleep(0)
        ailing.mended = True
        watch.hurry()
        await until(lambda: told.said == [({"mock": "well"}, "mock")])


async def test_trouble_that_lasts_is_told_and_its_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    one = well("docker")
    kit = await opened(monkeypatch, one, well("process"))
    async with watched(kit) as (_, told):
        one.now = "dockerd does not answer"
        await until(lambda: told.said)
        states, default = told.said[-1]
        assert states == {"docker": "dockerd does not answer", "process": "well"}
        # Tasks that name no backend do not go elsewhere because it is gone for a while.
        assert default == "docker"
        one.now = ""
        await until(lambda: len(told.said) == 2)
        assert told.said[-1] == ({"docker": "well", "process": "well"}, "docker")
        assert told.back >= 1


async def test_what_works_while_it_says_that_it_is_in_trouble_counts_as_unwell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = well()
    kit = await opened(monkeypatch, one)
    async with watched(kit) as (_, told):
        one.now = "dockerd hangs"
        await until(lambda: told.said)
        await until(looks(one))
        assert [states for states, _ in told.said] == [{"mock": "dockerd hangs"}]


async def test_trouble_that_is_over_at_once_is_not_told_but_it_is_opened_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_kit, "_PATIENCE_S", 1000.0)
    one = well()
    kit = await opened(monkeypatch, one)
    async with watched(kit) as (_, told):
        one.now = "dockerd is restarted"
        seen = one.looked
        await until(lambda: one.looked > seen)
        one.now = ""
        await until(lambda: told.back == 1)
        assert one.opened == 2
        assert told.said == []


async def test_auto_leaves_out_what_finds_nothing_here_and_takes_it_when_it_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    docker, process = well("docker"), well("process")
    docker.breaks = BackendAbsent("no engine answers at /run/docker.sock")
    kit = await opened(monkeypatch, docker, process)
    assert [info.name for info in kit.infos] == ["process"]
    assert kit.default == "process"
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    async with watched(kit) as (_, told):
        await until(looks(docker))
        assert told.said == []
        docker.breaks = None
        await until(lambda: told.said)
        # The default of this run works: it stays.
        assert told.said == [({"docker": "well", "process": "well"}, "process")]
        docker.now = "dockerd is gone"
        await until(lambda: len(told.said) == 2)
        docker.breaks = BackendAbsent("no engine answers at /run/docker.sock")
        docker.now = ""
        await until(looks(docker))
        # It was there: now it is unwell, and not left out.
        states, _ = told.said[-1]
        assert states["docker"] == "no engine answers at /run/docker.sock"


async def test_named_it_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    docker, process = well("docker"), well("process")
    docker.breaks = BackendAbsent("no engine answers at /run/docker.sock")
    kit = await opened(monkeypatch, docker, process, name="docker")
    by_name = {info.name: info for info in kit.infos}
    assert not by_name["docker"].healthy
    assert by_name["docker"].message == "no engine answers at /run/docker.sock"


async def test_one_that_is_away_at_the_start_is_unwell_and_no_end_of_the_runner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    docker = well("docker")
    docker.breaks = BackendAway("dockerd does not answer")
    kit = await opened(monkeypatch, docker)
    (info,) = kit.infos
    assert (info.healthy, info.message) == (False, "dockerd does not answer")


async def test_a_default_that_never_worked_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Ailing(name="first"), Ailing(name="second")
    kit = await opened(monkeypatch, first, second)
    assert kit.default == "first"
    async with watched(kit) as (_, told):
        second.mended = True
        await until(lambda: told.said)
        assert told.said[-1][1] == "second"
        first.mended = True
        await until(lambda: len(told.said) == 2)
        assert told.said[-1][1] == "second"


async def test_the_host_hears_of_it_and_the_node_takes_work(
    host: FakeHost, machine: Machine
) -> None:
    ailing = Ailing(machine.world)
    await machine.start(ailing)
    await until(lambda: host.registers)
    assert host.registers[-1].inventory.backends == (AILING,)
    await until(looks(ailing))
    assert len(host.registers) == 1
    ailing.mended = True
    await until(lambda: len(host.registers) > 1)
    (info,) = host.registers[-1].inventory.backends
    assert info.healthy
    await until(lambda: host.links == 1)
    host.order(a_start(1, backend=""))
    await until(lambda: host.state(1) is AttemptState.ENDED)
    assert len(host.registers) == 2


def test_the_default_is_the_chosen_one_or_the_first_that_works() -> None:
    ill, fine = BackendInfo("a", healthy=False), BackendInfo("b")
    assert choose_default("c", [ill, fine]) == "c"
    assert choose_default("", [ill, fine]) == "b"
    assert choose_default("", [ill]) == "a"
    assert choose_default("", []) == ""
