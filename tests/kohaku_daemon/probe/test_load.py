"""How busy a machine is."""

import os
from pathlib import Path

import pytest

from kohaku_daemon.probe.load import (
    CpuMeter,
    CpuTimes,
    Memory,
    parse_stat,
    read_disks,
    read_load,
    read_memory,
)
from tests.kohaku_daemon.probe.conftest import put


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("cpu  150 0 50 850 50 0 0 0 0 0", 50.0),
        ("cpu  100 0 50 850 100 0 0 0 0 0", 0.0),  # waiting for a disk is not busy
        ("cpu  100 10 60 800 50 10 10 10 0 0", 100.0),
        ("cpu  160 0 50 840 50 0 0 0 60 0", 60.0),  # guests are in user already
        ("cpu  100 0 50 800 50 0 0 0 0 0", 0.0),  # no tick has passed
        ("cpu  90 0 50 900 40 0 0 0 0 0", 0.0),  # ticks ran backwards
        ("", 0.0),
    ],
)
def test_cpu_is_measured_since_the_last_reading(line: str, percent: float, root: Path) -> None:
    meter = CpuMeter(root)
    put(root, "proc/stat", line + "\ncpu0 1 2 3\n")
    assert meter.percent() == pytest.approx(percent)


def test_the_first_line_of_stat_is_all_cores() -> None:
    assert parse_stat("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 9 9") == CpuTimes(busy=27, total=36)
    assert parse_stat("intr 1 2 3") == CpuTimes()


def test_memory_and_load(root: Path) -> None:
    assert read_memory(root) == Memory(65536000 * 1024, 32768000 * 1024, 500000 * 1024)
    assert read_load(root) == 1.25
    assert read_load(root / "missing") == 0.0


def test_a_disk_that_is_gone_is_left_out(tmp_path: Path) -> None:
    here, *others = read_disks([tmp_path, tmp_path / "missing"])
    assert others == []
    stat = os.statvfs(tmp_path)
    assert (here.path, here.total) == (str(tmp_path), stat.f_blocks * stat.f_frsize)
    assert 0 <= here.free <= here.total
