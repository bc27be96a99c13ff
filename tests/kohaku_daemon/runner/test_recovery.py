"""A runner that ends anywhere, and the next one over the same vault and the same tasks."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from kohaku_daemon.backends.base import BackendFailed, TaskFolders
from kohaku_daemon.backends.mock import MockBackend, MockWorld
from kohaku_daemon.core.workload import Finding, Handle, Launch, Started
from protocol.ids import TaskId
from protocol.messages.runner import AttemptState, OrderKill, OrderStart
from protocol.models.task import Cause, Exit
from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until

RUNNING, ENDED = AttemptState.RUNNING, AttemptState.ENDED


def order_again_if_unknown(host: FakeHost, start: OrderStart) -> None:
    """Do what the host does at a register: an assigned task the runner has not seen is ordered."""
    if start.task not in {report.task for report in host.registers[-1].attempts}:
        host.order(start)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("commit", "answers"),
    [
        pytest.param(1, True, id="order"),
        pytest.param(2, False, id="end"),
        pytest.param(2, True, id="settled"),
    ],
)
async def test_a_crash_around_any_commit_launches_once_and_loses_no_end(
    host: FakeHost, machine: Machine, commit: int, answers: bool, after: bool
) -> None:
    """The commits of a launch: its order, its end if the host takes its time, that it knows it."""
    machine.fails_at, machine.fails_after = commit, after
    if not answers:
        host.answers_reports.clear()
    await machine.start()
    start = a_start(1, stdout="x", exit="3")
    host.order(start)
    await machine.lose_power()

    machine.fails_at = 0
    host.answers_reports.set()
    await machine.start()
    await until(lambda: len(host.registers) == 2)
    if not host.has_ended(1):
        order_again_if_unknown(host, start)
    record = await machine.settled("1-1")
    assert machine.output("1-1") == "x"
    assert record.exit == Exit(Cause.EXITED, code=3)
    said = {report.exit for report in host.reports if report.state is ENDED}
    assert said == {Exit(Cause.EXITED, code=3)}
    await until(lambda: not (machine.config.data / "scratch" / "1-1").exists())
    await until(lambda: machine.world.runs == {})


class Stalling(MockBackend):
    """Starts, and is never heard of again."""

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        await super().start(launch, handle, folders)
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_start_whose_answer_never_came_is_adopted(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.effects._FINISH_S", 0.01)
    await machine.start(Stalling(machine.world))
    host.order(a_start(1, run_s="forever", stdout="x"))
    await until(lambda: machine.world.runs)
    assert host.state(1) is not RUNNING
    await machine.stop()

    await machine.start()
    await until(lambda: host.state(1) is RUNNING)
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await machine.settled("1-1")
    assert machine.output("1-1") == "x"


async def test_stopping_the_runner_ends_no_task(host: FakeHost, machine: Machine) -> None:
    await machine.start()
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is RUNNING)
    await machine.stop()
    await until(lambda: host.links == 0)

    await machine.start()
    await until(lambda: len(host.registers) == 2)
    assert [report.state for report in host.registers[1].attempts] == [RUNNING]


async def test_what_ended_while_the_runner_was_away_is_told_truly(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, run_s="0.05", signal="11"))
    await until(lambda: host.state(1) is RUNNING)
    (run,) = machine.world.runs.values()
    await machine.crash()
    assert run is not None
    await until(lambda: machine.world.clock.monotonic() > run.find_next())

    await machine.start()
    record = await machine.settled("1-1")
    assert record.exit == Exit(Cause.SIGNALLED, signal=11)


async def test_an_end_that_was_asked_for_is_asked_for_again(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    # It ignores SIGTERM, so its end is still to come when the runner dies.
    host.order(a_start(1, run_s="forever", on_term="ignore"))
    await until(lambda: host.state(1) is RUNNING)
    host.order(OrderKill(task=TaskId(1), attempt=1, grace_s=0.3))
    await until(lambda: machine.launches()["1-1"].kill_asked)
    await machine.crash()

    await machine.start()
    record = await machine.settled("1-1")
    assert record.exit == Exit(Cause.SIGNALLED, signal=9)


class Unsure(MockBackend):
    """Cannot say at first what became of its launches."""

    asked = 0
    knows = False

    async def adopt(self, handle: Handle) -> Finding:
        self.asked += 1
        if not self.knows:
            raise BackendFailed("the container engine does not answer")
        return await super().adopt(handle)


async def test_nothing_is_said_to_the_host_before_every_fate_is_known(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.patience.FIRST_S", 0.01)
    await machine.start()
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is RUNNING)
    await machine.crash()
    machine.ready.clear()

    unsure = Unsure(machine.world)
    await machine.start(unsure)
    await until(lambda: unsure.asked >= 3)
    assert (machine.ready, len(host.registers)) == ([], 1)
    unsure.knows = True
    await until(lambda: len(host.registers) == 2)
    assert machine.ready == ["gpu-01"]
    assert host.registers[1].attempts[0].state is RUNNING


async def test_a_copy_of_a_data_folder_starts_nothing_that_its_original_may_start(
    host: FakeHost, machine: Machine, tmp_path: Path
) -> None:
    """The original died between an order and its start; both it and a copy of it come up."""
    machine.fails_at, machine.fails_after = 1, True
    await machine.start()
    host.order(a_start(1, stdout="x"))
    await machine.lose_power()
    copy = Machine(tmp_path / "copy", host)
    copy.world = MockWorld(name=machine.world.name)  # where it would run a second time
    shutil.copytree(machine.config.data, copy.config.data, dirs_exist_ok=True)

    machine.fails_at = 0
    host.refuses = True
    await copy.start()
    try:
        await until(lambda: host.refusals >= 3)
        assert copy.ready
        assert copy.launches()["1-1"].state is AttemptState.ACCEPTED
        assert copy.world.runs == {}
    finally:
        await copy.stop()
    host.refuses = False
    await machine.start()
    await machine.settled("1-1")
    assert machine.output("1-1") == "x"
    assert copy.output("1-1") == ""


async def test_what_waits_for_the_host_starts_when_it_comes_and_what_runs_does_not_wait(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(2, run_s="forever"))
    await until(lambda: host.state(2) is RUNNING)
    machine.fails_at, machine.fails_after = len(machine.launches()) + 1, True
    host.order(a_start(1, stdout="x"))
    await machine.lose_power()
    await host.leave()

    machine.fails_at = 0
    machine.ready.clear()
    await machine.start()
    await until(lambda: machine.ready)
    handle = machine.launches()["2-1"].handle
    assert handle is not None
    await machine.backend.kill(handle, 0.0)
    await until(lambda: machine.launches()["2-1"].state is ENDED)
    assert machine.output("1-1") == ""
    assert machine.launches()["1-1"].state is AttemptState.ACCEPTED
    await host.arrive()
    await machine.settled("1-1")
    assert machine.output("1-1") == "x"


async def test_fences_stay_over_restarts_and_go_in_the_order_they_came(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.core.node.engine._FENCED_LAUNCHES", 20)
    for first in range(1, 61, 20):
        await machine.start()
        for task in range(first, first + 20):
            host.order(a_start(task))
        for task in range(first, first + 20):
            await machine.settled(f"{task}-1")
        await machine.stop()
    await machine.start()
    await until(lambda: len(host.registers) == 4)
    kept = machine.launches()
    # One row may hold more than is left of it.
    assert {f"{task}-1" for task in range(41, 61)} <= kept.keys()
    assert len(kept) <= 40
    assert host.registers[-1].attempts == ()
    host.order(a_start(60, stdout="again"), a_start(61))
    await machine.settled("61-1")
    assert machine.output("60-1") == ""
