"""Disks that are full or broken, under the host and under a runner.

What cannot be kept is refused in words, what can be read is read, operators are told, and it
all goes on by itself once the disk is well; nothing that was answered is lost.
"""

from __future__ import annotations

import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.homes import Done, Home, wait_for
from tests.system.small_disks import Disk, broken_disk, failing_disk, full_disk, need_disks

pytestmark = pytest.mark.slow

#: Runs until it is told to end; then it says so and ends with 3.
#: What it says then is more than a block of a disk, of which a file may have some left.
PATIENT = (
    "sh", "-c",
    "trap 'seq 3000; exit 3' USR1; echo up; while :; do sleep 0.05; done",
)  # fmt: skip
ITS_OUTPUT = "\n".join(["up", *map(str, range(1, 3001))])


@dataclass(frozen=True, slots=True)
class Case:
    """A home on a disk that can be broken."""

    home: Home
    disk: Disk


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Callable[[str], Case]]:
    """Make a home whose host keeps its data on a disk of the given kind."""
    need_disks()
    with ExitStack() as stack:
        home = Home(tmp_path / "home")

        def make(kind: str) -> Case:
            place, aside = home.folder / "data" / "host", tmp_path / "aside"
            aside.mkdir()
            disk = stack.enter_context(_kinds(place, aside)[kind])
            stack.callback(home.down)
            if kind != "broken":
                stack.callback(recover, home, disk)  # a test that failed may have left it so
            home.up()
            return Case(home, disk)

        yield make


def _kinds(place: Path, aside: Path) -> dict[str, AbstractContextManager[Disk]]:
    return {
        "full": full_disk(place),
        "failing": failing_disk(place, aside),
        "broken": broken_disk(place, aside),
    }


@pytest.mark.parametrize(
    ("kind", "said"), [("full", "the disk is full"), ("failing", "the disk fails")]
)
def test_a_host_that_cannot_store_refuses_serves_reads_says_so_and_recovers(
    on_disk: Callable[[str], Case], kind: str, said: str
) -> None:
    case = on_disk(kind)
    home = case.home
    kept = home.kohaku("task", "submit", "--", "true")
    home.run("kohaku", "task", "wait", kept)
    runs = home.kohaku("task", "submit", "-c", "0", "--", *PATIENT)
    wait_for(lambda: home.kohaku("task", "logs", runs) == "up", "the task to run")

    case.disk.fail()
    answered, refused = submit_until_refused(home)
    assert re.search("could not be stored so far, and may yet be|cannot store", refused.err)
    case.disk.forget()
    second = home.run("kohaku", "task", "submit", "--", "true")
    assert (second.code, second.out) == (3, "")
    assert "the host cannot store anything now" in second.err
    assert readiness(home) == (503, f"nothing can be stored: {said}\n")
    problem, *_ = home.kohaku("status").splitlines()
    assert "problem" in problem
    assert "nothing can be stored" in problem
    assert home.json("task", "show", kept)["state"] == "completed"
    assert home.kohaku("task", "logs", runs) == "up"
    tell(runs)
    wait_for(lambda: home.kohaku("task", "logs", runs) == ITS_OUTPUT, "its last words")
    assert home.json("node", "show", "node1")["state"] == "online"

    recover(home, case.disk)
    assert home.run("kohaku", "task", "wait", runs, "--timeout", "30").code == 3
    assert "problem" not in home.kohaku("status")
    # What was not answered may be there, once; what was refused is not.
    rows = home.json("task", "list", "--all")["tasks"]
    assert {row["id"] for row in rows} >= {kept, runs, *answered}
    assert len(rows) == 2 + len(answered) + ("may yet be" in refused.err)
    kinds = [event["kind"] for event in home.json("events")["events"]]
    assert kinds.count("host.failing") == kinds.count("host.well") == 1
    log = next(home.folder.rglob("host.log")).read_text()
    assert log.count("cannot store changes") == log.count("can be stored again") == 1

    home.kill("host")
    case.disk.forget()
    home.up()
    assert home.json("task", "show", kept)["state"] == "completed"
    assert len(home.json("task", "list", "--all")["tasks"]) == len(rows)


