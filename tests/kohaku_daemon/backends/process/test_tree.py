"""Processes are told apart, found by descent, and signalled only while they are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from kohaku_daemon.backends.process import tree
from tests.kohaku_daemon.backends.conformance import DEADLINE_S


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def read(pid: int) -> tree.Process:
    process = tree.read_process(pid)
    assert process is not None
    return process


def test_a_process_is_read_whatever_its_name(tmp_path: os.PathLike[str]) -> None:
    name = os.path.join(tmp_path, ") R 1 (")
    os.symlink("/bin/sleep", name)
    with subprocess.Popen([name, "600"]) as process:
        try:
            assert read(process.pid).parent == os.getpid()
        finally:
            process.kill()


def test_one_that_is_over_is_none_though_nobody_waited(
    sleeper: subprocess.Popen[bytes],
) -> None:
    start = read(sleeper.pid).start
    descriptor = tree.open_process(sleeper.pid, start)
    assert descriptor is not None
    os.close(descriptor)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert tree.read_process(sleeper.pid) is None
    assert tree.open_process(sleeper.pid, start) is None


def test_another_start_is_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    start = read(sleeper.pid).start
    assert tree.is_same(sleeper.pid, start)
    assert not tree.is_same(sleeper.pid, start + 1)
    assert tree.open_process(sleeper.pid, start + 1) is None


def test_descent_is_followed_to_the_end() -> None:
    def at(pid: int, parent: int) -> tree.Process:
        return tree.Process(pid, parent, "S", 0, 0.0, 0)

    every = {p.pid: p for p in (at(1, 0), at(5, 1), at(6, 5), at(7, 6), at(8, 1))}
    assert tree.select_below(every, 5) == {6, 7}
    assert tree.select_below(every, 8) == set()


def test_marks_must_all_be_there() -> None:
    environment = {"KOHAKU_TASK_ID": "77", "KOHAKU_ATTEMPT": "1"}
    with subprocess.Popen(["sleep", "600"], env=environment) as process:
        try:
            both = frozenset({"KOHAKU_TASK_ID=77", "KOHAKU_ATTEMPT=1"})
            # The kernel shows a program's variables only when its exec is complete.
            deadline = time.monotonic() + DEADLINE_S
            while not tree.select_marked([process.pid], both):
                assert time.monotonic() < deadline
            assert tree.select_marked([process.pid, os.getpid()], both) == {process.pid}
            other = frozenset({"KOHAKU_TASK_ID=77", "KOHAKU_ATTEMPT=2"})
            assert tree.select_marked([process.pid], other) == set()
        finally:
            process.kill()


def test_only_what_is_named_twice_is_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    listings = iter([[sleeper.pid], []])
    assert tree.signal_each(lambda: next(listings), signal.SIGKILL) == 0
    assert sleeper.poll() is None
    assert tree.signal_each(lambda: [sleeper.pid], signal.SIGKILL) == 1
    assert sleeper.wait() == -signal.SIGKILL


def test_usage_is_read() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            while read(process.pid).cpu_s < 0.05:
                pass
            assert read(process.pid).resident > 1 << 20
        finally:
            process.kill()
