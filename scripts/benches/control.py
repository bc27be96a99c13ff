"""The control plane alone: a batch through a real host and a runner whose tasks end at once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from frame import Row, interleave
from loads import Nulls
from peers import peer
from stage import Stage, stage

from protocol.client import Cluster
from protocol.messages.task import OneBatch, Submitted, WaitTasks
from protocol.methods import BATCH_SHOW, TASK_WAIT
from protocol.models.task import TaskSpec

TASKS: Final = 20_000
_DASK_TASKS: Final = 2_000
_SPEC: Final = TaskSpec(command=("/bin/true",), cores=0)


@dataclass(slots=True)
class _Figures:
    cpu_us: list[float] = field(default_factory=list)
    answer_ms: list[float] = field(default_factory=list)


def control(rounds: int) -> list[Row]:
    """One batch of 20,000 null tasks, submission to all ended and known; against dask no-ops."""
    figures, every = _Figures(), _Figures()
    with stage() as place, peer("peer_dask.py") as (dask, why_alone):
        place.start_host()
        nulls = Nulls(place)
        ours, theirs = interleave(
            rounds,
            lambda: asyncio.run(_batch(place, figures)),
            None if dask is None else lambda: dask.rate("noop", _DASK_TASKS),
        )
        counts = nulls.stop()
        if counts["launches"] != TASKS * (rounds + 1):
            raise RuntimeError(f"{counts['launches']} launches of {TASKS * (rounds + 1)} tasks")
        nulls = Nulls(place, prefix="every", every_state=True)
        [told] = interleave(rounds, lambda: asyncio.run(_batch(place, every)))
        nulls.stop()
    rows = _rows(ours, theirs, figures, counts, why_alone)
    what = "the same, each of three states told by itself"
    return [
        *rows,
        Row("control.rate_every_state", what, "tasks/s", told),
        Row("control.cpu_every_state", what, "us", every.cpu_us[-rounds:]),
    ]


async def _batch(place: Stage, figures: _Figures) -> float:
    async with place.connect() as there:
        cpu_before = place.cpu_s("host")
        began = time.perf_counter()
        submitted = await there.submit(_SPEC, array=TASKS)
        figures.answer_ms.append((time.perf_counter() - began) * 1e3)
        await until_over(there, submitted)
        wall_s = time.perf_counter() - began
        figures.cpu_us.append((place.cpu_s("host") - cpu_before) / TASKS * 1e6)
        await check_completed(there, submitted, TASKS)
    return TASKS / wall_s


async def until_over(there: Cluster, submitted: Submitted) -> None:
    """Wait for a batch as a client does that only wants to know."""
    question = WaitTasks(batch=submitted.batch, hold_s=60.0)
    while not (await there.call(TASK_WAIT, question, timeout_s=90.0)).done:
        pass


async def check_completed(there: Cluster, submitted: Submitted, count: int) -> None:
    """See that the books say so too.

    Raises:
        RuntimeError: They do not.
    """
    states = (await there.call(BATCH_SHOW, OneBatch(submitted.batch))).batch.states
    if states != {"completed": count}:
        raise RuntimeError(f"a batch of {count} ended as {states}")


def _rows(
    ours: list[float],
    theirs: list[float],
    figures: _Figures,
    counts: dict[str, int],
    why_alone: str,
) -> list[Row]:
    told = counts["reports"] / counts["launches"]
    group = counts["reports"] / counts["calls"]
    note = f"synchronous=FULL; {told:.1f} reports a task in groups of {group:.0f}"
    what = f"null tasks from one call of {TASKS:,}, to all known as ended"
    count = len(ours)
    return [
        Row("control.rate", what, "tasks/s", ours, goal=">= 15000 tasks/s", note=note),
        Row(
            "control.dask", "the same, against no-op functions", "tasks/s", ours,
            "dask.distributed", theirs, ">= 10 x", why_alone,
        ),
        Row(
            "control.cpu", "CPU of the host for each of them", "us", figures.cpu_us[-count:],
            goal="<= 60 us",
        ),
        Row("control.answer", f"answer to the call of {TASKS:,}", "ms", figures.answer_ms[-count:]),
    ]  # fmt: skip
