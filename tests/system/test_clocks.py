"""Somebody sets the clock of the host's or the runner's machine by hours while tasks run.

The clock of this machine is everybody's, so it is set for our daemons only: a small library in
front of libc's answers them. Their steady clocks go on, as those of a real machine do.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.system.homes import Home, wait_for

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).with_name("set_clock.c")
HOUR_S = 3600
#: Ends with 4 after a second or two, whatever the clock says, and ignores SIGTERM.
STUBBORN = ("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of one daemon."""

    file: Path

    def set(self, wrong_s: int) -> None:
        """Have it be wrong by so many seconds from now on."""
        with self.file.open("r+b") as file:
            file.write(wrong_s.to_bytes(8, "little", signed=True))


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster of one node, and its clocks: ``host`` and ``runner``."""

    home: Home
    clocks: dict[str, Clock]
    #: Of the runner's clock.
    environ: dict[str, str]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing: it compiles the clock that can be set")
    library = tmp_path_factory.mktemp("clock") / "set_clock.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1"]
    subprocess.run(["gcc", *flags, "-o", library, SOURCE, "-ldl"], check=True)
    return library


@pytest.fixture
def case(tmp_path: Path, library: Path) -> Iterator[Case]:
    home, clocks = Home(tmp_path / "home"), {}
    environ: dict[str, str] = {}
    try:
        for name, runners in (("host", "0"), ("runner", "1")):
            clocks[name] = Clock(tmp_path / f"{name}.clock")
            clocks[name].file.write_bytes(bytes(8))
            environ = {"LD_PRELOAD": str(library), "SET_CLOCK_FILE": str(clocks[name].file)}
            up = ("up", "--detach", "--listen", "127.0.0.1:0", "--runners", runners)
            done = home.run("kohakud", *up, **environ)
            assert done.code == 0, done
        yield Case(home, clocks, environ)
    finally:
        home.down()


@pytest.mark.parametrize("whose", [("host",), ("runner",)], ids="+".join)
def test_a_clock_that_is_set_loses_ends_and_repeats_nothing(
    case: Case, whose: tuple[str, ...]
) -> None:
    home = case.home
    runs = home.kohaku("task", "submit", "-c", "0", "--grace", "3", "--", *STUBBORN)
    wait_for(lambda: home.kohaku("task", "logs", runs) == "up", "the task to run")
    ids = [int(runs)]
    for wrong_s in (5 * HOUR_S, -7 * HOUR_S, 30 * 24 * HOUR_S, 0):
        for name in whose:
            case.clocks[name].set(wrong_s)
        done = home.run("kohaku", "task", "submit", "-c", "0", "--wait", "--", "true")
        assert done.code == 0, done
        ids.append(int(done.out.split()[0]))
        if "runner" in whose:
            wait_for(partial(is_ahead, home, wrong_s), "the node to tell its time")
        if "host" in whose:
            wait_for(lambda: seen_set(home) >= len(ids) - 1, "the host to notice its clock")
        assert home.state(runs) == "running"
    assert ids == sorted(set(ids)), "an id is smaller than an earlier one"
    kinds = [event["kind"] for event in home.json("events")["events"]]
    assert not {"node.offline", "node.lost", "task.lost"} & set(kinds)

    # The grace of a kill is measured by a clock that nobody sets.
    home.kohaku("task", "kill", runs)
    asked_at = time.monotonic()
    for name in whose:
        case.clocks[name].set(9 * HOUR_S)
    done = home.run("kohaku", "task", "wait", runs, "--timeout", "20")
    waited_s = time.monotonic() - asked_at
    assert done.code == 128 + 9
    assert 2.0 < waited_s < 15.0
    for task in ids:
        assert home.json("task", "show", str(task))["attempt"] == 1
    assert home.kohaku("task", "logs", runs) == "up"


@pytest.mark.parametrize("by_s", [5 * HOUR_S, -5 * HOUR_S])
def test_a_time_limit_is_the_same_after_a_restart_under_another_time(case: Case, by_s: int) -> None:
    home = case.home
    sleep = ("--", "sleep", "600")
    began_at = time.monotonic()
    short = home.kohaku("task", "submit", "-c", "0", "--time-limit", "12s", *sleep)
    long = home.kohaku("task", "submit", "-c", "0", "--time-limit", "10m", *sleep)
    home.wait_state(short, "running")
    home.wait_state(long, "running")
    case.clocks["runner"].set(by_s)
    home.kill("runner-node1")
    done = home.run("kohakud", "up", "--detach", **case.environ)
    assert done.code == 0, done
    assert home.run("kohaku", "task", "wait", short, "--timeout", "40").code != 0
    took_s = time.monotonic() - began_at
    assert 12.0 < took_s < 40.0
    shown = home.json("task", "show", short)
    assert shown["exit"]["cause"] == "time_limit", shown
    wait_for(partial(is_ahead, home, by_s), "the node to tell its time")
    assert home.state(long) == "running"


def test_daemons_restarted_under_an_earlier_time_find_everything(case: Case) -> None:
    home = case.home
    for clock in case.clocks.values():
        clock.set(3 * HOUR_S)
    count = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo $i; sleep 0.1; done; exit 5"
    task = home.kohaku("task", "submit", "-c", "0", "--", "sh", "-c", count)
    home.wait_state(task, "running")
    home.kill("host")
    home.kill("runner-node1")
    home.up()  # by the machine's own clock
    later = home.kohaku("task", "submit", "-c", "0", "--", "true")
    assert int(later) > int(task)
    assert home.run("kohaku", "task", "wait", task, "--timeout", "60").code == 5
    assert home.kohaku("task", "logs", task).split() == [str(n) for n in range(1, 41)]
    shown = home.json("task", "show", task)
    assert shown["attempt"] == 1
    # Times are UTC seconds by the host's clock, whatever the reader's zone is.
    first = shown["history"][0]["at"]
    assert abs(seconds_ahead(first) - 3 * HOUR_S) < 60
    elsewhere = home.run("kohaku", "task", "show", task, "--json", TZ="Pacific/Auckland").out
    assert json.loads(elsewhere)["history"][0]["at"] == first


def seconds_ahead(at: float) -> float:
    """Give how far a time that was shown, in UTC seconds, is ahead of this machine's clock."""
    return at - time.time()


def is_ahead(home: Home, by_s: int) -> bool:
    """Say whether the node's own clock is wrong by so many seconds."""
    readings = home.json("node", "show", "node1")["readings"]
    return abs(seconds_ahead(readings["at"]) - by_s) < 60


def seen_set(home: Home) -> int:
    """Count how often the host has noticed that its clock was set."""
    kinds = [event["kind"] for event in home.json("events")["events"]]
    return kinds.count("host.clock_set")
