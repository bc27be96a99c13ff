"""What the machine is: its names, and the cores and memory that are ours to give.

Knows: /proc, /etc/os-release, and the limits that cgroups of both versions put on us.
Does not know: NUMA nodes, GPUs, what changes from second to second.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kohaku_daemon.probe.files import parse_fields, parse_list, read_number, read_text


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine, or the container that we take for one."""

    hostname: str
    #: Name and version of the distribution.
    system: str
    kernel: str
    architecture: str
    boot_id: str
    #: Numbers of the cores we may run on.
    cores: tuple[int, ...]
    #: Bytes; the lowest limit of our cgroups if that is lower than what is built in.
    memory: int


def read_machine(root: Path) -> Machine:
    """Read all of it."""
    kernel = root / "proc/sys/kernel"
    return Machine(
        hostname=read_text(kernel / "hostname"),
        system=parse_os_release(
            read_text(root / "etc/os-release") or read_text(root / "usr/lib/os-release")
        )
        or read_text(kernel / "ostype"),
        kernel=read_text(kernel / "osrelease"),
        architecture=os.uname().machine,
        boot_id=read_text(kernel / "random/boot_id"),
        cores=read_cores(root),
        memory=read_memory(root),
    )


def read_cores(root: Path) -> tuple[int, ...]:
    """Give the cores that are online and that this process may use.

    ``Cpus_allowed_list`` is what ``sched_getaffinity`` gives, cpuset included, but it may
    also name cores that are offline (``man 2 sched_setaffinity``).
    """
    allowed = parse_allowed(read_text(root / "proc/self/status"))
    online = parse_list(read_text(root / "sys/devices/system/cpu/online"))
    return tuple(core for core in allowed if core in set(online)) if online else allowed


def read_memory(root: Path) -> int:
    """Give the bytes of memory that are built in, or less if a cgroup of ours has a limit."""
    built_in = parse_fields(read_text(root / "proc/meminfo")).get("MemTotal", 0)
    return min([built_in, *_memory_limits(root)])


def parse_os_release(text: str) -> str:
    """Give the name for people of an os-release file (``man 5 os-release``)."""
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key == "PRETTY_NAME":
            try:
                return " ".join(shlex.split(value))
            except ValueError:  # a quote that is never closed
                return value
    return ""


def parse_allowed(status: str) -> tuple[int, ...]:
    """Give the cores of ``Cpus_allowed_list`` in /proc/PID/status."""
    for line in status.splitlines():
        key, _, value = line.partition(":")
        if key == "Cpus_allowed_list":
            return parse_list(value)
    return ()


def parse_memory_cgroup(text: str) -> tuple[str, str]:
    """Give where /proc/self/cgroup puts our memory: folder under /sys/fs/cgroup, file of the limit.

    Lines are ``number:controllers:path`` (``man 7 cgroups``). With the controller in a
    hierarchy of version 1 that one counts, as on hybrid machines; else version 2's.
    """
    unified = ""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            return f"memory{path}", "memory.limit_in_bytes"
        if not controllers:  # version 2's line
            unified = path
    return unified.lstrip("/"), "memory.max"


def _memory_limits(root: Path) -> Iterator[int]:
    """Give the limit of our cgroup and of each one above it, where there is one.

    In a container our own path may not be there; what is mounted is its top, which is ours.
    """
    mounts = root / "sys/fs/cgroup"
    where, name = parse_memory_cgroup(read_text(root / "proc/self/cgroup"))
    folder = mounts / where
    while folder != mounts.parent:
        limit = read_number(folder / name)  # version 2 says "max" for none
        if limit is not None:
            yield limit
        folder = folder.parent
