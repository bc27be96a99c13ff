"""What the loop promises: on the disk first, then out; together what came together; and while
the disk takes nothing, what runs can be ended and is told of."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kohaku_daemon.clock import SystemClock
from kohaku_daemon.core.node.actions import (
    KillLaunch,
    NodeAction,
    RemoveLaunch,
    SendReport,
    StartLaunch,
)
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.events import (
    KillOrdered,
    LaunchExited,
    LaunchStarted,
    ReportsTaken,
    StartOrdered,
)
from kohaku_daemon.core.workload import Handle, Launch, Started
from kohaku_daemon.runner.loop import NodeLoop
from kohaku_daemon.runner.memory import Memory
from kohaku_daemon.store.vault import Vault
from kohaku_daemon.supervise import spawn
from protocol.errors import Unavailable, Unsupported
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import AttemptState
from protocol.models.task import Cause, Exit, TaskSpec
from tests.kohaku_daemon.runner.waiting import until

HANDLE = Handle(backend="mock")


def an_order(task: int) -> StartOrdered:
    spec = TaskSpec(command=("true",))
    return StartOrdered(
        Launch(task=TaskId(task), attempt=1, batch=BatchId(task), spec=spec), HANDLE
    )


class Disk:
    """The vault's ``write``, which can be made to hang or to fail, and counts."""

    def __init__(self, vault: Vault) -> None:
        self._write = vault.write
        self.free = threading.Event()
        self.free.set()
        self.is_full = False
        self.writes: list[list[str]] = []

    def __call__(self, puts: Mapping[str, bytes], drops: list[str]) -> None:
        assert self.free.wait(10)
        if self.is_full:
            raise Unavailable("the store failed: database or disk is full")
        self.writes.append(sorted(puts))
        self._write(puts, drops)


class Shell:
    """A loop over a real vault; what it carries out is kept."""

    def __init__(self, memory: Memory, disk: Disk) -> None:
        self.memory = memory
        self.disk = disk
        self.done: list[NodeAction] = []
        self.prepared: list[NodeAction] = []
        self.loop = NodeLoop(NodeEngine(), memory, SystemClock())

    def prepare(self, actions: Sequence[NodeAction]) -> None:
        self.prepared += actions

    def carry_out(self, actions: Sequence[NodeAction]) -> None:
        self.done += actions

    def kept(self) -> list[tuple[str, AttemptState]]:
        return [(record.key, record.state) for record in self.memory.launches()]

    def started(self) -> list[str]:
        return [action.launch.key for action in self.done if isinstance(action, StartLaunch)]


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    return tmp_path / "vault.sqlite"


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Shell]:
    vault = Vault.open(path)
    disk = Disk(vault)
    vault.write = disk  # type: ignore[method-assign, assignment]
    memory = Memory(vault)
    shell = Shell(memory, disk)
    job = spawn(shell.loop.run(memory.launches(), shell), name="loop")
    try:
        yield shell
    finally:
        disk.free.set()
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        memory.close()


async def test_nothing_goes_out_before_it_is_on_the_disk(vault: Path) -> None:
    async with running(vault) as shell:
        shell.disk.free.clear()
        shell.loop.post(an_order(1))
        asked = spawn(shell.loop.committed(), name="ask")
        # The loop has nothing else to do, so it has come to the disk after these rounds.
        for _ in range(20):
            await asyncio.sleep(0)
        assert (shell.done, asked.done(), shell.kept()) == ([], False, [])

        shell.disk.free.set()
        await asked
        (attempt,) = shell.loop.attempts()
        assert attempt.state is AttemptState.ACCEPTED
        assert [type(action) for action in shell.done] == [SendReport, StartLaunch]
        assert shell.prepared == shell.done
        assert shell.kept() == [("1-1", AttemptState.ACCEPTED)]


