"""One command at a time: how soon a submission is durable, and how soon its end is known."""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from frame import Row, interleave, percentile
from stage import Stage, cluster

from protocol.messages.task import WaitTasks
from protocol.methods import TASK_WAIT
from protocol.models.task import TaskSpec

_TRUE: Final = "/bin/true"
#: In each round; the tenth worst is then the 99th percentile.
_SAMPLES: Final = 1000
_BASELINE_SAMPLES: Final = 200


@dataclass(slots=True)
class _Round:
    answers_ms: list[float] = field(default_factory=list)
    ends_ms: list[float] = field(default_factory=list)


def latency(rounds: int) -> list[Row]:
    """One command at a time: durable answer, and submission to known exit, p50 and p99."""
    measured: list[_Round] = []
    with cluster(KOHAKU_RUNNER_PROCESS_ISOLATION="plain") as place:
        ours, spawned, committed = interleave(
            rounds,
            lambda: asyncio.run(_one_by_one(place, measured)),
            _spawn_ms,
            lambda: _commit_ms(place.folder / "baseline.sqlite"),
        )
    kept = measured[-rounds:]
    what = f"{_TRUE}, submission to known exit"
    answers = [statistics.median(one.answers_ms) for one in kept]
    tails = [percentile(one.ends_ms, 0.99) for one in kept]
    return [
        Row(
            "latency.end", f"{what}, p50", "ms", ours,
            "subprocess.run of it", spawned, "<= 10 ms",
        ),
        Row("latency.end_p99", f"{what}, p99", "ms", tails, goal="<= 30 ms"),
        Row(
            "latency.answer", "durable answer to a submission, p50", "ms", answers,
            "one commit of SQLite, synchronous=FULL", committed, "<= 2 ms",
        ),
        Row(
            "latency.answer_p99", "durable answer to a submission, p99", "ms",
            [percentile(one.answers_ms, 0.99) for one in kept],
        ),
    ]  # fmt: skip


async def _one_by_one(place: Stage, measured: list[_Round]) -> float:
    this = _Round()
    spec = TaskSpec(command=(_TRUE,), cores=0)
    async with place.connect() as there:
        for _ in range(_SAMPLES):
            began = time.perf_counter()
            submitted = await there.submit(spec)
            this.answers_ms.append((time.perf_counter() - began) * 1e3)
            over = await there.call(TASK_WAIT, WaitTasks(batch=submitted.batch))
            this.ends_ms.append((time.perf_counter() - began) * 1e3)
            assert over.done
    measured.append(this)
    return statistics.median(this.ends_ms)


def _spawn_ms() -> float:
    times = []
    for _ in range(_BASELINE_SAMPLES):
        began = time.perf_counter()
        subprocess.run([_TRUE], check=True)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def _commit_ms(path: Path) -> float:
    """Time what any durable answer has to wait for on this disk."""
    times = []
    store = sqlite3.connect(path, isolation_level=None)
    try:
        store.execute("PRAGMA journal_mode=WAL")
        store.execute("PRAGMA synchronous=FULL")
        store.execute("CREATE TABLE IF NOT EXISTS task (id INTEGER PRIMARY KEY, body BLOB)")
        for _ in range(_BASELINE_SAMPLES):
            began = time.perf_counter()
            store.execute("INSERT INTO task (body) VALUES (?)", (b"x" * 300,))
            times.append((time.perf_counter() - began) * 1e3)
    finally:
        store.close()
    return statistics.median(times)
