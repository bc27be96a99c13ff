"""What nobody wants is removed from the machine; what anybody may still want is not."""

from __future__ import annotations

import logging
from collections.abc import Collection

import pytest

from kohaku_daemon.backends.mock import MockBackend, MockWorld
from kohaku_daemon.core.workload import Handle, Launch
from kohaku_daemon.runner import tidying as tidying_module
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import AttemptState
from protocol.models.task import TaskSpec
from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until

RUNNING = AttemptState.RUNNING


class Tidied(MockBackend):
    """Keeps what was wanted each time, and fails as it is told."""

    def __init__(self, world: MockWorld) -> None:
        super().__init__(world)
        self.wanted: list[list[Handle]] = []
        self.fails: Exception | None = None

    async def tidy(self, wanted: Collection[Handle]) -> None:
        self.wanted.append(list(wanted))
        if self.fails is not None:
            raise self.fails
        await super().tidy(wanted)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidying_module, "_PERIOD_S", 0.005)


def leave_one(world: MockWorld, backend: MockBackend) -> str:
    """Leave a launch on the machine that no vault knows."""
    spec = TaskSpec(command=("mock",))
    launch = Launch(task=TaskId(99), attempt=1, batch=BatchId(1), spec=spec)
    key = str(backend.plan(launch).data["key"])
    world.runs[key] = None
    return key


async def test_what_an_earlier_run_left_is_removed_and_what_runs_is_not(
    host: FakeHost, machine: Machine
) -> None:
    tidied = Tidied(machine.world)
    left = leave_one(machine.world, tidied)
    await machine.start(tidied)
    host.order(a_start(1, run_s="forever"), a_start(2, prepare_s="forever"))
    await until(lambda: host.state(1) is RUNNING)
    await until(lambda: left not in machine.world.runs)
    again = leave_one(machine.world, tidied)
    await until(lambda: again not in machine.world.runs)
    assert len(tidied.wanted[-1]) == 2
    await machine.crash()
    after = Tidied(machine.world)
    await machine.start(after)
    await until(lambda: after.wanted)
    assert len(machine.world.runs) == 1


async def test_an_end_that_the_host_does_not_know_yet_is_still_wanted(
    host: FakeHost, machine: Machine
) -> None:
    """Removed too early it would be taken for what never began, and be run again."""
    tidied = Tidied(machine.world)
    await machine.start(tidied)
    host.answers_reports.clear()
    host.order(a_start(1))
    await until(lambda: host.has_ended(1))
    seen = len(tidied.wanted)
    await until(lambda: len(tidied.wanted) > seen + 2)
    assert len(tidied.wanted[-1]) == 1
    assert len(machine.world.runs) == 1
    host.answers_reports.set()
    await machine.settled("1-1")
    await until(lambda: tidied.wanted[-1] == [])


async def test_a_runner_that_its_host_does_not_take_in_removes_nothing(
    host: FakeHost, machine: Machine
) -> None:
    """It may be a copy: what it does not know of may be what its original runs."""
    host.refuses = True
    tidied = Tidied(machine.world)
    await machine.start(tidied)
    await until(lambda: host.refusals >= 3)
    assert tidied.wanted == []
    host.refuses = False
    await until(lambda: tidied.wanted)


async def test_a_backend_that_cannot_tidy_up_says_so_once(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    tidied = Tidied(machine.world)
    tidied.fails = RuntimeError("a bug")
    await machine.start(tidied)
    await until(lambda: len(tidied.wanted) > 3)
    warnings = [one for one in caplog.records if "cannot tidy up" in one.message]
    assert [one.levelno for one in warnings] == [logging.WARNING]


async def test_a_backend_that_is_away_is_asked_the_next_time(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    tidied = Tidied(machine.world)
    left = leave_one(machine.world, tidied)
    await machine.start(tidied)
    machine.world.away = "dockerd does not answer"
    again = leave_one(machine.world, tidied)
    seen = len(tidied.wanted)
    await until(lambda: len(tidied.wanted) > seen + 2)
    machine.world.away = ""
    await until(lambda: not {left, again} & machine.world.runs.keys())
    assert "cannot tidy up" not in caplog.text
