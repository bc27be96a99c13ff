"""Whose a process is: by its cgroup, or by its environment where there are none."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from kohaku_daemon.backends.process.owners import find_group_owner, find_marked_owner
from protocol.ids import TaskId
from tests.kohaku_daemon.backends.conformance import Rig, until
from tests.kohaku_daemon.backends.process.programs import sh
from tests.system.homes import wait_for


@pytest.mark.parametrize(
    ("cgroup", "task"),
    [
        ("0::/kohaku/node1-ab12/77-1\n", 77),
        ("0::/system.slice/kohakud.service/kohaku/node1-ab12/77-1\n", 77),
        ("5:pids:/kohaku/node1-ab12/77-2\n2:cpu,cpuacct:/\n0::/user.slice\n", 77),
        ("0::/kohaku/node1-ab12/77-1/made-by-the-task\n", 77),
        ("0::/kohaku/node1-ab12/keepers\n", None),
        ("0::/kohaku/node1-ab12\n", None),
        ("0::/kohaku/node2-cd34/77-1\n", None),
        ("0::/elsewhere/node1-ab12/77-1\n", None),
        ("0::/\n", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_a_launch_is_found_by_the_group_a_process_runs_in(cgroup: str, task: int | None) -> None:
    assert find_group_owner(cgroup, "node1-ab12") == task


@pytest.mark.parametrize(
    ("said", "task"), [("77", 77), ("9" * 5000, None), ("-1", None), ("", None), ("٣", None)]
)
def test_a_process_says_itself_whose_it_is_where_no_group_does(said: str, task: int | None) -> None:
    with subprocess.Popen(["sleep", "60"], env={"KOHAKU_TASK_ID": said}) as process:
        try:
            # The kernel shows a new program's variables a moment after it has begun.
            wait_for(lambda: bool(Path(f"/proc/{process.pid}/environ").read_bytes()), "variables")
            assert find_marked_owner(process.pid) == task
        finally:
            process.kill()


def test_nobody_owns_what_is_over_or_says_nothing() -> None:
    with subprocess.Popen(["sleep", "60"], env={}) as process:
        assert find_marked_owner(process.pid) is None
        process.kill()
    assert find_marked_owner(process.pid) is None


async def test_a_backend_knows_its_launches_processes_in_every_form(rig: Rig) -> None:
    handle, _ = await rig.start(sh("sleep 4711.25 & setsid sleep 4711.25 & wait"))
    await until(lambda: len(find_programs(b"sleep\x004711.25")) == 2)
    owners = {find_owner(rig, pid) for pid in find_programs(b"sleep\x004711.25")}
    assert owners == {handle.data["task"]}
    assert find_owner(rig, os.getpid()) is None


def find_owner(rig: Rig, pid: int) -> TaskId | None:
    return rig.backend.owner(pid, Path(f"/proc/{pid}/cgroup").read_text())


def find_programs(command: bytes) -> list[int]:
    """Find processes by what they run, as this machine numbers them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is over
            if (folder / "cmdline").read_bytes().startswith(command):
                found.append(int(folder.name))
    return found
