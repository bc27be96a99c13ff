"""What daemons cost that have nothing to do, how soon they are ready, and the CLI as a process."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Final

from frame import Row, begin_rounds, interleave
from stage import Stage, cluster, stage

_WATCHED_S: Final = 10.0


def idle(rounds: int) -> list[Row]:
    """Memory and CPU of an idle host and runner together, and how soon each is ready."""
    memory: list[float] = []
    cpu: list[float] = []
    host: list[float] = []
    runner: list[float] = []
    floor: list[float] = []
    for _ in begin_rounds(rounds, warm_up=False):
        floor.append(_python("import aiohttp"))
        with stage() as place:
            host.append(place.start_host())
            runner.append(place.start_runner())
            _settle(place)
            before = place.all_cpu_s()
            began = time.perf_counter()
            time.sleep(_WATCHED_S)
            used = place.all_cpu_s() - before
            cpu.append(100 * used / (time.perf_counter() - began))
            memory.append(place.all_rss_mib())
    least = "python -c 'import aiohttp'"
    return [
        Row(
            "idle.memory",
            "RSS of host, runner and what keeps its tasks",
            "MB",
            _to_mb(memory),
            goal="<= 120 MB",
        ),
        Row("idle.cpu", "CPU of the same", "%", cpu, goal="<= 1 %"),
        Row("idle.host_ready", "host ready, new home", "s", host, least, floor, "<= 1 s"),
        Row("idle.runner_ready", "runner online, new home", "s", runner, least, floor, "<= 1 s"),
    ]


def cli(rounds: int) -> list[Row]:
    """``kohaku task list`` as a whole process."""
    with cluster() as place:
        place.run("kohaku", "task", "submit", "--wait", "--", "/bin/true")

        def listing() -> float:
            began = time.perf_counter()
            place.run("kohaku", "task", "list")
            return time.perf_counter() - began

        ours, theirs = interleave(rounds, listing, lambda: _python("pass"))
    return [
        Row("cli", "kohaku task list", "s", ours, "python -c pass", theirs, "<= 0.35 s"),
    ]


def _settle(place: Stage) -> None:
    """Let what a start leaves behind (joining, first readings) be over before idling begins."""
    place.run("kohaku", "task", "submit", "--wait", "--", "/bin/true")
    place.run("kohaku", "status")


def _to_mb(mebibytes: list[float]) -> list[float]:
    return [value * 2**20 / 1e6 for value in mebibytes]


def _python(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began
