"""GPUs as people meet them, with a stand-in for NVIDIA's library beneath a real runner.

Who has which, who waits for whom, what uses them, and one that is lost for a while: for tasks
that are processes, and for tasks in containers of an engine that has NVIDIA's hook.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.support.dockerds import Dockerd
from tests.support.fake_gpus import build_fake_nvml
from tests.support.nvidia_hook import NvidiaHook
from tests.system.homes import Home, wait_for

pytestmark = pytest.mark.slow

MIB = 2**20
GPUS = {
    "GPU-a": "uuid=GPU-a name=Fake_A100 bus=00000000:3B:00.0 total=81920 used=1024 busy=37",
    "GPU-b": "uuid=GPU-b name=Fake_A100 bus=00000000:5E:00.0 total=81920 used=0 busy=0",
    "MIG-0": "uuid=MIG-0 name=Fake_A100_MIG_3g.40gb parent=GPU-b place=0 total=40192 used=0",
    "MIG-1": "uuid=MIG-1 name=Fake_A100_MIG_3g.40gb parent=GPU-b place=1 total=40192 used=0",
}
SHOW_AND_STAY = (
    "sh", "-c", "echo $CUDA_VISIBLE_DEVICES ${NVIDIA_VISIBLE_DEVICES:-none}; exec sleep 600",
)  # fmt: skip


class Machine:
    """A cluster of one node with GPUs that a test changes as it likes."""

    def __init__(self, folder: Path, library: Path, engine: Dockerd | None) -> None:
        self.home = Home(folder / "home")
        self._state = folder / "gpus"
        self._library = library
        self._engine = engine

    def up(self) -> None:
        settings = {"LD_LIBRARY_PATH": str(self._library), "FAKE_NVML": str(self._state)}
        backend = "process"
        if self._engine is not None:
            backend = "docker"
            settings["KOHAKU_RUNNER_DOCKER_SOCKET"] = str(self._engine.socket)
        done = self.home.run(
            "kohakud", "up", "--detach", "--listen", "127.0.0.1:0", "--backend", backend,
            **settings,
        )  # fmt: skip
        assert done.code == 0, done

    def has(self, *uuids: str, more: Mapping[str, str] = MappingProxyType({})) -> None:
        """Have the driver show these GPUs, some with more words such as ``compute=7:512``."""
        fresh = self._state.with_suffix(".new")
        fresh.write_text("\n".join(f"{GPUS[uuid]} {more.get(uuid, '')}" for uuid in uuids))
        fresh.rename(self._state)

    def submit(self, *words: str) -> str:
        return self.home.kohaku("task", "submit", "-c", "0", *words, "--", *SHOW_AND_STAY)

    def said(self, task: str) -> list[str]:
        """Give the GPUs that a task was told, which in a container NVIDIA's hook was told too."""
        wait_for(lambda: bool(self.home.kohaku("task", "logs", task)), f"output of {task}")
        told, asked = self.home.kohaku("task", "logs", task).split()
        assert asked == ("none" if self._engine is None else told)
        return told.split(",")

    def reasons(self, task: str) -> list[str]:
        (verdict,) = self.home.json("task", "explain", task)["nodes"]
        return [str(reason) for reason in verdict["reasons"]]

    def reading(self, uuid: str) -> dict[str, Any]:
        readings = self.home.json("node", "show", "node1")["readings"]
        found = [gpu for gpu in readings["gpus"] if gpu["uuid"] == uuid]
        assert found, f"{uuid} is not among {readings['gpus']}"
        reading: dict[str, Any] = found[0]
        return reading


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module", params=["process", "docker"])
def engine(
    request: pytest.FixtureRequest,
    start_dockerds: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Dockerd | None:
    """Give the engine whose containers tasks are; None for processes."""
    if request.param == "process":
        return None
    engine = Dockerd(path=[NvidiaHook(tmp_path_factory.mktemp("hook")).folder])
    start_dockerds(engine)
    return engine


@pytest.fixture
def machine(library: Path, tmp_path: Path, engine: Dockerd | None) -> Iterator[Machine]:
    machine = Machine(tmp_path, library, engine)
    machine.has("GPU-a", "GPU-b")
    try:
        machine.up()
        yield machine
    finally:
        machine.home.down()


def find_pids(task: str) -> list[int]:
    """Find the program of a task by its environment, as this machine numbers it.

    In a container another process has the same, which started it.
    """
    mark = f"KOHAKU_TASK_ID={task}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            if mark in variables and (folder / "comm").read_text() == "sleep\n":
                found.append(int(folder.name))
        except OSError:  # it is over, or another user's
            continue
    return found


def test_two_tasks_have_a_gpu_each_and_the_third_is_told_whose_it_waits_for(
    machine: Machine,
) -> None:
    home = machine.home
    first, second = machine.submit("--gpus", "1"), machine.submit("--gpus", "1")
    for task in (first, second):
        home.wait_state(task, "running")
    assert {*machine.said(first), *machine.said(second)} == {"GPU-a", "GPU-b"}
    assert "GPU 0" in home.json("task", "explain", first)["summary"]

    third = machine.submit("--gpus", "1")
    named = machine.submit("-t", "node1::1")
    me = home.json("task", "show", first)["owner"]
    holders = [
        f"GPU {gpu} is held by task {task} of {me}" for gpu, task in ((0, first), (1, second))
    ]
    assert machine.reasons(third) == [f"1 GPU wanted, 0 of 2 free: {', '.join(holders)}"]
    assert machine.reasons(named) == [holders[1]]
    assert holders[0] in home.kohaku("task", "explain", third)

    uuids = machine.said(first)
    home.kohaku("task", "kill", first)
    home.wait_state(third, "running")
    assert machine.said(third) == uuids


def test_processes_of_gpus_are_shown_with_their_tasks_and_strangers_as_unmanaged(
    machine: Machine,
) -> None:
    task = machine.submit("--gpus", "1")
    machine.home.wait_state(task, "running")
    wait_for(lambda: bool(find_pids(task)), "the task's program")
    (program,) = find_pids(task)
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            gone = 2**22 - 1  # above every pid that there is (man 5 proc, pid_max)
            machine.has(
                "GPU-a", "GPU-b", more={"GPU-a": f"compute={program}:512,{stranger.pid},{gone}:1"}
            )
            expected = [
                {"pid": program, "name": "sleep", "memory": 512 * MIB, "task": task},
                {"pid": stranger.pid, "name": "sleep", "memory": None, "task": None},
            ]
            wait_for(lambda: machine.reading("GPU-a")["processes"] == expected, f"{expected}")
            shown = machine.home.kohaku("node", "show", "node1")
            assert f"process {program}, sleep, 512 MiB, task {task}" in shown
            assert f"process {stranger.pid}, sleep, unmanaged" in shown
        finally:
            stranger.kill()


def test_a_gpu_that_is_lost_takes_nothing_until_it_is_back(machine: Machine) -> None:
    home = machine.home
    machine.has("GPU-a")
    wait_for(lambda: machine.reading("GPU-b")["fault"] == "lost", "GPU-b to be lost")
    both = machine.submit("--gpus", "2")
    assert machine.reasons(both) == ["2 GPUs wanted, 1 of 2 free: GPU 1 is out of service: lost"]
    named = machine.submit("-t", "node1::1")
    assert machine.reasons(named) == ["GPU 1 is out of service: lost"]
    home.kohaku("task", "kill", named)
    assert "out of service: lost" in home.kohaku("node", "show", "node1")
    events = home.json("events")["events"]
    assert any("GPU GPU-b is out of service: lost" in event["text"] for event in events)

    machine.has("GPU-a", "GPU-b")
    home.wait_state(both, "running")
    assert sorted(machine.said(both)) == ["GPU-a", "GPU-b"]


def test_gpus_that_come_later_are_offered_and_instances_in_place_of_what_they_divide(
    machine: Machine,
) -> None:
    home = machine.home
    refused = home.run("kohaku", "task", "submit", "--gpus", "3", "--", "true")
    assert refused.code == 1
    assert "3 GPUs wanted, the node has 2" in refused.err
    machine.has("GPU-a", "GPU-b", "MIG-0", "MIG-1", more={"GPU-b": "mig=1"})
    wait_for(lambda: "gpu 201" in home.kohaku("node", "show", "node1"), "the instances")
    assert "MIG 1:1" in home.kohaku("node", "show", "node1")
    instance = machine.submit("-t", "node1::201")
    others = machine.submit("--gpus", "2")
    assert machine.said(instance) == ["MIG-1"]
    assert sorted(machine.said(others)) == ["GPU-a", "MIG-0"]
    refused = home.run("kohaku", "task", "submit", "-t", "node1::1", "--", "true")
    assert "GPU 1 is divided: its instances are GPUs 200-201" in refused.err
