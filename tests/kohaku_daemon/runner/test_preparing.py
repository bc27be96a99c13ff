"""What a launch needs is brought before it is started: told, cut short, and waited for."""

from __future__ import annotations

import asyncio

import pytest

from kohaku_daemon.backends.base import BackendFailed, OnProgress
from kohaku_daemon.backends.mock import MockBackend
from kohaku_daemon.core.workload import Launch
from protocol.ids import TaskId
from protocol.messages.runner import AttemptState, OrderKill
from protocol.models.task import Cause, Exit
from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until

ACCEPTED, RUNNING, ENDED = AttemptState.ACCEPTED, AttemptState.RUNNING, AttemptState.ENDED
KILL = OrderKill(task=TaskId(1), attempt=1)
NEVER_BEGAN = Exit(Cause.KILLED, message="it never began")


def notes(host: FakeHost, state: AttemptState = ACCEPTED) -> list[str]:
    """Give what was said of task 1 in a state, each word once."""
    said = [one.note for one in host.reports if (one.task, one.state) == (1, state)]
    return list(dict.fromkeys(note for note in said if note))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.patience.FIRST_S", 0.01)


async def test_how_far_it_is_is_told_and_not_written_and_said_no_more_once_it_runs(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.preparing._TELL_S", 0.001)
    await machine.start()
    host.order(a_start(1, prepare_s="0.4", run_s="forever"))
    await until(lambda: "preparing 50 %" in notes(host))
    record = machine.launches()["1-1"]
    assert (record.state, record.note) == (ACCEPTED, "")
    await until(lambda: host.state(1) is RUNNING)
    assert notes(host) == sorted(notes(host), key=len)
    assert notes(host, RUNNING) == ["mock: nothing is run"]


class Chatty(MockBackend):
    """Says a thousand things about each launch."""

    said = False

    async def prepare(self, launch: Launch, on_progress: OnProgress) -> None:
        for step in range(1000):
            on_progress(f"step {step}")
            await asyncio.sleep(0)
        self.said = True
        await asyncio.Event().wait()


async def test_of_much_that_is_said_the_host_hears_the_newest_now_and_then(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.preparing._TELL_S", 0.3)
    chatty = Chatty(machine.world)
    await machine.start(chatty)
    host.order(a_start(1))
    await until(lambda: notes(host)[-1:] == ["step 999"])
    # As many as may be said in the time that it took, which is short.
    assert notes(host)[0] == "step 0"
    assert len(notes(host)) <= 3


async def test_what_cannot_be_prepared_fails_with_the_backends_words(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, prepare_error="there is no image nowhere:latest"))
    await machine.settled("1-1")
    assert host.reports[-1].exit == Exit(
        Cause.START_FAILED, message="there is no image nowhere:latest"
    )


class Buggy(MockBackend):
    """Raises what no backend may."""

    async def prepare(self, launch: Launch, on_progress: OnProgress) -> None:
        raise KeyError("postgres://user:hunter2@db")


async def test_a_bug_costs_its_own_launch_and_tells_no_secret(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start(Buggy(machine.world))
    host.order(a_start(1))
    await machine.settled("1-1")
    exit_ = host.reports[-1].exit
    assert exit_ is not None
    assert exit_.message.startswith("preparing it failed on its node, incident ")


async def test_a_launch_that_is_killed_while_it_is_prepared_never_begins(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, prepare_s="forever", stdout="it ran"))
    await until(lambda: notes(host) == ["preparing 0 %"])
    host.order(KILL)
    await machine.settled("1-1")
    assert (host.reports[-1].exit, host.reports[-1].note) == (NEVER_BEGAN, "")
    assert machine.world.runs == {}
    assert machine.output("1-1") == ""
    await until(lambda: not (machine.config.data / "scratch" / "1-1").exists())


async def test_many_are_prepared_at_once_and_stand_in_nobodys_way(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(*(a_start(task, prepare_s="forever") for task in range(2, 60)), a_start(1))
    await machine.settled("1-1")
    assert host.state(2) is ACCEPTED


class Deaf(MockBackend):
    """Does not listen when its preparation is let go of."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.world)
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.done = asyncio.Event()

    async def prepare(self, launch: Launch, on_progress: OnProgress) -> None:
        self.asked.set()
        while not self.go.is_set():
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                continue
        self.done.set()


async def test_a_backend_that_does_not_let_go_starts_nothing_all_the_same(
    host: FakeHost, machine: Machine
) -> None:
    deaf = Deaf(machine)
    await machine.start(deaf)
    host.order(a_start(1, stdout="it ran"))
    await deaf.asked.wait()
    host.order(KILL)
    await until(lambda: host.state(1) is ENDED)
    deaf.go.set()
    await deaf.done.wait()
    await machine.settled("1-1")
    assert host.reports[-1].exit == NEVER_BEGAN
    assert machine.output("1-1") == ""


async def test_a_preparation_that_a_crash_cuts_short_is_made_again(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, prepare_s="forever"))
    await until(lambda: notes(host) == ["preparing 0 %"])
    await machine.crash()
    host.reports.clear()
    await machine.start()
    await until(lambda: notes(host) == ["preparing 0 %"])
    host.order(KILL)
    await machine.settled("1-1")
    assert host.reports[-1].exit == NEVER_BEGAN


async def test_a_runner_that_stops_does_not_wait_for_a_preparation(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.effects._FINISH_S", 1000.0)
    await machine.start()
    host.order(a_start(1, prepare_s="forever"))
    await until(lambda: notes(host) == ["preparing 0 %"])
    async with asyncio.timeout(10):
        await machine.stop()


class OnceAway(MockBackend):
    """Cannot be asked for a while, and then refuses."""

    async def prepare(self, launch: Launch, on_progress: OnProgress) -> None:
        self._world.check()
        raise BackendFailed("and now it will never work")


async def test_it_waits_for_a_backend_that_is_away_and_says_so(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start(OnceAway(machine.world))
    machine.world.away = "dockerd does not answer"
    host.order(a_start(1))
    await until(lambda: notes(host) == ["waiting for mock: dockerd does not answer"])
    machine.world.away = ""
    await machine.settled("1-1")
    assert host.reports[-1].exit == Exit(Cause.START_FAILED, message="and now it will never work")


async def test_what_waits_for_a_backend_that_is_away_can_be_killed(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    machine.world.away = "dockerd does not answer"
    host.order(a_start(1))
    await until(lambda: notes(host))
    host.order(KILL)
    await until(lambda: host.state(1) is ENDED)
    assert host.reports[-1].exit == NEVER_BEGAN
    machine.world.away = ""
    await machine.settled("1-1")
