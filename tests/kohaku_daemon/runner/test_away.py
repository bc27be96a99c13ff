"""A backend whose daemon is down for a while: nothing is lost, run twice or guessed."""

from __future__ import annotations

import asyncio
import logging

import pytest

from kohaku_daemon.backends.base import TaskFolders
from kohaku_daemon.backends.mock import MockBackend
from kohaku_daemon.core.workload import Handle, Launch, Started
from protocol.ids import TaskId
from protocol.messages.runner import AttemptState, OrderKill, OrderPause, OrderResume
from protocol.models.task import Cause, Exit
from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until

ACCEPTED, RUNNING, ENDED = AttemptState.ACCEPTED, AttemptState.RUNNING, AttemptState.ENDED
DOWN = "dockerd does not answer"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.patience.FIRST_S", 0.01)


def last_note(host: FakeHost) -> str:
    return host.reports[-1].note if host.reports else ""


class Vanishing(MockBackend):
    """Goes away while it starts something; a start may go through unseen."""

    def __init__(self, machine: Machine, *, times: int = 1, unseen: bool = False) -> None:
        super().__init__(machine.world)
        self._left = times
        self._unseen = unseen
        self.handles: list[Handle] = []

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        self.handles.append(handle)
        if self._left:
            self._left -= 1
            self._world.away, self._world.starts_unseen = DOWN, self._unseen
        return await super().start(launch, handle, folders)


async def test_a_start_that_broke_off_and_never_began_is_made_under_a_new_handle(
    host: FakeHost, machine: Machine
) -> None:
    vanishing = Vanishing(machine)
    await machine.start(vanishing)
    host.order(a_start(1, stdout="once", run_s="forever"))
    await until(lambda: last_note(host) == f"waiting for mock: {DOWN}")
    assert host.state(1) is ACCEPTED
    machine.world.away = ""
    await until(lambda: host.state(1) is RUNNING)
    first, second = vanishing.handles
    assert first != second
    assert machine.launches()["1-1"].handle == second
    assert machine.output("1-1") == "once"
    assert last_note(host) == "mock: nothing is run"


async def test_a_start_that_broke_off_and_began_is_found_running(
    host: FakeHost, machine: Machine
) -> None:
    vanishing = Vanishing(machine, unseen=True)
    await machine.start(vanishing)
    host.order(a_start(1, stdout="once", run_s="forever"))
    await until(lambda: last_note(host) == f"waiting for mock: {DOWN}")
    machine.world.away = ""
    await until(lambda: host.state(1) is RUNNING)
    assert len(vanishing.handles) == 1
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await machine.settled("1-1")
    assert machine.output("1-1") == "once"


async def test_starts_that_break_off_keep_no_others_waiting(
    host: FakeHost, machine: Machine
) -> None:
    vanishing = Vanishing(machine, times=100)
    await machine.start(vanishing)
    host.order(*(a_start(task) for task in range(1, 31)))
    await until(lambda: len(vanishing.handles) >= 30)
    machine.world.away = ""
    vanishing._left = 0
    await until(lambda: all(host.state(task) is ENDED for task in range(1, 31)))


async def test_a_crash_while_nobody_knows_launches_once(host: FakeHost, machine: Machine) -> None:
    await machine.start(Vanishing(machine, unseen=True))
    host.order(a_start(1, stdout="once", run_s="forever"))
    await until(lambda: last_note(host) == f"waiting for mock: {DOWN}")
    await machine.crash()
    machine.world.away = ""
    await machine.start()
    await until(lambda: host.registers[-1].attempts and len(host.registers) == 2)
    assert host.registers[-1].attempts[0].state is RUNNING
    assert machine.output("1-1") == "once"


async def test_a_kill_is_not_lost_because_nobody_could_be_told(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, run_s="forever", on_term="ignore"))
    await until(lambda: host.state(1) is RUNNING)
    machine.world.away = DOWN
    host.order(OrderKill(task=TaskId(1), attempt=1, grace_s=0.0))
    await until(lambda: last_note(host) == f"its end is still waiting for mock: {DOWN}")
    machine.world.away = ""
    await machine.settled("1-1")
    assert host.reports[-1].exit == Exit(Cause.SIGNALLED, signal=9)


async def test_what_ended_meanwhile_is_killed_no_more(host: FakeHost, machine: Machine) -> None:
    await machine.start()
    host.order(a_start(1, run_s="0.1"))
    await until(lambda: host.state(1) is RUNNING)
    machine.world.away = DOWN
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await until(lambda: host.state(1) is ENDED)
    machine.world.away = ""
    await machine.settled("1-1")
    assert host.reports[-1].exit == Exit(Cause.EXITED, code=0)


async def test_pause_and_resume_are_refused_with_what_to_do(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is RUNNING)
    machine.world.away = DOWN
    host.order(OrderPause(task=TaskId(1), attempt=1))
    await until(lambda: last_note(host) == f"it cannot be paused now, ask again later: {DOWN}")
    host.order(OrderResume(task=TaskId(1), attempt=1))
    await until(lambda: last_note(host) == f"it cannot be resumed now, ask again later: {DOWN}")
    assert host.state(1) is RUNNING


async def test_what_has_ended_is_removed_once_its_backend_is_back(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    await machine.start()
    host.order(*(a_start(task, run_s="0.05") for task in range(1, 21)))
    await until(lambda: host.state(20) is RUNNING)
    machine.world.away = DOWN
    await until(lambda: "ended launches are removed later" in caplog.text)
    assert machine.world.runs
    machine.world.away = ""
    await until(lambda: not machine.world.runs)
    scratch = machine.config.data / "scratch"
    await until(lambda: not any((scratch / f"{task}-1").exists() for task in range(1, 21)))
    later = [one for one in caplog.records if "removed later" in one.message]
    assert len(later) == 1
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


async def test_a_runner_that_stops_does_not_wait_for_what_is_away(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.effects._FINISH_S", 1000.0)
    await machine.start(Vanishing(machine, unseen=True))
    host.order(a_start(1, run_s="forever"))
    await until(lambda: last_note(host) == f"waiting for mock: {DOWN}")
    async with asyncio.timeout(10):
        await machine.stop()
