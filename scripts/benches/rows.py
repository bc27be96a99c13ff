"""What is measured. Each function gives rows; its name is the row's name on the command line."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from frame import Row, interleave
from home import Home, cluster

from protocol.client import Cluster, connect
from protocol.messages.stream import LogChunk

_TRUE = "/bin/true"
#: No isolation and as many tasks at once as xargs gets: the row compares bookkeeping.
_PLAIN = {"KOHAKU_RUNNER_PROCESS_ISOLATION": "plain"}
_AT_ONCE = 8


def connect_to(home: Home) -> Cluster:
    """Connect as the CLI of that home would."""
    os.environ["KOHAKU_HOME"] = str(home.folder)
    return connect()


def control(rounds: int) -> list[Row]:
    """One batch through host and runner with a backend that does nothing; CPU of the host."""
    count = 5000
    with cluster("mock", KOHAKU_RUNNER_MAX_TASKS="512") as home:
        cpu_us: list[float] = []

        async def batch() -> float:
            async with connect_to(home) as there:
                cpu_before = home.cpu_s("host")
                began = time.perf_counter()
                submitted = await there.submit([_TRUE], array=count, cores=0)
                await there.wait(submitted)
                wall_s = time.perf_counter() - began
                cpu_us.append((home.cpu_s("host") - cpu_before) / count * 1e6)
                return count / wall_s

        ours, theirs = interleave(rounds, lambda: asyncio.run(batch()), lambda: xargs(count))
    return [
        Row("control", "null tasks, one batch", "tasks/s", ours, "xargs -P8 true", theirs, "more"),
        Row("control", "CPU of the host, each null task", "us", cpu_us[1:], goal="<= 60 us"),
    ]


def commands(rounds: int) -> list[Row]:
    """Real commands, without isolation and with it, against xargs."""
    return [_true_at_once(rounds, "plain", _PLAIN, ">= 0.8"), _true_at_once(rounds, "isolated", {})]


def _true_at_once(rounds: int, name: str, settings: dict[str, str], goal: str = "more") -> Row:
    count = 500
    with cluster("process", KOHAKU_RUNNER_MAX_TASKS=str(_AT_ONCE), **settings) as home:

        async def batch() -> float:
            async with connect_to(home) as there:
                began = time.perf_counter()
                submitted = await there.submit([_TRUE], array=count, cores=0)
                await there.wait(submitted)
                return count / (time.perf_counter() - began)

        ours, theirs = interleave(rounds, lambda: asyncio.run(batch()), lambda: xargs(count))
    what = f"{_TRUE}, {name}, {_AT_ONCE} at once"
    return Row("commands", what, "tasks/s", ours, f"xargs -P{_AT_ONCE}", theirs, goal)


def latency(rounds: int) -> list[Row]:
    """One command at a time: answer of the submission, and known exit."""
    with cluster("process", **_PLAIN) as home:
        answers: list[float] = []
        tails: list[float] = []

        async def one_by_one() -> float:
            ends: list[float] = []
            begun: list[float] = []
            async with connect_to(home) as there:
                for _ in range(50):
                    began = time.perf_counter()
                    submitted = await there.submit([_TRUE], cores=0)
                    begun.append((time.perf_counter() - began) * 1e3)
                    await there.wait(submitted)
                    ends.append((time.perf_counter() - began) * 1e3)
            answers.append(statistics.median(begun))
            tails.append(sorted(ends)[-1])
            return statistics.median(ends)

        ours, theirs = interleave(
            rounds, lambda: asyncio.run(one_by_one()), lambda: median_ms(spawn_true)
        )
    return [
        Row("latency", "submit to known exit, p50", "ms", ours, "subprocess.run", theirs, "10 ms"),
        Row("latency", "submit to known exit, worst of 50", "ms", tails[1:], goal="<= 30 ms"),
        Row("latency", "durable answer, p50", "ms", answers[1:], goal="<= 2 ms"),
    ]


def idle(rounds: int) -> list[Row]:
    """Memory and CPU of daemons that have nothing to do, and how soon they are ready."""
    memory, cpu, ready = [], [], []
    for _ in range(min(rounds, 3)):
        with cluster() as home:
            names = ("host", "runner-node1")
            before = sum(map(home.cpu_s, names))
            began = time.perf_counter()
            time.sleep(5)
            used = sum(map(home.cpu_s, names)) - before
            cpu.append(100 * used / (time.perf_counter() - began))
            memory.append(sum(map(home.rss_mib, names)))
            ready.append(home.start_s)
    return [
        Row("idle", "RSS of host and runner", "MiB", memory, goal="<= 120 MiB"),
        Row("idle", "CPU of host and runner", "%", cpu, goal="<= 1 %"),
        Row("idle", "kohakud up --detach, new home", "s", ready, goal="<= 1 s each daemon"),
    ]


def cli(rounds: int) -> list[Row]:
    """A whole process of the CLI."""
    with cluster() as home:
        home.run("kohaku", "task", "submit", "--wait", "--", _TRUE)

        def listing() -> float:
            began = time.perf_counter()
            home.run("kohaku", "task", "list")
            return time.perf_counter() - began

        ours, theirs = interleave(rounds, listing, python_alone)
    return [Row("cli", "kohaku task list", "s", ours, "python -c pass", theirs, "<= 0.35 s")]


def logs(rounds: int) -> list[Row]:
    """Reading a task's output to its end, from the runner's file through the host."""
    size = 200 * 2**20
    with cluster(KOHAKU_RUNNER_LOG_CAP="1G") as home:
        task = int(
            home.run(
                "kohaku", "task", "submit", "--wait", "--",
                "sh", "-c", f"yes 'a line of output, as programs write them' | head -c {size}",
            ).split()[0]
        )  # fmt: skip

        async def read() -> float:
            got = 0
            async with connect_to(home) as there:
                began = time.perf_counter()
                async for item in there.logs(task):
                    if isinstance(item, LogChunk):
                        got += len(item.data)
                wall_s = time.perf_counter() - began
            assert got == size, f"{got} bytes of {size} came"
            return got / wall_s / 1e6

        def pipe() -> float:
            began = time.perf_counter()
            command = f"head -c {size} /dev/zero | cat | cat >/dev/null"
            subprocess.run(command, shell=True, check=True)
            return size / (time.perf_counter() - began) / 1e6

        ours, theirs = interleave(rounds, lambda: asyncio.run(read()), pipe)
    goal = ">= 100 MB/s"
    return [Row("logs", "reading 200 MiB of output", "MB/s", ours, "two pipes", theirs, goal)]


ROWS: dict[str, Callable[[int], list[Row]]] = {
    row.__name__: row for row in (control, commands, latency, idle, cli, logs)
}


def xargs(count: int) -> float:
    """Start true as often, as xargs does; give the rate."""
    lines = "\n" * count
    began = time.perf_counter()
    subprocess.run(
        ["xargs", f"-P{_AT_ONCE}", "-I{}", _TRUE],
        input=lines.replace("\n", "x\n"),
        text=True,
        check=True,
    )
    return count / (time.perf_counter() - began)


def spawn_true() -> None:
    """Start one process and wait for it."""
    subprocess.run([_TRUE], check=True)


def median_ms(call: Callable[[], None]) -> float:
    """Give the median time of fifty calls."""
    times = []
    for _ in range(50):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def python_alone() -> float:
    """Start an interpreter that does nothing."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - began
