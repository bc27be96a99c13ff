"""Turns on the event loop: many steps of one peer are no pause for another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

import pytest

from kohaku_daemon.turns import PURSE_S, Purse, Turns


def work_for(seconds: float) -> None:
    """Use the loop."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def an_empty_purse() -> Purse:
    """Make one that does not fill up by itself."""
    purse = Purse(income=0.0)
    now = time.perf_counter()
    purse.spend(PURSE_S + 0.001, now, now)
    return purse


def begin(turns: Turns, work: Coroutine[Any, Any, Any], purse: Purse, lane: object = 1) -> Any:
    return asyncio.ensure_future(turns.run(work, purse, lane))


async def test_work_gives_what_it_gives_and_raises_what_it_raises() -> None:
    async def give() -> int:
        await asyncio.sleep(0)
        return await asyncio.sleep(0.001, 7)

    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("gone")

    for purse in (Purse(), an_empty_purse()):
        assert await Turns().run(give(), purse, 1) == 7
        with pytest.raises(LookupError, match="gone"):
            await Turns().run(fail(), purse, 1)


async def test_what_is_awaited_raises_where_it_is_awaited() -> None:
    async def wait_for_it(future: asyncio.Future[int]) -> str:
        try:
            await future
        except LookupError as error:
            return f"caught {error}"
        return "nothing came"

    for purse in (Purse(), an_empty_purse()):
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        job = begin(Turns(), wait_for_it(future), purse)
        await asyncio.sleep(0)
        future.set_exception(LookupError("x"))
        assert await job == "caught x"


async def test_time_limits_inside_and_outside_hold() -> None:
    async def slow() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            return "in time"
        return ""

    for purse in (Purse(), an_empty_purse()):
        assert await Turns().run(slow(), purse, 1) == "in time"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Turns().run(asyncio.Event().wait(), purse, 1), 0.01)


async def test_a_full_purse_waits_for_nobody() -> None:
    turns = Turns()
    steps: list[str] = []

    async def step(name: str) -> None:
        steps.append(name)

    queued = [begin(turns, step("poor"), an_empty_purse(), lane=number) for number in range(20)]
    rich = begin(turns, step("rich"), Purse())
    await asyncio.gather(rich, *queued)
    assert steps.index("rich") == 0


@pytest.mark.parametrize(("step_s", "at_most"), [(0.0, 32), (0.0005, 6), (0.003, 2)])
async def test_those_who_wait_have_a_slice_of_each_turn_of_the_loop(
    step_s: float, at_most: int
) -> None:
    turns, purse = Turns(), an_empty_purse()
    at_once = most = 0

    async def step() -> None:
        nonlocal at_once, most
        work_for(step_s)
        at_once += 1
        most = max(most, at_once)

    async def count_turns() -> None:
        nonlocal at_once
        while True:
            at_once = 0
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count_turns())
    await asyncio.gather(*(begin(turns, step(), purse) for _ in range(100)))
    counting.cancel()
    assert most <= at_most  # twice a slice: one before the count in a turn, and one after it


async def test_lanes_take_turns_however_many_wait_in_one() -> None:
    turns, purse = Turns(), an_empty_purse()
    order: list[str] = []

    async def step(name: str) -> None:
        order.append(name)

    many = [begin(turns, step("many"), purse, lane="a") for _ in range(50)]
    await asyncio.sleep(0)
    one = begin(turns, step("one"), purse, lane="b")
    await asyncio.gather(one, *many)
    assert order.index("one") < 40


async def test_after_long_steps_the_loop_is_left_alone_for_a_while() -> None:
    turns, purse = Turns(), an_empty_purse()
    order: list[str] = []

    async def step() -> None:
        work_for(0.01)
        order.append("step")

    async def wait_beside() -> None:
        while True:
            await asyncio.sleep(0.001)
            order.append("beside")

    beside = asyncio.ensure_future(wait_beside())
    began = time.perf_counter()
    await asyncio.gather(*(begin(turns, step(), purse, lane=lane) for lane in range(10)))
    assert time.perf_counter() - began > 0.18
    beside.cancel()
    assert ("step", "step") not in pairwise(order)


async def test_who_is_cancelled_while_it_waits_learns_of_it_and_holds_up_nobody() -> None:
    turns, purse = Turns(), an_empty_purse()
    told: list[str] = []

    async def step(name: str) -> None:
        try:
            await asyncio.sleep(0)
            told.append(name)
        except asyncio.CancelledError:
            told.append(f"{name} cancelled")
            raise

    jobs = [begin(turns, step(str(number)), purse, lane=number) for number in range(5)]
    await asyncio.sleep(0)
    for job in jobs[:4]:
        job.cancel()
    await asyncio.wait(jobs, timeout=5)
    assert [job.done() for job in jobs] == [True] * 5
    assert [job.cancelled() for job in jobs] == [True] * 4 + [False]
    assert told[-1] == "4"


async def test_a_purse_fills_up_again_to_its_size_and_debt_is_forgotten() -> None:
    purse = Purse(size_s=0.02, income=0.5)
    now = time.perf_counter()
    assert not purse.is_empty(now)
    purse.spend(60.0, now, now + 60.0)  # far above what is remembered
    after = now + 60.0  # nothing came back while it was spending
    assert purse.is_empty(after + 0.4)
    assert not purse.is_empty(after + 0.6)
    purse.spend(0.01, after + 100.0, after + 100.0)
    assert not purse.is_empty(after + 100.0)
    purse.spend(0.02, after + 100.0, after + 100.0)
    assert purse.is_empty(after + 100.0)
