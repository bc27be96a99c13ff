"""What a container uses, out of the kernel's own files.

Knows: how the control groups of a process are found. Does not know: containers.

Docker's own statistics take a second, because it measures twice; these files take microseconds.
"""

from __future__ import annotations

from pathlib import Path

from kohaku_daemon.backends.process.files import read_text
from kohaku_daemon.backends.process.group import UNIFIED, Group

#: Those that count what is told.
_COUNTED = ("memory", "cpuacct")


def find_group(pid: int, container: str, root: Path) -> Group | None:
    """Find the control groups of a container's first process; None if they cannot be read.

    Args:
        pid: As this machine counts.
        container: Id of the container: where a group's path lacks it, the pid is another's by
            now, or the engine has made no group there.
        root: Where the cgroup file systems are mounted.
    """
    try:
        lines = read_text(f"/proc/{pid}/cgroup").splitlines()
    except OSError:
        return None
    is_v2 = (root / "cgroup.controllers").exists()
    folders = {}
    for line in lines:
        # man 7 cgroups, /proc/PID/cgroup: NUMBER:CONTROLLERS:PATH, without controllers for v2.
        _, names, path = line.split(":", 2)
        if container not in path:
            continue
        if not names:
            folders[UNIFIED] = f"{root}{path}" if is_v2 else f"{root}/{UNIFIED}{path}"
        for name in set(names.split(",")) & set(_COUNTED):
            folders[name] = f"{root}/{name}{path}"
    there = {name: folder for name, folder in folders.items() if Path(folder).is_dir()}
    return Group(there) if there else None
