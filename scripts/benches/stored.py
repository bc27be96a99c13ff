"""A host with 100,000 tasks in its books beside one with 100: commits and pages."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Final

from control import check_completed, until_over
from frame import Row, interleave, percentile
from loads import Nulls
from stage import Stage, stage

from protocol.ids import TaskId
from protocol.messages.task import ListTasks
from protocol.methods import TASK_LIST
from protocol.models.task import TaskSpec, TaskState

_MANY: Final = 100_000
_FEW: Final = 100
#: In each round.
_SUBMISSIONS: Final = 200
_PAGES: Final = 400
_SPEC: Final = TaskSpec(command=("/bin/true", "--data", "/srv/data/set-1"), cores=0)


@dataclass(slots=True)
class _Books:
    """One host, and the ids it has."""

    place: Stage
    ids: list[int] = field(default_factory=list)
    page_p99_ms: list[float] = field(default_factory=list)


def stored(rounds: int) -> list[Row]:
    """With 100,000 tasks stored: the cost of a commit beside 100 stored, and a page of a list."""
    with stage() as first, stage() as second:
        books = _Books(first), _Books(second)
        for book, count in zip(books, (_MANY, _FEW), strict=True):
            book.place.start_host()
            Nulls(book.place)
            asyncio.run(_fill(book, count))
        commit_many, commit_few = interleave(
            rounds, *(lambda book=book: asyncio.run(_commit_us(book)) for book in books)
        )
        page_many, page_few = interleave(
            rounds, *(lambda book=book: asyncio.run(_page_ms(book)) for book in books)
        )
    tails = [book.page_p99_ms[-rounds:] for book in books]
    what = f"a page of 100 out of {_MANY:,} tasks"
    few = f"out of {_FEW} tasks"
    return [
        Row(
            "stored.commit", f"a commit with {_MANY:,} tasks stored", "us",
            commit_many, f"with {_FEW}", commit_few, "<= 1.5 x",
        ),
        Row("stored.page", f"{what}, p50", "ms", page_many, few, page_few),
        Row("stored.page_p99", f"{what}, p99", "ms", tails[0], few, tails[1], "<= 30 ms"),
    ]  # fmt: skip


async def _fill(book: _Books, count: int) -> None:
    async with book.place.connect() as there:
        submitted = await there.submit(_SPEC, array=count)
        await until_over(there, submitted)
        await check_completed(there, submitted, count)
        book.ids = list(submitted.ids())


async def _commit_us(book: _Books) -> float:
    """Submit one by one; give the mean time of a commit by the host's own count."""
    before_s, before = _commits(book.place)
    async with book.place.connect() as there:
        for _ in range(_SUBMISSIONS):
            await until_over(there, await there.submit(_SPEC))
    after_s, after = _commits(book.place)
    return (after_s - before_s) / (after - before) * 1e6


def _commits(place: Stage) -> tuple[float, float]:
    """Read seconds and number of commits from /metrics."""
    asked = urllib.request.Request(
        f"{place.url}/metrics", headers={"Authorization": f"Bearer {place.token}"}
    )
    with urllib.request.urlopen(asked, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return float(values["kohaku_commit_seconds_sum"]), float(values["kohaku_commit_seconds_count"])


async def _page_ms(book: _Books) -> float:
    """Read pages as people do: the newest, from anywhere, of one state, of one batch."""
    times = []
    async with book.place.connect() as there:
        for number in range(_PAGES):
            question = _question(book, number)
            began = time.perf_counter()
            page = await there.call(TASK_LIST, question)
            times.append((time.perf_counter() - began) * 1e3)
            assert page.tasks or question.before is not None
    book.page_p99_ms.append(percentile(times, 0.99))
    return statistics.median(times)


def _question(book: _Books, number: int) -> ListTasks:
    somewhere = TaskId(random.choice(book.ids))
    match number % 4:
        case 0:
            return ListTasks()
        case 1:
            return ListTasks(before=somewhere)
        case 2:
            return ListTasks(states=(TaskState.COMPLETED,), before=somewhere)
        case _:
            return ListTasks(owner="admin", before=somewhere)
