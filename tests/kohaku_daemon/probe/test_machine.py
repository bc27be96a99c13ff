"""What a machine is, read from files."""

import os
import shutil
from pathlib import Path

import pytest

from kohaku_daemon.probe.machine import Machine, parse_os_release, read_machine
from tests.kohaku_daemon.probe.conftest import put

BUILT_IN = 65536000 * 1024


def test_a_machine_is_read(root: Path) -> None:
    assert read_machine(root) == Machine(
        hostname="gpu-1",
        system="Debian GNU/Linux 12 (bookworm)",
        kernel="6.8.0-41-generic",
        architecture=os.uname().machine,
        boot_id="760e3a85-61f3-4427-8f9a-21b3c76fbcd2",
        cores=(1, 2, 3, 4, 5, 6),
        memory=BUILT_IN,
    )


def test_this_machine_is_read() -> None:
    machine = read_machine(Path("/"))
    assert machine.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert machine.hostname == os.uname().nodename
    assert 0 < machine.memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert len(machine.boot_id) == 36


V1 = "9:name=systemd:/x\n4:memory:/docker/abc\n0::/docker/abc\n"
V2 = "0::/system.slice/kohakud.service\n"


@pytest.mark.parametrize(
    ("cgroup", "limits", "memory"),
    [
        (V2, {"system.slice/kohakud.service/memory.max": "max"}, BUILT_IN),
        (V2, {"system.slice/kohakud.service/memory.max": "4294967296"}, 2**32),
        (V2, {"system.slice/memory.max": "4294967296"}, 2**32),
        (V2, {"system.slice/memory.max": "99", "system.slice/kohakud.service/memory.max": "7"}, 7),
        # In a container the path is the outer one, and what is mounted is its top.
        (V2, {"memory.max": "4294967296"}, 2**32),
        (V1, {"memory/docker/abc/memory.limit_in_bytes": "4294967296"}, 2**32),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, BUILT_IN),
        (V1, {"memory/memory.limit_in_bytes": "4294967296"}, 2**32),
        ("", {}, BUILT_IN),
    ],
)
def test_the_lowest_limit_of_our_cgroups_counts(
    cgroup: str, limits: dict[str, str], memory: int, root: Path
) -> None:
    put(root, "proc/self/cgroup", cgroup)
    for name, limit in limits.items():
        put(root, f"sys/fs/cgroup/{name}", limit + "\n")
    assert read_machine(root).memory == memory


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('ID=arch\nPRETTY_NAME="Arch Linux"', "Arch Linux"),
        ("PRETTY_NAME=Plain", "Plain"),
        ('PRETTY_NAME="never closed', '"never closed'),
        ("NAME=x", ""),
    ],
)
def test_names_of_distributions(text: str, name: str) -> None:
    assert parse_os_release(text) == name


def test_a_machine_that_says_nothing_is_still_a_machine(root: Path) -> None:
    shutil.rmtree(root)
    machine = read_machine(root)
    assert (machine.hostname, machine.cores, machine.memory) == ("", (), 0)
