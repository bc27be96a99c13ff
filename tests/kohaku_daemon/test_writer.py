"""The thread that commits: in order, off the event loop, with its errors told to who waits."""

import asyncio
import threading

import pytest

from kohaku_daemon.writer import Writer


async def test_work_is_done_in_order_in_one_other_thread() -> None:
    writer, done = Writer("commit"), list[int]()
    threads = set[int]()

    def work(number: int) -> None:
        threads.add(threading.get_ident())
        done.append(number)

    await asyncio.gather(*(writer.run(lambda n=n: work(n)) for n in range(50)))  # type: ignore[misc]
    writer.close()
    assert done == list(range(50))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_an_error_is_told_and_the_next_work_is_done() -> None:
    writer, done = Writer("commit"), list[int]()

    def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        await writer.run(fail)
    await writer.run(lambda: done.append(1))
    writer.close()
    assert done == [1]


async def test_who_stops_waiting_does_not_stop_the_work() -> None:
    writer, free, done = Writer("commit"), threading.Event(), list[int]()

    def slow() -> None:
        assert free.wait(10)
        done.append(1)

    waiting = asyncio.ensure_future(writer.run(slow))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    free.set()
    await writer.run(lambda: done.append(2))
    writer.close()
    assert done == [1, 2]


async def test_closing_waits_for_what_is_under_way() -> None:
    writer, done = Writer("commit"), list[int]()
    waiting = asyncio.ensure_future(writer.run(lambda: done.append(1)))
    await asyncio.sleep(0)
    writer.close()
    assert done == [1]
    await waiting


async def test_one_that_never_worked_can_be_closed() -> None:
    Writer("commit").close()
