"""Jobs are kept alive, and what goes wrong in them is told at once."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import NoReturn

import pytest

from kohaku_daemon.supervise import spawn, until_one_fails
from protocol.errors import Unavailable


async def test_a_job_nobody_holds_is_not_collected() -> None:
    done = asyncio.Event()

    async def wait_on_what_only_it_knows() -> None:
        inner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.02, inner.set_result, None)
        await inner
        done.set()

    spawn(wait_on_what_only_it_knows(), name="held by nobody")
    await asyncio.sleep(0)
    gc.collect()
    async with asyncio.timeout(5):
        await done.wait()


async def test_an_exception_is_logged_at_once_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise LookupError("no such thing")

    job = spawn(fail(), name="the failing one")
    await asyncio.wait([job], timeout=5)  # waits without asking for the exception
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert vars(record)["job"] == "the failing one"
    assert "in fail" in caplog.text
    assert "no such thing" in caplog.text


async def test_cancelling_and_returning_are_no_errors(caplog: pytest.LogCaptureFixture) -> None:
    job = spawn(asyncio.sleep(60, "late"), name="cancelled")
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert await spawn(asyncio.sleep(0, "soon"), name="returns") == "soon"
    assert not caplog.records


async def test_the_first_of_several_that_fails_ends_the_others() -> None:
    ended: list[str] = []

    async def stay() -> NoReturn:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("stayed")
        raise AssertionError

    async def fail() -> NoReturn:
        raise Unavailable("gone")

    error = await until_one_fails(stay(), fail(), name="some")
    assert isinstance(error, Unavailable)
    assert error.message == "gone"
    assert ended == ["stayed"]


async def test_who_is_cancelled_while_one_fails_is_cancelled() -> None:
    async def stay() -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    async def fail_when(told: asyncio.Event) -> NoReturn:
        await told.wait()
        raise Unavailable("gone")

    told = asyncio.Event()
    waiting = spawn(until_one_fails(stay(), fail_when(told), name="some"), name="waiting")
    await asyncio.sleep(0)
    told.set()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
