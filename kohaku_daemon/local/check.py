"""``kohakud check``: what this machine can do, and what to install for the rest.

Knows: each part a node may have, and how it is really tried where it can be.
Does not know: the cluster; nothing needs to run.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from kohaku_daemon.backends.process.backend import ProcessBackend
from kohaku_daemon.probe.gpus import Gpus
from kohaku_daemon.probe.machine import read_machine
from protocol.home import data_dir
from protocol.models.node import BackendInfo
from protocol.units import render_size

#: Bytes below which a disk is called nearly full: one task may write 64 MiB for each output.
_LITTLE: Final = 2**30
#: Seconds for a Docker engine to answer.
_DOCKER_S: Final = 3.0
_OLDEST_PYTHON: Final = (3, 11)
_PER_PROCESS: Final = "hold for each process only; -m hogs end failed, not oom_killed"


class Verdict(StrEnum):
    """How one part of the machine is."""

    OK = "ok"
    #: It works, and could do more.
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the machine, as it was found."""

    name: str
    verdict: Verdict
    says: str
    #: What to do to have more of it; empty if nothing is to be done.
    advice: str = ""
    #: Without it no task could run here.
    needed: bool = False


def check(*, as_json: bool) -> int:
    """Look at the machine and say what was found. Gives 0 if a task could run here, else 1."""
    parts = list(look())
    can_run = all(part.verdict is not Verdict.MISSING for part in parts if part.needed)
    if as_json:
        document = {"can_run_tasks": can_run, "parts": [asdict(part) for part in parts]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.write(_describe(parts, can_run=can_run))
    return 0 if can_run else 1


def look() -> Iterator[Part]:
    """Look at one part after the other."""
    yield _python()
    yield _machine()
    yield _disk(data_dir())
    yield from _process()
    yield _gpus()
    yield _docker()
    yield _kvm()


# --- what every node needs ------------------------------------------------------------------


def _python() -> Part:
    good = sys.version_info >= _OLDEST_PYTHON
    return Part(
        "python",
        Verdict.OK if good else Verdict.MISSING,
        f"{platform.python_version()} at {sys.executable}",
        "" if good else "install Python 3.11 or newer",
        needed=True,
    )


def _machine() -> Part:
    machine = read_machine(Path("/"))
    says = f"{len(machine.cores)} cores, {render_size(machine.memory)}"
    return Part("machine", Verdict.OK, f"{says}, {machine.system}, Linux {machine.kernel}")


def _disk(folder: Path) -> Part:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    says = f"{render_size(free)} free for {folder}"
    if not os.access(there, os.W_OK | os.X_OK):
        advice = f"{there} cannot be written; set KOHAKU_HOME to a folder of yours"
        return Part("disk", Verdict.MISSING, says, advice, needed=True)
    if free < _LITTLE:
        advice = "output of tasks is lost when it is full; free some, or set KOHAKU_HOME"
        return Part("disk", Verdict.LIMITED, says, advice, needed=True)
    return Part("disk", Verdict.OK, says, needed=True)


# --- the process backend --------------------------------------------------------------------


def _process() -> Iterator[Part]:
    """Run a trial task in each way the backend knows, as a runner does when it starts."""
    info = asyncio.run(_try_process())
    if not info.healthy:
        yield Part("process backend", Verdict.MISSING, info.message, needed=True)
        return
    yield Part("process backend", Verdict.OK, "a trial task ran", needed=True)
    has_namespaces = "namespaces" in info.isolation
    yield Part(
        "isolation",
        Verdict.OK if has_namespaces else Verdict.LIMITED,
        info.isolation,
        "" if has_namespaces else _advise_isolation(info.message),
    )
    limits = [name for name in ("memory", "cores", "numa", "pause") if name in info.enforces]
    lacking = {"memory", "cores"} - set(limits)
    yield Part(
        "limits",
        Verdict.LIMITED if lacking else Verdict.OK,
        f"enforced for a whole task: {', '.join(limits) or 'nothing'}",
        _advise_cgroups() if lacking else "",
    )
    if "memory" in lacking:
        # Told apart: it changes how the ends of tasks read.
        yield Part("memory limits", Verdict.LIMITED, _PER_PROCESS)


async def _try_process() -> BackendInfo:
    with _trial_folder() as folder:
        backend = ProcessBackend(state_root=folder / "process", node="kohakud-check")
        try:
            return await backend.open()
        finally:
            await backend.close()


@contextmanager
def _trial_folder() -> Iterator[Path]:
    """Make a folder beside the one runners keep their data in, or anywhere if that is not ours.

    Modes of the folders above that bar tasks from there bar the trial too.
    """
    there = next(path for path in data_dir().parents if path.exists())
    place = there if os.access(there, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix=".kohakud-check-", dir=place) as name:
        folder = Path(name)
        # As runners do with theirs: tasks of a runner that is root are users of their own.
        folder.chmod(0o711)
        yield folder


def _advise_isolation(why: str) -> str:
    if os.geteuid() == 0:
        return f"tasks see this machine's processes and files: {why}"
    return f"let users make namespaces (sysctl user.max_user_namespaces), or run as root: {why}"


def _advise_cgroups() -> str:
    if os.geteuid() == 0:
        return "no cgroup can be made below /sys/fs/cgroup; mount it writable"
    return "run the runner as root, or as a systemd unit: kohakud init runner --systemd"


# --- what some nodes have -------------------------------------------------------------------


def _gpus() -> Part:
    gpus = Gpus(Path("/"))
    try:
        found = gpus.inventory()
    finally:
        gpus.close()
    if not found:
        advice = "if there is one, install NVIDIA's driver: nvidia-smi must list it"
        return Part("gpus", Verdict.MISSING, "no NVIDIA GPU answers", advice)
    return Part("gpus", Verdict.OK, ", ".join(f"{gpu.index}: {gpu.name}" for gpu in found))


def _docker() -> Part:
    path = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    advice = "for tasks in containers install Docker; this release does not use it yet"
    if not Path(path).exists():
        return Part("docker", Verdict.MISSING, f"no engine at {path}", advice)
    try:
        version = _ask_docker(path)["Version"]
    except PermissionError:
        return Part("docker", Verdict.LIMITED, f"{path} is not open to this user", advice)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        return Part("docker", Verdict.MISSING, f"{path} does not answer: {error}", advice)
    return Part("docker", Verdict.OK, f"engine {version}; this release does not use it yet")


def _ask_docker(path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection("localhost", timeout=_DOCKER_S)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(_DOCKER_S)
        connection.sock.connect(path)
        connection.request("GET", "/version")
        answer: dict[str, Any] = json.loads(connection.getresponse().read(2**20))
        return answer
    finally:
        connection.close()


def _kvm() -> Part:
    device = Path("/dev/kvm")
    if not device.exists():
        advice = "for virtual machines, which come in a later release: enable it in the BIOS"
        return Part("kvm", Verdict.MISSING, f"no {device}", advice)
    if not os.access(device, os.R_OK | os.W_OK):
        advice = "add this user to the group kvm"
        return Part("kvm", Verdict.LIMITED, f"{device} is not open to this user", advice)
    # Seen: a device that opens, and machines that then never get anywhere.
    says = f"{device} is there; only starting a machine tells whether it works"
    return Part("kvm", Verdict.LIMITED, says)


# --- words ----------------------------------------------------------------------------------


def _describe(parts: list[Part], *, can_run: bool) -> str:
    lines = []
    for part in parts:
        lines.append(f"{part.verdict:<8} {part.name:<16} {part.says}")
        if part.advice:
            lines.append(f"{'':<25} {part.advice}")
    lines.append("")
    lines.append("tasks can run here" if can_run else "no task can run here")
    return "\n".join(lines) + "\n"
