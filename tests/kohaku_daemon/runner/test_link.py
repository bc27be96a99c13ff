"""What passes on a link: orders, reports that are kept until the host has them, heartbeats."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Collection, Iterator

import pytest
from msgspec.structs import replace

from kohaku_daemon.backends.base import OnProgress
from kohaku_daemon.backends.mock import MockBackend
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.runner.memory import Memory
from kohaku_daemon.runner.outbox import MOST_REPORTS
from kohaku_daemon.store.vault import Vault
from protocol.errors import Unavailable
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import AttemptState, OrderKill, OrderPause, OrderPull, OrderResume
from protocol.models.environment import ImageReading, Version, WantedImage
from protocol.models.task import Cause, Exit, TaskSpec
from tests.kohaku_daemon.runner.fake_host import FakeHost, said
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import keep, until

ACCEPTED, RUNNING, PAUSED, ENDED = AttemptState


async def test_a_task_runs_and_the_host_hears_how_it_ended(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, stdout="hello", exit="3"))
    await machine.settled("1-1")
    last = host.reports[-1]
    assert (last.state, last.exit) == (ENDED, Exit(Cause.EXITED, code=3))
    assert last.started_at > 0
    assert machine.output("1-1") == "hello"
    await until(lambda: not (machine.config.data / "scratch" / "1-1").exists())
    assert machine.world.runs == {}


async def test_a_repeated_order_launches_once(host: FakeHost, machine: Machine) -> None:
    await machine.start()
    start = a_start(1, stdout="once", run_s="forever")
    host.order(start, start)
    await until(lambda: host.state(1) is RUNNING)
    host.cut()
    host.order(start)
    await until(lambda: len(host.registers) == 2)
    host.order(OrderKill(task=TaskId(1), attempt=1), start)
    await machine.settled("1-1")
    host.order(start)
    host.order(a_start(2))
    await machine.settled("2-1")
    assert machine.output("1-1") == "once"


async def test_a_kill_that_comes_first_wins(host: FakeHost, machine: Machine) -> None:
    await machine.start()
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await machine.settled("1-1")
    host.order(a_start(1, stdout="never"), a_start(2))
    await machine.settled("2-1")
    assert host.state(1) is ENDED
    assert machine.output("1-1") == ""


async def test_pause_and_resume_keep_their_order(host: FakeHost, machine: Machine) -> None:
    await machine.start()
    pause = OrderPause(task=TaskId(1), attempt=1)
    resume = OrderResume(task=TaskId(1), attempt=1)
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is RUNNING)
    host.order(pause, resume, pause)
    await until(lambda: host.state(1) is PAUSED)
    host.order(resume, OrderKill(task=TaskId(1), attempt=1))
    killed = await machine.settled("1-1")
    assert killed.exit is not None
    assert killed.exit.cause is Cause.SIGNALLED


async def test_a_backend_that_is_not_there_fails_the_start(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, backend="docker"))
    await machine.settled("1-1")
    exit_ = host.reports[-1].exit
    assert exit_ is not None
    assert exit_.cause is Cause.START_FAILED
    assert exit_.message == "backend docker is not on this node; there is: mock"


async def test_a_report_is_kept_until_the_host_has_it(host: FakeHost, machine: Machine) -> None:
    host.answers_reports.clear()
    await machine.start()
    host.order(a_start(1, exit="7"))
    # Unanswered: what follows the first report waits for its answer.
    await until(lambda: host.reports and machine.launches()["1-1"].state is ENDED)
    assert not machine.launches()["1-1"].settled

    await machine.crash()
    await machine.start()
    await until(lambda: len(host.registers) == 2)
    (report,) = host.registers[1].attempts
    assert (report.state, report.exit) == (ENDED, Exit(Cause.EXITED, code=7))
    # The answer to a register is as good as one to a report.
    await machine.settled("1-1")
    host.cut()
    await until(lambda: len(host.registers) == 3)
    assert host.registers[2].attempts == ()


async def test_reports_that_gather_go_together_and_only_the_newest_of_each(
    host: FakeHost, machine: Machine
) -> None:
    host.answers_reports.clear()
    await machine.start()
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.reports)
    host.order(*(a_start(task) for task in range(2, 12)))
    await until(lambda: sum(record.state is ENDED for record in machine.launches().values()) == 10)
    host.reports.clear()
    host.answers_reports.set()
    await until(lambda: sum(record.settled for record in machine.launches().values()) == 10)
    ended = sorted(report for report in said(host.reports) if report[0] != 1)
    assert ended == [(task, "ended") for task in range(2, 12)]


async def test_more_launches_than_fit_a_message_are_all_registered(
    host: FakeHost, machine: Machine
) -> None:
    count = 2 * MOST_REPORTS + 1
    spec = TaskSpec(command=("true",))
    vault = Vault.open(machine.config.data / "vault.sqlite")
    records = {}
    for task in range(1, count + 1):
        launch = Launch(task=TaskId(task), attempt=1, batch=BatchId(1), spec=spec)
        record = LaunchRecord(launch=launch, state=ENDED, exit=Exit(Cause.EXITED, code=0))
        records[record.key] = record
    memory = Memory(vault)
    await keep(memory, records)
    memory.close()

    await machine.start()
    await until(lambda: len(host.registers) == 3)
    assert [register.more for register in host.registers] == [True, True, False]
    assert {report.task for report in host.reports} == set(range(1, count + 1))
    await until(lambda: all(record.settled for record in machine.launches().values()))


async def test_heartbeats_tell_of_the_machine_and_its_tasks(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    await until(lambda: host.beats)
    assert host.beats[0].memory_total > 0
    assert host.registers[0].inventory.default_backend == "mock"
    assert host.registers[0].inventory.cores
    host.order(a_start(5, run_s="forever", memory="4096"))
    await until(lambda: host.beats[-1].tasks)
    (task,) = host.beats[-1].tasks
    assert (task.task, task.memory) == (5, 4096)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Give a switch: while it holds anything, nothing of launches can be written."""
    switch: list[bool] = []
    write = Vault.write

    def failing(vault: Vault, puts: dict[str, bytes], drops: tuple[str, ...] = ()) -> None:
        if switch and any(key.startswith(("launch/", "fences/")) for key in puts):
            raise Unavailable(f"the store failed: {os.strerror(errno.ENOSPC)}")
        write(vault, puts, drops)

    monkeypatch.setattr(Vault, "write", failing)
    monkeypatch.setattr("kohaku_daemon.runner.loop._RETRY_FIRST_S", 0.01)
    yield switch
    switch.clear()