async def test_what_comes_during_a_commit_shares_the_next_one(vault: Path) -> None:
    async with running(vault) as shell:
        shell.disk.free.clear()
        shell.loop.post(an_order(1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in range(2, 102):
            shell.loop.post(an_order(task))
        shell.disk.free.set()
        await shell.loop.committed()
        assert [len(write) for write in shell.disk.writes] == [1, 100]
        assert shell.started() == [f"{task}-1" for task in range(1, 102)]


async def test_a_full_disk_holds_everything_back_until_there_is_room(
    vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.loop._RETRY_FIRST_S", 0.01)
    async with running(vault) as shell:
        shell.disk.is_full = True
        shell.loop.post(an_order(1))
        await until(lambda: shell.loop.trouble)
        assert "disk is full" in shell.loop.trouble
        assert shell.done == []

        shell.disk.is_full = False
        await shell.loop.committed()
        assert not shell.loop.trouble
        assert shell.started() == ["1-1"]


async def test_while_the_disk_is_full_what_runs_can_be_ended_and_its_end_is_told(
    vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.loop._RETRY_FIRST_S", 0.01)
    async with running(vault) as shell:
        shell.loop.post(an_order(1))
        shell.loop.post(LaunchStarted("1-1", Started(started_at=1.0)))
        await shell.loop.committed()
        shell.disk.is_full = True
        changed = shell.loop.trouble_changed
        shell.loop.post(an_order(2))
        await shell.loop.kept_up()  # which an order behind it must not wait for
        assert shell.loop.trouble
        assert changed.is_set()
        shell.done.clear()
        shell.loop.post(KillOrdered(TaskId(1), 1, 5.0))
        await until(lambda: shell.done)
        assert [type(action) for action in shell.done] == [KillLaunch]

        shell.loop.post(LaunchExited("1-1", Exit(Cause.SIGNALLED, signal=15), 1.0, 2.0))
        await until(lambda: len(shell.done) > 1)
        report = shell.done[-1]
        assert isinstance(report, SendReport)
        assert report.report.state is AttemptState.ENDED
        # A new link is told of what is kept, and gives the other order again if it is wanted.
        assert [attempt.task for attempt in shell.loop.attempts()] == [1]
        shell.loop.post(an_order(3))
        shell.loop.post(an_order(2))
        assert [attempt.task for attempt in shell.loop.attempts()] == [1]
        shell.loop.post(an_order(2))
        assert shell.started() == []

        shell.disk.is_full = False
        await shell.loop.committed()
        assert shell.started() == ["2-1"]
        assert shell.kept() == [("1-1", AttemptState.ENDED), ("2-1", AttemptState.ACCEPTED)]


async def test_what_nobody_waits_for_is_written_soon_all_the_same(
    vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.loop._PUT_OFF_S", 0.01)
    async with running(vault) as shell:
        shell.loop.post(an_order(1))
        shell.loop.post(LaunchStarted("1-1", Started(started_at=1.0)))
        await shell.loop.committed()
        shell.loop.post(LaunchExited("1-1", Exit(Cause.EXITED, code=0), 1.0, 2.0))
        await until(lambda: shell.kept() == [("1-1", AttemptState.ENDED)])
        (attempt,) = shell.loop.attempts()
        shell.loop.post(ReportsTaken((attempt,)))
        await until(lambda: shell.memory.launches()[0].settled)
        assert len(shell.disk.writes) == 3


async def test_an_end_and_the_word_that_it_is_known_are_one_write_whatever_starts_meanwhile(
    vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.loop._PUT_OFF_S", 60.0)
    async with running(vault) as shell:
        shell.loop.post(an_order(1))
        shell.loop.post(LaunchStarted("1-1", Started(started_at=1.0)))
        await shell.loop.kept_up()
        shell.loop.post(LaunchExited("1-1", Exit(Cause.EXITED, code=0), 1.0, 2.0))
        shell.loop.post(an_order(2))
        await shell.loop.kept_up()
        ended = shell.loop.report("1-1")
        assert ended is not None
        shell.loop.post(ReportsTaken((ended,)))
        shell.loop.post(an_order(3))
        await shell.loop.kept_up()
        assert shell.disk.writes == [[f"launch/{task}-1"] for task in (1, 2, 3)]
        assert not [one for one in shell.done if isinstance(one, RemoveLaunch)]

        await shell.loop.committed()
        assert shell.disk.writes[3:] == [["fences/0000000000000000"]]
        assert [one.key for one in shell.done if isinstance(one, RemoveLaunch)] == ["1-1"]
        settled = {record.key: record.settled for record in shell.memory.launches()}
        assert settled == {"1-1": True, "2-1": False, "3-1": False}


async def test_a_disk_that_hangs_is_trouble(vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.loop._PATIENCE_S", 0.05)
    async with running(vault) as shell:
        shell.disk.free.clear()
        shell.loop.post(an_order(1))
        await shell.loop.kept_up()
        assert shell.loop.trouble == "the disk has not answered for 0.05 s"
        assert shell.done == []
        shell.disk.free.set()
        await shell.loop.committed()
        assert not shell.loop.trouble
        assert shell.started() == ["1-1"]


async def test_a_bug_of_ours_stops_the_runner(vault: Path) -> None:
    opened = Vault.open(vault)
    memory = Memory(opened)
    shell = Shell(memory, Disk(opened))

    def broken(actions: Sequence[NodeAction]) -> None:
        raise KeyError("a bug")

    shell.carry_out = broken  # type: ignore[method-assign]
    job = spawn(shell.loop.run([], shell), name="loop")
    await asyncio.sleep(0)
    shell.loop.post(an_order(1))
    try:
        with pytest.raises(KeyError, match="a bug"):
            await asyncio.wait_for(job, 10)
    finally:
        memory.close()


async def test_a_record_is_kept_as_it_was_when_its_event_was_handled(vault: Path) -> None:
    async with running(vault) as shell:
        shell.loop.post(an_order(1))
        shell.loop.post(KillOrdered(TaskId(1), 1, 5.0))
        await shell.loop.committed()
        (record,) = shell.memory.launches()
        assert (record.kill_asked, record.grace_s) == (True, 5.0)


async def test_what_was_committed_is_recovered_and_asked_for(vault: Path) -> None:
    async with running(vault) as shell:
        shell.loop.post(an_order(1))
        shell.loop.post(LaunchStarted("1-1", Started(started_at=1.0)))
        await shell.loop.committed()
    async with running(vault) as shell:
        await until(lambda: shell.done)
        assert [type(action).__name__ for action in shell.done] == ["AdoptLaunch"]
        assert shell.loop.report("1-1") is not None


async def test_an_unreadable_launch_stops_the_runner_rather_than_being_lost(vault: Path) -> None:
    opened = Vault.open(vault)
    opened.write({"launch/7-1": b"\xc1 from the future"})
    memory = Memory(opened)
    try:
        with pytest.raises(Unsupported, match="launch/7-1"):
            memory.launches()
    finally:
        memory.close()
