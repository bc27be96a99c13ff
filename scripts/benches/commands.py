"""Real commands in the process backend: without walls and with them, against the bare ways."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
import time
from typing import Final

from control import check_completed, until_over
from frame import Row, interleave
from peers import Peer, peer
from stage import Stage, cluster, family_cpu_s

from protocol.models.task import TaskSpec

_TRUE: Final = "/bin/true"
_TASKS: Final = 1000
#: At once, for everybody.
_SLOTS: Final = 8
_PLAIN: Final = {"KOHAKU_RUNNER_PROCESS_ISOLATION": "plain"}
_WALLED: Final = {"KOHAKU_RUNNER_PROCESS_ISOLATION": "namespaces"}
_IS_ROOT: Final = os.geteuid() == 0
#: A user without rights, as the backend gives one to each task of a runner that is root.
_NOBODY: Final = "65534"
#: Namespaces and /proc, and no more: fewer walls than a task has. Who is not root needs a user
#: namespace to make the others in, as the backend does.
_UNSHARE: Final = (
    "unshare", "--fork", "--pid", "--mount", "--ipc", "--uts", "--mount-proc",
    *(() if _IS_ROOT else ("--map-root-user",)),
)  # fmt: skip
_AS_NOBODY: Final = (f"--setgid={_NOBODY}", f"--setuid={_NOBODY}") if _IS_ROOT else ()
#: The walls of a task: also a tree that is read-only and private folders for scratch files.
_BY_SHELL: Final = (
    *_UNSHARE, "sh", "-c",
    "hostname task && mount -o remount,bind,ro / && "
    "for folder in /tmp /var/tmp /dev/shm; do "
    "mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs $folder || exit; done; exec "
    + (f"setpriv --reuid {_NOBODY} --regid {_NOBODY} --clear-groups " if _IS_ROOT else "")
    + _TRUE,
)  # fmt: skip
#: The same by one program made for it, which is faster. It keeps the user.
_BY_BUBBLEWRAP: Final = (
    "bwrap", "--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc",
    "--tmpfs", "/tmp", "--tmpfs", "/var/tmp", "--tmpfs", "/dev/shm", "--unshare-pid",
    "--unshare-ipc", "--unshare-uts", "--hostname", "task", "--new-session",
    "--die-with-parent", _TRUE,
)  # fmt: skip


def commands(rounds: int) -> list[Row]:
    """/bin/true without isolation against HyperQueue and xargs; with it, against it by hand."""
    return [*_plain(rounds), *_isolated(rounds)]


def _plain(rounds: int) -> list[Row]:
    ours_us, queue_us, bare_us = (list[float]() for _ in range(3))
    with (
        peer("peer_hyperqueue.py", str(_SLOTS)) as (hyperqueue, why_alone),
        cluster(KOHAKU_RUNNER_MAX_TASKS=str(_SLOTS), **_PLAIN) as place,
    ):
        ours, queue, bare = interleave(
            rounds,
            lambda: asyncio.run(_batch(place, ours_us)),
            None if hyperqueue is None else lambda: _queue(hyperqueue, queue_us),
            lambda: xargs(bare_us, _TRUE),
        )
    what = f"{_TRUE} without isolation, {_SLOTS} at once"
    cpu = f"CPU of all processes for each {_TRUE}"
    return [
        Row("commands.hyperqueue", what, "tasks/s", ours, "HyperQueue", queue, ">= 2 x", why_alone),
        Row("commands.xargs", what, "tasks/s", ours, f"xargs -P{_SLOTS}", bare, ">= 0.8 x"),
        Row(
            "commands.cpu_hyperqueue", cpu, "us", ours_us[-rounds:],
            "HyperQueue", queue_us[-rounds:], note=why_alone,
        ),
        Row("commands.cpu_xargs", cpu, "us", ours_us[-rounds:], "xargs", bare_us[-rounds:]),
    ]  # fmt: skip


def _isolated(rounds: int) -> list[Row]:
    """The goal is against the fastest way to the same walls that this machine has."""
    same = _BY_BUBBLEWRAP if shutil.which("bwrap") is not None else _BY_SHELL
    ours_us, same_us, fewer_us = (list[float]() for _ in range(3))
    with cluster(KOHAKU_RUNNER_MAX_TASKS=str(_SLOTS), **_WALLED) as place:
        ours, by_hand, fewer = interleave(
            rounds,
            lambda: asyncio.run(_batch(place, ours_us)),
            lambda: xargs(same_us, *same),
            lambda: xargs(fewer_us, *_UNSHARE, *_AS_NOBODY, _TRUE),
        )
    what = f"{_TRUE} in namespaces of its own, {_SLOTS} at once"
    name = f"xargs -P{_SLOTS} {same[0]}, the same walls"
    return [
        Row("commands.isolated", what, "tasks/s", ours, name, by_hand, ">= 0.8 x"),
        Row("commands.unshare", what, "tasks/s", ours, "xargs unshare, no mounts but /proc", fewer),
        Row(
            "commands.cpu_isolated", f"CPU of all processes for each {_TRUE}", "us",
            ours_us[-rounds:], name, same_us[-rounds:],
        ),
    ]  # fmt: skip


async def _batch(place: Stage, cpu_us: list[float]) -> float:
    async with place.connect() as there:
        before_s = place.all_cpu_s()
        began = time.perf_counter()
        submitted = await there.submit(TaskSpec(command=(_TRUE,), cores=0), array=_TASKS)
        await until_over(there, submitted)
        wall_s = time.perf_counter() - began
        cpu_us.append((place.all_cpu_s() - before_s) / _TASKS * 1e6)
        await check_completed(there, submitted, _TASKS)
    return _TASKS / wall_s


def _queue(hyperqueue: Peer, cpu_us: list[float]) -> float:
    before_s = family_cpu_s(hyperqueue.pid)
    rate = hyperqueue.rate("true", _TASKS)
    cpu_us.append((family_cpu_s(hyperqueue.pid) - before_s) / _TASKS * 1e6)
    return rate


def xargs(cpu_us: list[float], *command: str) -> float:
    """Run a command as often, as xargs does; give the rate."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(
        ["xargs", f"-P{_SLOTS}", "-I{}", *command], input="x\n" * _TASKS, text=True, check=True
    )
    wall_s = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cpu_us.append(used_s / _TASKS * 1e6)
    return _TASKS / wall_s