async def test_a_runner_that_cannot_remember_starts_nothing_and_says_why(
    host: FakeHost, machine: Machine, full: list[bool]
) -> None:
    await machine.start()
    await until(lambda: host.beats)
    full.append(True)
    host.order(a_start(1, stdout="late"))
    await until(lambda: host.beats[-1].troubles)
    (trouble,) = host.beats[-1].troubles
    assert "cannot keep what it starts" in trouble
    assert "No space left" in trouble
    beats = len(host.beats)
    await until(lambda: len(host.beats) > beats + 3)  # it goes on beating
    assert host.reports == []
    assert machine.world.runs == {}

    full.clear()
    await machine.settled("1-1")
    assert machine.output("1-1") == "late"
    await until(lambda: not host.beats[-1].troubles)


async def test_while_a_runner_cannot_remember_a_task_can_be_ended_and_its_end_is_told(
    host: FakeHost, machine: Machine, full: list[bool]
) -> None:
    await machine.start()
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is RUNNING)
    full.append(True)
    host.order(a_start(2, stdout="late"))
    await until(lambda: host.beats[-1].troubles)
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await until(lambda: host.state(1) is ENDED)
    assert machine.launches()["1-1"].state is ACCEPTED

    # A host that is reached anew hears of what is kept, and gives the other order again.
    host.cut()
    await until(lambda: len(host.registers) == 2)
    assert host.state(2) is None
    full.clear()
    host.order(a_start(2, stdout="late"))
    await machine.settled("2-1")
    assert machine.output("2-1") == "late"


async def test_an_end_that_was_told_and_not_kept_is_found_again(
    host: FakeHost, machine: Machine, full: list[bool]
) -> None:
    await machine.start()
    host.order(a_start(1, run_s="forever", on_term="5"))
    await until(lambda: host.state(1) is RUNNING)
    full.append(True)
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await until(lambda: host.state(1) is ENDED)
    await machine.crash()
    full.clear()

    await machine.start()
    record = await machine.settled("1-1")
    assert record.exit == Exit(Cause.EXITED, code=5)
    said = {report.exit for report in host.reports if report.state is ENDED}
    assert said == {record.exit}


async def test_a_task_is_ended_at_its_time_limit_while_the_host_is_away(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    order = a_start(1, run_s="forever")
    host.order(replace(order, spec=replace(order.spec, time_limit_s=0.3)))
    await until(lambda: host.state(1) is RUNNING)
    await host.leave()
    await until(lambda: machine.launches()["1-1"].state is ENDED)
    await host.arrive()
    record = await machine.settled("1-1")
    assert record.exit == Exit(Cause.TIME_LIMIT, signal=15)


async def test_a_time_limit_holds_over_a_restart_of_the_runner(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    order = a_start(1, run_s="forever")
    host.order(replace(order, spec=replace(order.spec, time_limit_s=0.5)))
    await until(lambda: host.state(1) is RUNNING)
    (run,) = machine.world.runs.values()
    await machine.crash()
    assert run is not None
    await until(lambda: machine.world.clock.monotonic() > run.begun + 0.5)
    assert run.exit is None  # nobody was there to end it

    await machine.start()
    record = await machine.settled("1-1")
    assert record.exit is not None
    assert record.exit.cause is Cause.TIME_LIMIT


async def test_an_order_to_bring_an_image_starts_nothing_and_holds_nothing_up(
    host: FakeHost, machine: Machine
) -> None:
    fetched: list[str] = []

    class Holder:
        async def fetch(self, image: WantedImage, on_progress: OnProgress) -> None:
            fetched.append(image.environment)
            await asyncio.Event().wait()

        async def collect(self, wanted: Collection[str] = ()) -> int:
            return 0

        def name_of(self, launch: Launch) -> str:
            return ""

        def readings(self) -> tuple[ImageReading, ...]:
            return (ImageReading("abc", percent=43.0),) if fetched else ()

    class BackendWithImages(MockBackend):
        images = Holder()

    await machine.start(BackendWithImages(machine.world))
    version = Version(digest="abc", size=1, pieces="", image="sha256:1")
    host.order(OrderPull(image=WantedImage(environment="demo", version=version)), a_start(1))
    await machine.settled("1-1")
    await until(lambda: fetched == ["demo"])
    await until(lambda: host.beats[-1].images == (ImageReading("abc", percent=43.0),))
    await machine.stop()
