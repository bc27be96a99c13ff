"""Waiting for what is away: longer each time, until it is back or there is no time left."""

from __future__ import annotations

import asyncio

import pytest

from kohaku_daemon.runner import patience as patience_module
from kohaku_daemon.runner.patience import Patience
from kohaku_daemon.supervise import spawn


@pytest.fixture
def patience() -> Patience:
    return Patience()


async def test_it_waits_longer_each_time_but_not_for_ever(
    patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience_module, "FIRST_S", 0.01)
    monkeypatch.setattr(patience_module, "LONGEST_S", 0.03)
    clock = asyncio.get_running_loop().time
    for tries, least_s in ((1, 0.01), (2, 0.02), (3, 0.03), (10_000, 0.03)):
        began = clock()
        await patience.wait(tries)
        assert clock() - began >= least_s * 0.9


async def test_all_who_wait_go_on_when_something_is_back(patience: Patience) -> None:
    jobs = [spawn(patience.wait(20), name="wait") for _ in range(3)]
    await asyncio.sleep(0)
    patience.hurry()
    async with asyncio.timeout(5):
        await asyncio.gather(*jobs)


async def test_whoever_waits_is_cancelled_when_there_is_no_time_left(patience: Patience) -> None:
    waiting = spawn(patience.wait(20), name="wait")
    await asyncio.sleep(0)
    patience.end()
    late = spawn(patience.wait(20), name="late")
    done = await asyncio.gather(waiting, late, return_exceptions=True)
    assert [type(one) for one in done] == [asyncio.CancelledError] * 2
