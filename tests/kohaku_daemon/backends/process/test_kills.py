"""Keepers and guards killed at any moment: no exit code and no line is lost, none doubled."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from kohaku_daemon.backends.process import link, tree
from kohaku_daemon.backends.process.backend import ProcessBackend
from kohaku_daemon.backends.process.record import read_record
from protocol.models.task import Cause, Exit
from tests.kohaku_daemon.backends.conformance import DEADLINE_S, Rig, until
from tests.kohaku_daemon.backends.process.programs import sh

KILLS = 4
TASKS = 40
#: Writes more than a pipe holds, waits, and writes again.
SCRIPT = 'head -c "$1" /dev/zero; sleep "$2"; echo; echo end >&2; exit "$3"'


def get_keepers(rig: Rig) -> list[int]:
    assert isinstance(rig.backend, ProcessBackend)
    return rig.backend.keeper_pids


async def kill_now_and_then(rig: Rig, chance: random.Random, ended: list[int]) -> None:
    """Kill whichever keeper takes launches, with some ends in between."""
    for number in range(KILLS):
        await until(lambda: bool(get_keepers(rig)))
        enough = number * TASKS // (2 * KILLS)
        await until(lambda: len(ended) >= enough)  # noqa: B023  awaited at once
        await asyncio.sleep(chance.uniform(0, 0.03))
        for pid in get_keepers(rig):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("seed", range(3))
async def test_keepers_killed_at_any_moment_cost_nothing(rig: Rig, seed: int) -> None:
    chance = random.Random(seed)
    turns, ended = asyncio.Semaphore(8), list[int]()

    async def run(code: int) -> None:
        size, pause_s = chance.choice((0, 10, 200_000)), chance.choice((0, 0.01, 0.1))
        async with turns:
            exit_, folders = await rig.run(sh(SCRIPT, str(size), str(pause_s), str(code)))
        ended.append(code)
        assert exit_ == Exit(Cause.EXITED, code=code)
        assert folders.stdout.read_bytes() == b"\0" * size + b"\n"
        assert folders.stderr.read_text() == "end\n"

    async with asyncio.timeout(4 * DEADLINE_S), asyncio.TaskGroup() as group:
        group.create_task(kill_now_and_then(rig, chance, ended))
        for code in range(TASKS):
            group.create_task(run(code))
    said = (rig.root / "state" / "keeper.log").read_text()
    assert "Traceback" not in said, said
    assert sorted(ended) == list(range(TASKS))


async def test_keepers_of_a_burst_end_and_one_stays(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_IDLE_S", 0.2)
    long, _ = await rig.start(sh("exec sleep 100"))
    (first,) = get_keepers(rig)
    await asyncio.gather(*(rig.run(sh("exit 3")) for _ in range(24)))
    others = [pid for pid in get_keepers(rig) if pid != first]
    assert others, "a burst is more than one keeper's work"
    await until(lambda: get_keepers(rig) == [first])
    await until(lambda: not any(map(tree.read_process, others)))
    # What it keeps is not let go of, and it goes on.
    ended = rig.watch(long)
    assert (await rig.run(sh("exit 4")))[0] == Exit(Cause.EXITED, code=4)
    await rig.backend.kill(long, 0.0)
    assert await ended.wait() == Exit(Cause.SIGNALLED, signal=signal.SIGKILL)


async def test_a_killed_guard_costs_nothing_and_its_keeper_takes_no_more(rig: Rig) -> None:
    handle, folders = await rig.start(sh("sleep 0.4; echo out; exit 5"))
    ended, (first,) = rig.watch(handle), get_keepers(rig)
    path = f"{rig.root}/state/{handle.data['task']}-1-{handle.data['plan']}"
    keeper = read_record(path).keeper
    assert keeper is not None
    os.kill(keeper.guard, signal.SIGKILL)
    await until(lambda: get_keepers(rig) == [])
    assert (await rig.run(sh("exit 6")))[0] == Exit(Cause.EXITED, code=6)
    assert get_keepers(rig) != [first]
    assert await ended.wait() == Exit(Cause.EXITED, code=5)
    assert folders.stdout.read_text() == "out\n"


async def test_a_guard_that_goes_on_is_found_by_the_next_runner(rig: Rig) -> None:
    handle, folders = await rig.start(sh("echo one; sleep 0.6; echo two; exit 5"))
    (first,) = get_keepers(rig)
    os.kill(first, signal.SIGKILL)
    await rig.restart()
    assert await rig.watch(handle).wait() == Exit(Cause.EXITED, code=5)
    assert folders.stdout.read_text() == "one\ntwo\n"
