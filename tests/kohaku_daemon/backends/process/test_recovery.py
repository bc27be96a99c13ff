"""What is killed between any two steps: the runner, the keeper, its guard, the machine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.process import conversation, tree
from kohaku_daemon.backends.process.backend import ProcessBackend
from kohaku_daemon.backends.process.record import Keeper, read_record
from kohaku_daemon.core.workload import Found, Handle
from protocol.models.task import Cause, Exit
from tests.kohaku_daemon.backends.conformance import DEADLINE_S, Rig, until
from tests.kohaku_daemon.backends.process.forms import Form
from tests.kohaku_daemon.backends.process.programs import sh

REPOSITORY = Path(__file__).resolve().parents[4]
TICKS = "i=0; while [ $i -lt 40 ]; do echo tick $i; i=$((i+1)); sleep 0.02; done; exit 23"


@dataclass
class Driver:
    """A runner in a process of its own, with one task."""

    process: asyncio.subprocess.Process
    handle: Handle

    async def die(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def drive(rig: Rig, form: Form, script: str) -> AsyncIterator[Driver]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.kohaku_daemon.backends.process.driver",
        str(rig.root), form.isolation.value, str(form.cgroups), script,
        cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = await process.stdout.readline()
        driver = Driver(process, msgspec.json.decode(line, type=Handle))
        rig.handles.append(driver.handle)
        yield driver
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def find_path(rig: Rig, handle: Handle) -> Path:
    name = "{task}-{attempt}-{plan}".format(**handle.data)
    return rig.root / "state" / name


def find_keeper(rig: Rig, handle: Handle) -> Keeper:
    keeper = read_record(str(find_path(rig, handle))).keeper
    assert keeper is not None
    return keeper


def kill_both(keeper: Keeper) -> None:
    """Kill a keeper and its guard, so that neither can go on for the other."""
    os.kill(keeper.guard, signal.SIGKILL)
    os.kill(keeper.pid, signal.SIGKILL)


def list_marked(handle: Handle) -> set[int]:
    """List the processes of a launch by their variables, whoever keeps them."""
    marks = frozenset({f"KOHAKU_TASK_ID={handle.data['task']}"})
    return tree.select_marked(tree.read_all(), marks)


def find_working(rig: Rig) -> int:
    """Give the pid of the keeper that takes launches."""
    assert isinstance(rig.backend, ProcessBackend)
    (pid,) = rig.backend.keeper_pids
    return pid


async def test_a_killed_runner_costs_no_line_and_no_exit_code(rig: Rig, form: Form) -> None:
    async with drive(rig, form, TICKS) as driver:
        await driver.die()
        finding = await rig.backend.adopt(driver.handle)
        assert finding.found is Found.RUNNING
        assert await rig.watch(driver.handle).wait() == Exit(Cause.EXITED, code=23)
        (stdout,) = (rig.root / "tasks").glob("*/stdout")
        assert stdout.read_text() == "".join(f"tick {number}\n" for number in range(40))


async def test_a_task_outlives_its_runner_and_ends_unseen(rig: Rig, form: Form) -> None:
    async with drive(rig, form, "sleep 0.3; exit 7") as driver:
        path = find_path(rig, driver.handle)
        await driver.die()
        await until(lambda: read_record(str(path)).ending is not None)
        finding = await rig.backend.adopt(driver.handle)
        assert finding.found is Found.ENDED
        assert finding.exit == Exit(Cause.EXITED, code=7)
        assert 0.25 < finding.ended_at - finding.started_at < DEADLINE_S


async def test_a_killed_keeper_costs_no_task_and_is_replaced(rig: Rig) -> None:
    handle, _ = await rig.start(sh("sleep 0.4; exit 5"))
    ended, first = rig.watch(handle), find_working(rig)
    os.kill(first, signal.SIGKILL)
    assert (await rig.run(sh("exit 6")))[0] == Exit(Cause.EXITED, code=6)
    assert find_working(rig) != first
    assert await ended.wait() == Exit(Cause.EXITED, code=5)


async def test_starts_that_a_killed_keeper_had_not_answered_run_once(rig: Rig) -> None:
    working = find_working(rig)
    os.kill(working, signal.SIGSTOP)
    launches = [rig.launch(sh(f"echo ran; exit {number}")) for number in range(5)]
    starts = [asyncio.ensure_future(rig.backend.start(*launch)) for launch in launches]
    await asyncio.sleep(0)
    os.kill(working, signal.SIGKILL)
    await asyncio.gather(*starts)
    for number, (_, handle, folders) in enumerate(launches):
        assert await rig.watch(handle).wait() == Exit(Cause.EXITED, code=number)
        assert folders.stdout.read_text() == "ran\n"


async def test_a_keeper_that_hangs_is_replaced(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "ANSWER_S", 0.3)
    working = find_working(rig)
    os.kill(working, signal.SIGSTOP)
    launch, handle, folders = rig.launch(sh("echo ran; exit 3"))
    await rig.backend.start(launch, handle, folders)
    assert find_working(rig) != working
    assert await rig.watch(handle).wait() == Exit(Cause.EXITED, code=3)
    assert folders.stdout.read_text() == "ran\n"


async def test_a_start_that_comes_too_late_does_not_run(rig: Rig) -> None:
    working = find_working(rig)
    launch, handle, folders = rig.launch(sh("echo ran"))
    os.kill(working, signal.SIGSTOP)
    start = asyncio.ensure_future(rig.backend.start(launch, handle, folders))
    await until(find_path(rig, handle).exists)
    other = rig.make()
    await other.open()
    assert (await other.adopt(handle)).found is Found.NEVER_STARTED
    await other.close()
    os.kill(working, signal.SIGCONT)
    with pytest.raises(BackendFailed, match="given up before it started"):
        await start
    assert not folders.stdout.exists()


async def test_a_start_after_remove_does_not_run(rig: Rig) -> None:
    working = find_working(rig)
    launch, handle, folders = rig.launch(sh("echo ran"))
    os.kill(working, signal.SIGSTOP)
    start = asyncio.ensure_future(rig.backend.start(launch, handle, folders))
    await until(find_path(rig, handle).exists)
    await rig.backend.remove(handle)
    os.kill(working, signal.SIGCONT)
    with pytest.raises(BackendFailed):
        await start
    assert not folders.stdout.exists()


async def test_a_launch_given_up_before_it_began_can_be_planned_and_started_anew(rig: Rig) -> None:
    launch, first, folders = rig.launch(sh("echo ran; exit 4"))
    assert (await rig.backend.adopt(first)).found is Found.NEVER_STARTED
    second = rig.backend.plan(launch)
    rig.handles.append(second)
    await rig.backend.start(launch, second, folders)
    assert await rig.watch(second).wait() == Exit(Cause.EXITED, code=4)
    with pytest.raises(BackendFailed, match="given up before it started"):
        await rig.backend.start(launch, first, folders)
    assert folders.stdout.read_text() == "ran\n"


# A child that left the session and has no parent any more must go as well.
TREE = "(setsid sleep 600 &); sleep 600 & echo ready; wait"


async def test_a_lost_launch_is_told_and_takes_its_tree_along(rig: Rig) -> None:
    handle = await rig.start_ready(sh(TREE), 1)
    assert len(list_marked(handle)) >= 3
    ended = rig.watch(handle)
    kill_both(find_keeper(rig, handle))
    exit_ = await ended.wait()
    assert exit_.cause is Cause.NODE_FAILED
    assert "killed the processes that keep the task" in exit_.message
    assert list_marked(handle) == set()
    assert len(ended.told) == 1


async def test_one_lost_while_nobody_looked_is_found_out(rig: Rig) -> None:
    handle = await rig.start_ready(sh(TREE), 1)
    await rig.backend.close()
    kill_both(find_keeper(rig, handle))
    rig.backend = rig.make()
    await rig.backend.open()
    finding = await rig.backend.adopt(handle)
    assert finding.found is Found.ENDED
    assert finding.exit is not None
    assert finding.exit.cause is Cause.NODE_FAILED
    assert list_marked(handle) == set()


async def test_what_a_program_leaves_behind_ends_with_it(rig: Rig) -> None:
    handle, _ = await rig.start(sh("(setsid sleep 600 &); sleep 0.2; exit 4"))
    ended = rig.watch(handle)
    await until(lambda: len(list_marked(handle)) >= 2)
    assert await ended.wait() == Exit(Cause.EXITED, code=4)
    assert list_marked(handle) == set()


async def test_what_hides_from_its_launch_ends_with_it(rig: Rig) -> None:
    length = f"{600 + os.getpid() / 1e6:.6f}"
    arguments = b"\0".join([b"sleep", length.encode(), b""])

    def is_there() -> bool:
        found = (Path(f"/proc/{pid}/cmdline") for pid in tree.read_all())
        return any(_read_bytes(path) == arguments for path in found)

    # No parent, a session of its own, and none of the variables.
    handle, _ = await rig.start(sh(f"(setsid env -i sleep {length} &); sleep 0.3; exit 4"))
    ended = rig.watch(handle)
    await until(is_there)
    assert await ended.wait() == Exit(Cause.EXITED, code=4)
    assert not is_there()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it is over
        return b""


async def test_a_restart_of_the_machine_is_told_apart(rig: Rig) -> None:
    _, handle, _ = rig.launch(sh("exit 0"))
    earlier = msgspec.structs.replace(handle, data={**handle.data, "boot": "an earlier one"})
    finding = await rig.backend.adopt(earlier)
    assert finding.found is Found.ENDED, "it may have run, and its traces been lost"
    assert finding.exit is not None
    assert finding.exit.cause is Cause.NODE_FAILED
    assert "restarted" in finding.exit.message


async def test_a_later_owner_of_the_keepers_pid_is_not_taken_for_it(rig: Rig) -> None:
    handle, _ = await rig.start(sh("exit 0"))
    await rig.watch(handle).wait()
    keeper = find_keeper(rig, handle)
    path = find_path(rig, handle)
    me = os.getpid()
    stranger = keeper._replace(pid=me, start=1, guard=me, guard_start=1)
    path.write_bytes(msgspec.json.encode(("keeper", *stranger)) + b"\n")
    finding = await rig.backend.adopt(handle)
    assert finding.found is Found.ENDED
    assert finding.exit is not None
    assert finding.exit.cause is Cause.NODE_FAILED
