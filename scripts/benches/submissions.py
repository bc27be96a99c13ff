"""Submissions one by one, each a call of its own: how many a second."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Final

from frame import Row, interleave
from loads import Nulls
from stage import Stage, stage

from protocol.client import Cluster
from protocol.models.task import TaskSpec

_COUNT: Final = 1000
_CONNECTIONS: Final = 8
#: Submissions a second of an earlier system of this kind, which kept its tasks in TinyDB: a
#: stated figure, not measured here.
_EARLIER: Final = 15.0
_SPEC: Final = TaskSpec(command=("/bin/true",), cores=0)


def submissions(rounds: int) -> list[Row]:
    """Single submissions a second, each durable before the next, over one connection and eight."""
    with stage() as place:
        place.start_host()
        Nulls(place)
        one, eight = interleave(
            rounds,
            lambda: asyncio.run(_rate(place, 1)),
            lambda: asyncio.run(_rate(place, _CONNECTIONS)),
        )
    baseline, earlier = "an earlier system, as stated", [_EARLIER] * rounds
    what = "submissions of one task each, over"
    return [
        Row("submissions.one", f"{what} one connection", "calls/s", one, baseline, earlier),
        Row("submissions.eight", f"{what} eight", "calls/s", eight, baseline, earlier),
    ]


async def _rate(place: Stage, connections: int) -> float:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(place.connect()) for _ in range(connections)]
        began = time.perf_counter()
        await asyncio.gather(*(_submit(client, _COUNT // connections) for client in clients))
        return _COUNT / (time.perf_counter() - began)


async def _submit(there: Cluster, count: int) -> None:
    for _ in range(count):
        await there.submit(_SPEC)
