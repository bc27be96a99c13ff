"""Backends that do not work at the start, and later do."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from kohaku_daemon.backends.mock import MockBackend, MockWorld
from kohaku_daemon.runner import backend_kit
from kohaku_daemon.runner.backend_kit import BackendKit, Reopening, choose_default
from kohaku_daemon.supervise import spawn
from protocol.messages.runner import AttemptState
from protocol.models.node import BackendInfo
from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until


class Ailing(MockBackend):
    """A backend that works once it is mended."""

    def __init__(self, world: MockWorld | None = None) -> None:
        super().__init__(world)
        self.mended = False
        self.breaks = False
        self.opened = 0

    async def open(self) -> BackendInfo:
        self.opened += 1
        if self.breaks:
            raise RuntimeError("a bug")
        if not self.mended:
            return BackendInfo(self.name, healthy=False, message="no space left")
        return await super().open()


@dataclass
class Told:
    """What a runner is told of its backends."""

    said: list[tuple[list[bool], str]] = field(default_factory=list)

    def __call__(self, infos: tuple[BackendInfo, ...], default: str) -> None:
        self.said.append(([info.healthy for info in infos], default))


async def test_it_is_opened_again_until_it_works_and_only_what_changed_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend_kit, "_AGAIN_S", 0.001)
    ailing, well, told = Ailing(), Ailing(), Told()
    well.mended = True
    infos = (await ailing.open(), await well.open())
    kit = BackendKit({"ailing": ailing, "well": well}, infos, "mock")
    job = spawn(Reopening(kit, "", told).run(), name="reopening")
    await until(lambda: ailing.opened > 3)
    ailing.breaks = True
    tries = ailing.opened
    await until(lambda: ailing.opened > tries + 1)
    assert "cannot open backend mock again" in caplog.text
    assert told.said == []
    ailing.breaks, ailing.mended = False, True
    await job
    assert told.said == [([True, True], "mock")]
    assert well.opened == 1


async def test_it_does_not_wait_when_something_has_become_better() -> None:
    ailing, told = Ailing(), Told()
    kit = BackendKit({"mock": ailing}, (await ailing.open(),), "mock")
    reopening = Reopening(kit, "", told)
    job = spawn(reopening.run(), name="reopening")
    await asyncio.sleep(0)
    ailing.mended = True
    reopening.hurry()
    await asyncio.wait_for(job, backend_kit._AGAIN_S / 3)
    assert told.said == [([True], "mock")]


async def test_the_host_hears_of_it_and_the_node_takes_work(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_kit, "_AGAIN_S", 0.01)
    ailing = Ailing(machine.world)
    await machine.start(ailing)
    await until(lambda: host.registers)
    (info,) = host.registers[-1].inventory.backends
    assert (info.healthy, info.message) == (False, "no space left")
    tries = ailing.opened
    await until(lambda: ailing.opened > tries + 2)
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
    ill, well = BackendInfo("a", healthy=False), BackendInfo("b")
    assert choose_default("c", [ill, well]) == "c"
    assert choose_default("", [ill, well]) == "b"
    assert choose_default("", [ill]) == "a"
    assert choose_default("", []) == ""
