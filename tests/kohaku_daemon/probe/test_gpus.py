"""GPUs through a stand-in for NVIDIA's library, which a process must find at its start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kohaku_daemon.probe.gpus import Gpus
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


def test_without_the_package_there_are_no_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpus = Gpus(tmp_path)
    assert (gpus.inventory(), gpus.read()) == ((), ())
    gpus.close()