@pytest.mark.parametrize("kind", ["full", "failing"])
def test_a_host_killed_while_it_cannot_store_has_all_it_answered(
    on_disk: Callable[[str], Case], kind: str
) -> None:
    case = on_disk(kind)
    home = case.home
    kept = home.kohaku("task", "submit", "-c", "0", "--array", "20", "--", "true").split()
    case.disk.fail()
    answered, _ = submit_until_refused(home)
    home.kill("host")
    case.disk.forget()
    # It may start again, or say why it does not.
    again = home.run("kohakud", "up", "--detach")
    assert again.code == 0 or re.search("No space|disk is full|disk I/O", again.err), again
    assert "Traceback" not in again.err
    case.disk.mend()
    home.up()
    assert home.run("kohaku", "task", "wait", *kept, "--timeout", "60").code == 0
    rows = home.json("task", "list", "--all")["tasks"]
    assert {row["id"] for row in rows} >= {*kept, *answered}
    assert {row["attempt"] for row in rows} == {1}


def test_a_disk_that_became_read_only_is_said_and_what_was_answered_is_there_after_its_repair(
    on_disk: Callable[[str], Case],
) -> None:
    case = on_disk("broken")
    home = case.home
    kept = home.kohaku("task", "submit", "--", "true")
    home.run("kohaku", "task", "wait", kept)
    case.disk.fail()
    answered, _ = submit_until_refused(home)
    assert readiness(home)[0] == 503
    assert "nothing can be stored" in home.kohaku("status").splitlines()[0]
    assert home.json("task", "show", kept)["state"] == "completed"
    home.kill("host")
    # It does not start on a disk it cannot write, and says why.
    again = home.run("kohakud", "up", "--detach")
    assert again.code == 1
    assert "Read-only file system" in again.err
    assert "Traceback" not in again.err
    case.disk.mend()
    home.up()
    for task in (kept, *answered):
        assert home.run("kohaku", "task", "wait", task, "--timeout", "30").code == 0
    assert home.kohaku("task", "submit", "--wait", "--", "true") != ""


# Runners ------------------------------------------------------------------------------------

#: Of a runner's data folder, the empty name for the folder itself, where the vault is.
PARTS = ("", "logs", "scratch", "backends")


@pytest.fixture
def on_disks(tmp_path: Path) -> Iterator[tuple[Home, dict[str, Disk]]]:
    """Give a cluster whose one runner has a disk for each of its folders."""
    need_disks()
    with ExitStack() as stack:
        home = Home(tmp_path)
        data = tmp_path / "data" / "runners" / "node1"
        disks = {part: stack.enter_context(full_disk(data / part, 4)) for part in PARTS}
        stack.callback(home.down)
        home.up()
        yield home, disks


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part or "vault")
def test_a_runner_with_a_full_disk_says_so_starts_nothing_and_recovers(
    on_disks: tuple[Home, dict[str, Disk]], part: str
) -> None:
    home, disks = on_disks
    runs = home.kohaku("task", "submit", "-c", "0", "--", *PATIENT)
    wait_for(lambda: home.kohaku("task", "logs", runs) == "up", "the task to run")
    disks[part].fail()
    wait_for(lambda: "problem" in home.kohaku("status"), "the trouble to be told")
    problem, *_ = home.kohaku("status").splitlines()
    assert "node node1: the disk of" in problem
    assert "is full" in problem
    assert "problem" in home.kohaku("node", "show", "node1")
    waits = home.kohaku("task", "submit", "-c", "0", "--", "echo", "later")
    explained = home.json("task", "explain", waits)
    assert "the node is in trouble" in explained["nodes"][0]["reasons"][0]
    tell(runs)
    if part != "":
        # What ended is told: its end needs none of the disks that are full.
        assert home.run("kohaku", "task", "wait", runs, "--timeout", "30").code == 3
    wait_for(lambda: not processes_of(runs), "the task to end")
    assert home.json("node", "show", "node1")["state"] == "online"
    assert home.state(waits) == "queued"

    disks[part].mend()
    assert home.run("kohaku", "task", "wait", runs, waits, "--timeout", "30").code == 3
    assert home.kohaku("task", "logs", waits) == "later"
    shown = home.json("task", "show", runs)
    assert (shown["attempt"], shown["exit"]["code"]) == (1, 3)
    if part == "logs":
        lost = re.search(r"(\d+) bytes of its output are lost: No space left", shown["reason"])
        assert lost is not None, shown["reason"]
        there = home.run("kohaku", "task", "logs", runs).out
        assert len(there) + int(lost[1]) == len(ITS_OUTPUT) + 1
        assert ITS_OUTPUT.startswith(there)
    else:
        assert home.kohaku("task", "logs", runs) == ITS_OUTPUT
    wait_for(lambda: "problem" not in home.kohaku("status"), "the trouble to be over")
    kinds = [event["kind"] for event in home.json("events")["events"]]
    assert kinds.count("node.trouble") >= 1
    assert kinds.count("node.well") == 1
    assert "node.offline" not in kinds
    log = next(home.folder.rglob("node1.log")).read_text()
    assert "nothing new is started here" in log
    assert "the disks are well again" in log


