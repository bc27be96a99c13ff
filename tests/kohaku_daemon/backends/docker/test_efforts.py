"""Work that is done once for all who wait, and given up when nobody does."""

from __future__ import annotations

import asyncio

import pytest

from kohaku_daemon.backends.base import BackendAway, BackendFailed, OnProgress
from kohaku_daemon.backends.docker.efforts import Efforts
from kohaku_daemon.supervise import spawn


class Work:
    """Work that goes as far as a test lets it."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0
        self.goes_on = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.fails = False
        self.say: OnProgress = print

    async def __call__(self, say: OnProgress) -> None:
        self.begun += 1
        self.say = say
        say("begun")
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            await self.may_end.wait()
            raise
        if self.fails:
            raise BackendFailed("it fails")


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_twenty_share_one_work_and_hear_how_far_it_is() -> None:
    efforts, work = Efforts(), Work()
    heard: list[list[str]] = [[] for _ in range(20)]
    jobs = [spawn(efforts.share("x", work, said.append), name="waiter") for said in heard]
    await settle()
    work.say("half")
    work.goes_on.set()
    await asyncio.gather(*jobs)
    assert work.begun == 1
    assert heard == [["begun", "half"]] * 20
    assert "x" not in efforts


async def test_who_comes_late_hears_what_was_said_last() -> None:
    efforts, work = Efforts(), Work()
    first = spawn(efforts.share("x", work, lambda _: None), name="waiter")
    await settle()
    late: list[str] = []
    second = spawn(efforts.share("x", work, late.append), name="waiter")
    await settle()
    assert late == ["begun"]
    work.goes_on.set()
    await asyncio.gather(first, second)


async def test_each_who_waits_is_told_of_the_failure_and_the_next_tries_anew() -> None:
    efforts, work = Efforts(), Work()
    work.fails = True
    work.goes_on.set()
    jobs = [spawn(efforts.share("x", work, lambda _: None), name="waiter") for _ in range(3)]
    for outcome in await asyncio.gather(*jobs, return_exceptions=True):
        assert isinstance(outcome, BackendFailed)
    work.fails = False
    await efforts.share("x", work, lambda _: None)
    assert work.begun == 2


async def test_it_goes_on_until_the_last_one_leaves() -> None:
    efforts, work = Efforts(), Work()
    one, two = (spawn(efforts.share("x", work, lambda _: None), name="waiter") for _ in range(2))
    await settle()
    one.cancel()
    await settle()
    assert work.cancelled == 0
    two.cancel()
    await settle()
    assert work.cancelled == 1
    assert "x" not in efforts


async def test_who_comes_while_it_is_given_up_waits_for_that_and_begins_anew() -> None:
    efforts, work = Efforts(), Work()
    work.may_end.clear()
    one = spawn(efforts.share("x", work, lambda _: None), name="waiter")
    await settle()
    one.cancel()
    await settle()
    two = spawn(efforts.share("x", work, lambda _: None), name="waiter")
    await settle()
    assert work.begun == 1, "never two at once"
    work.may_end.set()
    work.goes_on.set()
    await two
    assert work.begun == 2


async def test_closing_gives_up_all_and_those_who_wait_know() -> None:
    efforts, work = Efforts(), Work()
    job = spawn(efforts.share("x", work, lambda _: None), name="waiter")
    await settle()
    await efforts.close()
    assert work.cancelled == 1
    with pytest.raises(BackendAway, match="x was given up"):
        await job
