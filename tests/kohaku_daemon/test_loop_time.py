"""Time on the event loop: many steps of one peer are no pause for another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

import pytest

from kohaku_daemon.loop_time import PURSE_S, Account, LoopTime, Purse


def work_for(seconds: float) -> None:
    """Use the loop."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def an_account() -> Account:
    """Make one whose purse is full."""
    return Account(Purse())


def an_empty_account(debt_s: float = 0.001) -> Account:
    """Make one whose purse does not fill up by itself."""
    purse = Purse(income=0.0)
    now = time.perf_counter()
    purse.spend(PURSE_S + debt_s, now, now)
    return Account(purse)


def begin(
    shared: LoopTime, work: Coroutine[Any, Any, Any], account: Account, lane: object = 1
) -> Any:
    return asyncio.ensure_future(shared.run(work, account, lane))


def crowded() -> LoopTime:
    """Make one whose round is used up, so that everybody stands in line."""
    shared = LoopTime()
    now = time.perf_counter()
    shared.pay(Purse(income=0.0), 0.001, now, now)
    return shared


async def test_work_gives_what_it_gives_and_raises_what_it_raises() -> None:
    async def give() -> int:
        await asyncio.sleep(0)
        return await asyncio.sleep(0.001, 7)

    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("gone")

    for account in (an_account(), an_empty_account()):
        assert await crowded().run(give(), account, 1) == 7
        with pytest.raises(LookupError, match="gone"):
            await crowded().run(fail(), account, 1)


async def test_what_is_awaited_raises_where_it_is_awaited() -> None:
    async def wait_for_it(future: asyncio.Future[int]) -> str:
        try:
            await future
        except LookupError as error:
            return f"caught {error}"
        return "nothing came"

    for account in (an_account(), an_empty_account()):
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        job = begin(crowded(), wait_for_it(future), account)
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

    for account in (an_account(), an_empty_account()):
        assert await crowded().run(slow(), account, 1) == "in time"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(crowded().run(asyncio.Event().wait(), account, 1), 0.01)


async def test_who_is_alone_waits_for_nobody_even_with_nothing_left() -> None:
    shared, told = LoopTime(), list[str]()

    async def step() -> None:
        told.append("step")

    job = begin(shared, step(), an_empty_account())
    await asyncio.sleep(0)
    assert told == ["step"]
    await job


async def test_the_fullest_purse_goes_first() -> None:
    shared, order = crowded(), list[str]()

    async def step(name: str) -> None:
        order.append(name)

    jobs = [
        begin(shared, step("deep in debt"), an_empty_account(0.1), lane=1),
        begin(shared, step("in debt"), an_empty_account(0.01), lane=2),
        begin(shared, step("rich"), an_account(), lane=3),
    ]
    await asyncio.gather(*jobs)
    assert order == ["rich", "in debt", "deep in debt"]


async def test_who_waits_long_goes_before_who_came_later_with_as_little() -> None:
    shared, order = crowded(), list[str]()

    async def step(name: str) -> None:
        order.append(name)

    now = time.perf_counter()
    early, late = Purse(income=1.0), Purse(income=1.0)
    early.spend(PURSE_S + 0.01, now - 0.02, now - 0.02)
    late.spend(PURSE_S + 0.01, now, now)
    await asyncio.gather(
        begin(shared, step("late"), Account(late)), begin(shared, step("early"), Account(early))
    )
    assert order == ["early", "late"]


@pytest.mark.parametrize("make_account", [an_account, an_empty_account])
@pytest.mark.parametrize(("step_s", "at_most"), [(0.0, 100), (0.0002, 6), (0.003, 3)])
async def test_a_round_of_the_loop_holds_so_much(
    make_account: Any, step_s: float, at_most: int
) -> None:
    """Also where many steps become ready at once, of somebody who has not spent anything."""
    shared, account = LoopTime(), make_account()
    go = asyncio.Event()
    at_once = most = 0

    async def step() -> None:
        nonlocal at_once, most
        await go.wait()
        work_for(step_s)
        at_once += 1
        most = max(most, at_once)

    async def count_rounds() -> None:
        nonlocal at_once
        while True:
            at_once = 0
            await asyncio.sleep(0)

    jobs = [begin(shared, step(), account) for _ in range(100)]
    await asyncio.sleep(0.01)
    counting = asyncio.ensure_future(count_rounds())
    go.set()
    await asyncio.gather(*jobs)
    counting.cancel()
    # Twice what a round holds: what comes before the count in a round, and what after it.
    assert most <= at_most


async def test_two_of_three_rounds_are_free_of_those_who_have_nothing_left() -> None:
    shared, rounds = crowded(), 0

    async def count_rounds() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def step() -> None:
        work_for(0.0005)

    counting = asyncio.ensure_future(count_rounds())
    jobs = [begin(shared, step(), an_empty_account(), lane=lane) for lane in range(20)]
    await asyncio.gather(*jobs)
    counting.cancel()
    assert rounds >= 50


async def test_lanes_take_turns_however_many_wait_in_one() -> None:
    shared, account = crowded(), an_empty_account()
    order: list[str] = []

    async def step(name: str) -> None:
        order.append(name)

    many = [begin(shared, step("many"), account, lane="a") for _ in range(50)]
    await asyncio.sleep(0)
    one = begin(shared, step("one"), account, lane="b")
    await asyncio.gather(one, *many)
    assert order.index("one") < 40


async def test_after_long_steps_the_loop_is_left_alone_for_a_while() -> None:
    shared, account = LoopTime(), an_empty_account()
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
    await asyncio.gather(*(begin(shared, step(), account, lane=lane) for lane in range(10)))
    assert time.perf_counter() - began > 0.18
    beside.cancel()
    assert ("step", "step") not in pairwise(order)


async def test_who_is_cancelled_while_it_waits_learns_of_it_and_holds_up_nobody() -> None:
    shared, account = crowded(), an_empty_account()
    told: list[str] = []

    async def step(name: str) -> None:
        try:
            await asyncio.sleep(0)
            told.append(name)
        except asyncio.CancelledError:
            told.append(f"{name} cancelled")
            raise

    jobs = [begin(shared, step(str(number)), account, lane=number) for number in range(5)]
    await asyncio.sleep(0)
    for job in jobs[:4]:
        job.cancel()
    await asyncio.wait(jobs, timeout=5)
    assert [job.done() for job in jobs] == [True] * 5
    assert [job.cancelled() for job in jobs] == [True] * 4 + [False]
    assert told[-1] == "4"


async def test_another_purse_pays_as_soon_as_it_is_known_whose() -> None:
    account = an_account()
    first, second = account.purse, Purse(income=0.0)

    async def change() -> None:
        account.purse = second
        await asyncio.sleep(0)
        work_for(0.005)

    await LoopTime().run(change(), account, 1)
    now = time.perf_counter()
    assert second.fill(now) < 0.6 < first.fill(now)


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
    assert purse.fill(after + 100.0) == pytest.approx(0.5)
    purse.spend(0.02, after + 100.0, after + 100.0)
    assert purse.is_empty(after + 100.0)
