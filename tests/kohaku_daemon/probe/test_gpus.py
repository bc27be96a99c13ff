"""GPUs through a stand-in for NVIDIA's library, which a process must find at its start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kohaku_daemon.probe.conftest import put
from tests.support.fake_gpus import build_fake_nvml

#: Answers each line "inventory" or "read" with a line of JSON.
ASKED = """
import sys
from pathlib import Path
import msgspec
from kohaku_daemon.probe.gpus import Gpus
gpus = Gpus(Path(sys.argv[1]))
for line in sys.stdin:
    print(msgspec.json.encode(getattr(gpus, line.strip())()).decode(), flush=True)
gpus.close()
"""

A100 = (
    "uuid=GPU-a name=Fake_A100 bus=00000000:3B:00.0 total=81920 used=1024 busy=37"
    " temperature=55 power=250500 limit=400000"
)
RTX = "uuid=GPU-b name=RTX bus=00000000:5E:00.0 total=24576 used=0 busy=0 temperature=30 fan=41"
MIB = 2**20


class Machine:
    """A process that asks the stand-in."""

    def __init__(self, library: Path, root: Path, folder: Path) -> None:
        self.state = folder / "gpus"
        environment = {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(self.state)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ASKED, str(root)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def has(self, *gpus: str) -> None:
        # Renamed into place: the library must not see half of it.
        fresh = self.state.with_suffix(".new")
        fresh.write_text("\n".join(gpus))
        fresh.rename(self.state)

    def ask(self, question: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(question, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=10)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "new": build_fake_nvml(tmp_path_factory.mktemp("new")),
        "old": build_fake_nvml(tmp_path_factory.mktemp("old"), "-DOLD_DRIVER"),
    }


@pytest.fixture(params=["new", "old"])
def machine(
    request: pytest.FixtureRequest, libraries: dict[str, Path], root: Path, tmp_path: Path
) -> Iterator[Machine]:
    machine = Machine(libraries[request.param], root, tmp_path)
    yield machine
    machine.close()


def test_gpus_are_described_and_read(machine: Machine) -> None:
    machine.has(A100, RTX)
    assert machine.ask("inventory") == [
        {"index": 0, "uuid": "GPU-a", "name": "Fake A100", "memory": 81920 * MIB,
         "bus": "00000000:3B:00.0", "numa": 1},
        {"index": 1, "uuid": "GPU-b", "name": "RTX", "memory": 24576 * MIB,
         "bus": "00000000:5E:00.0"},
    ]  # fmt: skip
    assert machine.ask("read") == [
        {"uuid": "GPU-a", "used_percent": 37.0, "memory_used": 1024 * MIB, "temperature": 55.0,
         "power": 250.5, "power_limit": 400.0},
        {"uuid": "GPU-b", "used_percent": 0.0, "temperature": 30.0, "fan_percent": 41.0},
    ]  # fmt: skip


def test_a_gpu_that_is_lost_says_so_while_others_go_on(machine: Machine) -> None:
    machine.has(A100, RTX)
    machine.ask("inventory")
    machine.has(RTX)
    lost, other = machine.ask("read")
    assert lost == {"uuid": "GPU-a", "fault": "lost"}
    assert other["temperature"] == 30.0
    assert machine.ask("read")[0] == {"uuid": "GPU-a", "fault": "lost"}

    # A new inventory counts anew but does not forget what was there.
    assert [(gpu["index"], gpu["uuid"]) for gpu in machine.ask("inventory")] == [(0, "GPU-b")]
    assert machine.ask("read")[0] == {"uuid": "GPU-a", "fault": "lost"}

    machine.has(RTX, A100)
    assert [reading.get("fault") for reading in machine.ask("read")] == [None, None]


def test_any_other_error_is_a_fault_in_the_drivers_words(machine: Machine) -> None:
    machine.has(A100, RTX)
    machine.ask("inventory")
    machine.has(A100 + " error=16", RTX)
    sick, other = machine.ask("read")
    assert sick == {"uuid": "GPU-a", "fault": "GPU requires restart"}
    assert "fault" not in other
    assert [gpu["uuid"] for gpu in machine.ask("inventory")] == ["GPU-b"]


def test_a_driver_that_comes_late_or_is_reloaded_is_found(machine: Machine) -> None:
    assert machine.ask("inventory") == []
    assert machine.ask("read") == []
    machine.has(A100)
    assert len(machine.ask("inventory")) == 1
    machine.has()
    assert machine.ask("inventory") == []
    assert machine.ask("read") == [{"uuid": "GPU-a", "fault": "the driver does not answer"}]
    machine.has(A100)
    assert len(machine.ask("inventory")) == 1
    assert machine.ask("read")[0]["used_percent"] == 37.0


def test_what_uses_a_gpu_is_listed_by_its_memory_and_told_once(
    machine: Machine, root: Path
) -> None:
    put(root, "proc/11/comm", "python3\n")
    put(root, "proc/12/comm", "Xorg\n")
    machine.has(A100 + " compute=12:4,11:512,13 graphics=12:30", RTX)
    machine.ask("inventory")
    used, idle = machine.ask("read")
    assert used["processes"] == [
        {"pid": 11, "name": "python3", "memory": 512 * MIB},
        {"pid": 12, "name": "Xorg", "memory": 30 * MIB},
        {"pid": 13},
    ]
    assert "processes" not in idle


def test_of_many_processes_some_are_told_and_the_others_counted(machine: Machine) -> None:
    crowd = ",".join(f"{pid}:1" for pid in range(1000, 1100))
    machine.has(*(f"uuid=GPU-{index} total=9 used=0 compute={crowd}" for index in range(20)))
    machine.ask("inventory")
    readings = machine.ask("read")
    assert len(readings[0]["processes"]) == 32
    assert readings[0]["processes_left_out"] == 68
    assert sum(len(reading.get("processes", ())) for reading in readings) == 512
    assert readings[19]["processes_left_out"] == 100


INSTANCES = (
    "uuid=MIG-x name=A100_MIG_1g.10gb parent=GPU-a place=0 total=9728 used=12 compute=11:12",
    "uuid=MIG-y name=A100_MIG_2g.20gb parent=GPU-a place=3 total=19968 used=0",
)


def test_instances_are_gpus_of_their_own_where_a_gpu_is_divided(machine: Machine) -> None:
    machine.has(A100 + " mig=1 compute=11:12", *INSTANCES, RTX + " mig=0")
    whole, first, second, other = machine.ask("inventory")
    assert (whole["uuid"], whole["index"], whole["divided"]) == ("GPU-a", 0, True)
    assert first == {
        "index": 100, "uuid": "MIG-x", "name": "A100 MIG 1g.10gb", "memory": 9728 * MIB,
        "bus": "00000000:3B:00.0", "numa": 1, "parent": "GPU-a",
    }  # fmt: skip
    assert (second["uuid"], second["index"]) == ("MIG-y", 103)
    assert (other["uuid"], other["index"], other.get("divided")) == ("GPU-b", 1, None)
    readings = {reading["uuid"]: reading for reading in machine.ask("read")}
    assert readings["MIG-x"]["processes"] == [{"pid": 11, "memory": 12 * MIB}]
    assert "processes" not in readings["GPU-a"]


def test_an_instance_that_is_taken_away_is_lost_and_others_go_on(machine: Machine) -> None:
    machine.has(A100 + " mig=1", *INSTANCES)
    machine.ask("inventory")
    machine.has(A100 + " mig=1", INSTANCES[1])
    readings = {reading["uuid"]: reading for reading in machine.ask("read")}
    assert readings["MIG-x"] == {"uuid": "MIG-x", "fault": "lost"}
    assert "fault" not in readings["MIG-y"]


def test_a_gpu_that_has_come_is_news_once_and_one_that_has_gone_is_none(machine: Machine) -> None:
    machine.has(RTX)
    machine.ask("inventory")
    assert machine.ask("has_new") is False
    machine.has(A100, RTX)
    assert machine.ask("has_new") is True
    assert machine.ask("has_new") is False, "told once"
    machine.ask("inventory")
    machine.has(RTX)
    assert machine.ask("has_new") is False
    machine.has(A100, RTX)
    assert machine.ask("has_new") is False, "the inventory has it"
    machine.has(A100 + " mig=1", INSTANCES[0], RTX)
    assert machine.ask("has_new") is True


def test_gpus_answer_again_once_the_driver_is_back_without_an_inventory(machine: Machine) -> None:
    machine.has(A100)
    machine.ask("inventory")
    machine.has()
    assert machine.ask("has_new") is False
    assert machine.ask("read") == [{"uuid": "GPU-a", "fault": "the driver does not answer"}]
    machine.has(A100)
    assert machine.ask("read")[0]["used_percent"] == 37.0


_WITHOUT_DRIVER = """
import logging, sys
from pathlib import Path
from kohaku_daemon.probe import gpus
gpus._LIBRARY = "libnvidia-ml-that-is-not-there.so.1"  # also where the tests run on a GPU
logging.basicConfig(level=logging.INFO, format="%(message)s")
found = gpus.Gpus(Path(sys.argv[1]))
print(found.inventory(), found.inventory() + found.read(), "pynvml" in sys.modules)
"""


def test_without_a_driver_there_are_no_gpus_and_nothing_is_loaded(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", _WITHOUT_DRIVER, str(tmp_path)],
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    assert said.stdout == "() () False\n"
    assert said.stderr == "no NVIDIA GPUs: there is no driver\n", "once"
