"""Backends that misbehave: what the task's owner is told, and that the runner goes on."""

from __future__ import annotations

import asyncio
import re

import pytest

from kohaku_daemon.backends.base import BackendFailed, TaskFolders
from kohaku_daemon.backends.mock import MockBackend
from kohaku_daemon.core.workload import Handle, Launch, Started
from protocol.ids import TaskId
from protocol.messages.runner import AttemptReport, AttemptState, OrderKill, OrderPause
from protocol.models.node import TaskReading
from protocol.models.task import Cause
from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until

RUNNING, PAUSED, ENDED = AttemptState.RUNNING, AttemptState.PAUSED, AttemptState.ENDED
SECRET = "postgres://user:hunter2@db"


def last(host: FakeHost, task: int = 1) -> AttemptReport:
    return [report for report in host.reports if report.task == task][-1]


async def test_a_start_that_is_refused_fails_with_the_backends_words(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, start_error="no such image: " + "x" * 10_000))
    await machine.settled("1-1")
    exit_ = last(host).exit
    assert exit_ is not None
    assert exit_.cause is Cause.START_FAILED
    assert exit_.message.startswith("no such image: xxx")
    assert len(exit_.message) == 2000


class Buggy(MockBackend):
    """Raises what no backend may, before or after it has begun."""

    begins = False

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        if launch.task != 1:
            return await super().start(launch, handle, folders)
        if self.begins:
            await super().start(launch, handle, folders)
        raise KeyError(SECRET)


async def test_a_bug_in_a_start_that_never_began_fails_it_with_an_incident(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    await machine.start(Buggy(machine.world))
    host.order(a_start(1), a_start(2))
    await machine.settled("1-1")
    await machine.settled("2-1")
    exit_ = last(host).exit
    assert exit_ is not None
    assert exit_.cause is Cause.START_FAILED
    found = re.search(r"incident ([0-9a-f]{8})", exit_.message)
    assert found is not None
    assert found[1] in caplog.text
    assert SECRET not in exit_.message
    assert last(host, 2).exit is not None


async def test_a_bug_in_a_start_that_has_begun_leaves_a_running_task(
    host: FakeHost, machine: Machine
) -> None:
    buggy = Buggy(machine.world)
    buggy.begins = True
    await machine.start(buggy)
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is RUNNING)
    assert "incident" in last(host).note
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await machine.settled("1-1")


class Stubborn(MockBackend):
    """Does not pause."""

    async def pause(self, handle: Handle) -> None:
        raise BackendFailed("this node cannot freeze processes")


async def test_what_a_backend_cannot_do_is_a_note_and_not_an_end(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start(Stubborn(machine.world))
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is RUNNING)
    host.order(OrderPause(task=TaskId(1), attempt=1))
    await until(lambda: last(host).note == "this node cannot freeze processes")
    assert host.state(1) is RUNNING


class Slow(MockBackend):
    """Starts when it is told to, and counts how many wait for that."""

    waiting = 0
    most = 0

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.world)
        self.go = asyncio.Event()

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            await self.go.wait()
        finally:
            self.waiting -= 1
        return await super().start(launch, handle, folders)


async def test_starts_are_bounded_and_a_kill_meanwhile_is_not_forgotten(
    host: FakeHost, machine: Machine
) -> None:
    slow = Slow(machine)
    await machine.start(slow)
    host.order(*(a_start(task, run_s="forever") for task in range(1, 21)))
    await until(lambda: slow.waiting == 16)
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await until(lambda: machine.launches()["1-1"].kill_asked)
    slow.go.set()
    await machine.settled("1-1")
    await until(lambda: all(host.state(task) is RUNNING for task in range(2, 21)))
    assert slow.most == 16


class Unreadable(MockBackend):
    """Hangs when it is asked for figures of task 1."""

    async def read(self, handle: Handle) -> TaskReading | None:
        if handle.data["task"] == 1:
            await asyncio.Event().wait()
        return await super().read(handle)


async def test_a_task_that_cannot_be_read_takes_no_figures_from_others(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.readings._LONGEST_S", 0.02)
    monkeypatch.setattr("kohaku_daemon.runner.readings._PERIOD_S", 0.02)
    await machine.start(Unreadable(machine.world))
    host.order(a_start(1, run_s="forever"), a_start(2, run_s="forever"))
    await until(lambda: host.beats and [task.task for task in host.beats[-1].tasks] == [2])
