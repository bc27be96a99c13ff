"""What a runner tells of its machine, all together."""

from pathlib import Path

import pytest

from kohaku_daemon.probe.prober import Prober
from protocol.errors import BadRequest
from protocol.ids import TaskId
from protocol.models.node import BackendInfo, TaskReading
from tests.kohaku_daemon.probe.conftest import put


class FixedClock:
    def now(self) -> float:
        return 1_700_000_000.0

    def monotonic(self) -> float:
        return 0.0


def test_an_inventory_offers_everything_but_a_little_memory(root: Path) -> None:
    process = BackendInfo("process")
    inventory = Prober(root, max_tasks=9).inventory([process], "process", "0.1.0")
    assert inventory.cores == (1, 2, 3, 4, 5, 6)
    assert inventory.memory == int(65536000 * 1024 * 0.95)
    assert [node.cores for node in inventory.numa] == [(1, 2, 3), (4, 5, 6)]
    assert (inventory.backends, inventory.default_backend) == ((process,), "process")
    assert (inventory.hostname, inventory.version, inventory.max_tasks) == ("gpu-1", "0.1.0", 9)


def test_an_inventory_offers_what_the_configuration_says(root: Path) -> None:
    inventory = Prober(root, cores=(5, 2, 2), memory=2**30).inventory()
    assert (inventory.cores, inventory.memory) == ((2, 5), 2**30)
    assert [node.cores for node in inventory.numa] == [(2,), (5,)]


def test_cores_that_are_not_ours_are_not_offered(root: Path) -> None:
    with pytest.raises(BadRequest, match="cores 0, 9 are not among those"):
        Prober(root, cores=(0, 1, 9)).inventory()


def test_a_reading_has_it_all(root: Path, tmp_path: Path) -> None:
    prober = Prober(root, disks=[tmp_path], clock=FixedClock())
    put(root, "proc/stat", "cpu  150 0 50 850 50 0 0 0 0 0\n")
    task = TaskReading(TaskId(7), cpu_s=1.0)
    readings, cgroups, has_new_gpu = prober.read((task,))
    assert (cgroups, has_new_gpu) == ({}, False)
    assert (readings.at, readings.cpu_percent, readings.load_1m) == (1_700_000_000.0, 50.0, 1.25)
    assert readings.memory_available == 32768000 * 1024
    assert readings.temperatures["nvme"] == 38.85
    assert [disk.path for disk in readings.disks] == [str(tmp_path)]
    assert readings.tasks == (task,)
    assert prober.read().readings.cpu_percent == 0.0
