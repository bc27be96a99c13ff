"""Stands beside one test dockerd and takes all of it away when its standard input ends.

Knows: the namespaces and control groups that a test dockerd lives in, and how to leave nothing
of them. Does not know: Docker.

A program of its own, because it must also clean up after a pytest that was killed: the kernel
closes the pipe, whatever happened. It prints one line of JSON when the place is ready::

    python3 -I -S dockerd_guard.py NAME FOLDER [DISK_MIB]
    {"holder": 4711, "procs": "/sys/fs/cgroup/kd-x/_daemon/cgroup.procs"}

``holder`` is a process in the new network and mount namespaces, for nsenter; a process that
writes 0 into ``procs`` dies with the rest. It ends with status 1 and the reason when something
would stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

#: What a kill or a removal may take before it counts as left over.
PATIENCE_S = 20.0

#: Of the machine's, and written to by every dockerd and containerd: state of shims and plugins,
#: and the key that would give all engines of a machine the same id. Where one of them is not there
#: it is made, and stays, empty: taking it away would uncover it under another engine.
_COVERED = ("/run/containerd", "/run/docker", "/etc/docker", "/opt/containerd")

# `ip netns exec` would mount a new /sys without the control groups: plain unshare does not.
# Whether a container's mounts can be seen from outside must not depend on the machine: slave.
_HOLD = """
echo 0 >"$1"
ip link set lo up
shift
disk_mib=$1 data=$2
shift 2
if [ "$disk_mib" != 0 ]; then mount -t tmpfs -o "size=${disk_mib}m" tmpfs "$data"; fi
for folder in "$@"; do mount -t tmpfs tmpfs "$folder"; done
echo ready
exec sleep infinity
"""


def main() -> None:
    """Make the place, wait for the end of standard input, take the place away."""
    name, folder, disk_mib = sys.argv[1], Path(sys.argv[2]), (*sys.argv[3:], "0")[0]
    holder: subprocess.Popen[bytes] | None = None
    try:
        procs = _make_group(name)
        holder = _hold(procs, folder / "data", disk_mib)
        print(json.dumps({"holder": holder.pid, "procs": str(procs)}), flush=True)  # noqa: T201
        sys.stdin.buffer.read()
    finally:
        trees = [root / name for root in _hierarchies()]
        _kill(trees)
        if holder is not None:
            holder.wait()
        for tree in trees:
            _remove_group(tree)
        _remove_folder(folder)


def _hierarchies() -> list[Path]:
    """Where control groups are mounted, version 2 first: only that one can kill a whole tree."""
    found: dict[Path, str] = {}
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, place, kind, *_ = line.split()
            if kind in {"cgroup", "cgroup2"}:
                found.setdefault(Path(place), kind)
    return sorted(found, key=lambda place: found[place] != "cgroup2")


def _make_group(name: str) -> Path:
    """Make the group of dockerd itself; containers come beside it, by ``--cgroup-parent``."""
    roots = _hierarchies()
    if not roots:
        raise SystemExit("no control groups are mounted: dockerd needs them")
    # Not the upper folder itself: version 2 allows no process in a group that has child groups
    # with controllers (kernel's cgroup-v2.rst, "No Internal Process Constraint").
    group = roots[0] / name / "_daemon"
    group.mkdir(parents=True)
    return group / "cgroup.procs"


def _hold(procs: Path, data: Path, disk_mib: str) -> subprocess.Popen[bytes]:
    data.mkdir(parents=True, exist_ok=True)
    for folder in _COVERED:
        os.makedirs(folder, exist_ok=True)
    unshare = ["unshare", "--mount", "--net", "--propagation", "slave"]
    script = ["sh", "-ec", _HOLD, "sh", str(procs), disk_mib, str(data), *_COVERED]
    holder = subprocess.Popen(
        [*unshare, *script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd="/"
    )
    assert holder.stdout is not None
    if holder.stdout.readline() != b"ready\n":
        raise SystemExit(f"cannot make namespaces: status {holder.wait()}")
    return holder


def _kill(trees: list[Path]) -> None:
    """End every process of all these groups, paused ones too."""
    for _ in _attempts():
        if not any(_processes(tree) for tree in trees):
            return
        for tree in trees:
            _kill_once(tree)
    left = sorted({pid for tree in trees for pid in _processes(tree)})
    raise SystemExit(f"processes {left} could not be killed")


def _kill_once(tree: Path) -> None:
    for group in _groups(tree):
        # In version 1 a frozen process does not even die.
        if (group / "freezer.state").exists():
            _write(group / "freezer.state", "THAWED")
    if (tree / "cgroup.kill").exists():
        _write(tree / "cgroup.kill", "1")
        return
    for pid in _processes(tree):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _processes(tree: Path) -> list[int]:
    pids: list[int] = []
    for group in _groups(tree):
        # OSError: removed since it was listed.
        with contextlib.suppress(OSError):
            pids += [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    # 0: a process of another pid namespace, which cannot be of ours.
    return [pid for pid in pids if pid]


def _groups(tree: Path) -> list[Path]:
    """All groups below and with ``tree``, the innermost first."""
    return [Path(group) for group, _, _ in os.walk(tree, topdown=False)]


def _remove_group(tree: Path) -> None:
    for _ in _attempts():
        for group in _groups(tree):
            with contextlib.suppress(OSError):
                group.rmdir()
        if not tree.exists():
            return
    raise SystemExit(f"control group {tree} could not be removed")


def _remove_folder(folder: Path) -> None:
    for _ in _attempts():
        # What was mounted inside is gone with the last process of its mount namespace, but a
        # little later than that.
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
    raise SystemExit(f"{folder} could not be removed")


def _attempts() -> Iterator[None]:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        yield
        time.sleep(0.002)


def _write(file: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        file.write_text(text)


if __name__ == "__main__":
    main()