def test_a_runner_that_starts_on_a_full_disk_takes_work_once_there_is_room(
    on_disks: tuple[Home, dict[str, Disk]],
) -> None:
    home, disks = on_disks
    home.down()
    disks["backends"].fail()
    home.run("kohakud", "up", "--detach")
    (backend,) = home.json("node", "show", "node1")["inventory"]["backends"]
    assert not backend["healthy"]
    assert "No space left on device" in backend["message"]
    waits = home.kohaku("task", "submit", "-c", "0", "--", "echo", "later")
    assert home.state(waits) == "queued"
    runner = home.pid("runner-node1")

    disks["backends"].mend()
    # Sooner than the next try of its own accord: the disk is looked at every second.
    assert home.run("kohaku", "task", "wait", waits, "--timeout", "25").code == 0
    assert home.kohaku("task", "logs", waits) == "later"
    (backend,) = home.json("node", "show", "node1")["inventory"]["backends"]
    assert backend["healthy"]
    assert home.pid("runner-node1") == runner


# What the tests ask and do ------------------------------------------------------------------


def readiness(home: Home) -> tuple[int, str]:
    """Ask the host as a load balancer does."""
    url = next(home.folder.rglob("host.url")).read_text().strip()
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def submit_until_refused(home: Home) -> tuple[list[str], Done]:
    """Submit until the disk shows; give what was answered before, and the refusal.

    What a file or a log of the file system has room for is still written.
    """
    answered: list[str] = []
    for _ in range(50):
        done = home.run("kohaku", "task", "submit", "-c", "0", "--", "true")
        if done.code:
            assert (done.code, done.out) == (3, "")
            return answered, done
        answered.append(done.out.strip())
    raise AssertionError("a disk that takes nothing was not noticed")


def recover(home: Home, disk: Disk) -> None:
    """Mend the host's disk, and wait until a host that runs has noticed."""
    disk.mend()
    if home.runs("host"):
        wait_for(lambda: readiness(home) == (200, "ready\n"), "the host to store again")


def processes_of(task: str) -> list[int]:
    """Find the processes of a task by the variable that all of them have."""
    mark = f"KOHAKU_TASK_ID={task}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                marked = mark in (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if marked:
                found.append(int(entry.name))
    return sorted(found)


def tell(task: str) -> None:
    """Tell a patient task to end: its shell is the one whose parent is none of its processes."""
    every = set(processes_of(task))
    (shell,) = [pid for pid in every if parent_of(pid) not in every | {None}]
    os.kill(shell, signal.SIGUSR1)


def parent_of(pid: int) -> int | None:
    """Give the parent of a process; None if it is over (man 5 proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[1])
