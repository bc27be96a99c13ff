"""What waits for the link: the newest of each launch, ends at once, in messages that fit."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_daemon.runner.outbox import MOST_BYTES, MOST_REPORTS, Outbox, pages
from protocol.ids import TaskId
from protocol.messages.runner import AttemptReport, AttemptState


def a_report(
    task: int, state: AttemptState = AttemptState.RUNNING, note: str = ""
) -> AttemptReport:
    return AttemptReport(task=TaskId(task), attempt=1, state=state, note=note)


async def test_the_newest_report_of_a_launch_is_the_one_that_is_said() -> None:
    outbox = Outbox()
    outbox.put(a_report(1))
    outbox.put(a_report(2))
    outbox.put(a_report(1, AttemptState.PAUSED))
    assert await outbox.take() == (a_report(1, AttemptState.PAUSED), a_report(2))


async def test_an_end_is_said_at_once_and_steps_only_if_they_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.outbox._LINGER_S", 0.05)
    outbox = Outbox()
    loop = asyncio.get_running_loop()
    began = loop.time()
    outbox.put(a_report(1))
    outbox.put(a_report(2))
    outbox.put(a_report(1, AttemptState.ENDED))
    assert await outbox.take() == (a_report(1, AttemptState.ENDED),)
    assert await outbox.take() == (a_report(2),)
    assert loop.time() - began >= 0.05


async def test_a_launch_that_changes_all_the_time_is_heard_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.outbox._LINGER_S", 0.05)
    outbox = Outbox()
    taken = asyncio.ensure_future(outbox.take())
    async with asyncio.timeout(10):
        while not taken.done():
            for state in (AttemptState.RUNNING, AttemptState.PAUSED):
                outbox.put(a_report(1, state))
                await asyncio.sleep(0.001)
    assert [report.task for report in taken.result()] == [1]


async def test_taking_waits_for_something_to_say() -> None:
    outbox = Outbox()
    outbox.put(a_report(1))
    await outbox.take()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await outbox.take()
    outbox.put(a_report(2))
    outbox.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await outbox.take()


@given(st.lists(st.integers(0, 40_000), max_size=400))
def test_pages_hold_everything_in_order_and_fit_a_message(lengths: list[int]) -> None:
    reports = [a_report(task, note="x" * length) for task, length in enumerate(lengths)]
    groups = list(pages(reports))
    assert [report for group in groups for report in group] == reports
    for group in groups:
        assert 0 < len(group) <= MOST_REPORTS
        size = sum(len(msgspec.msgpack.encode(report)) for report in group)
        assert size <= MOST_BYTES or len(group) == 1
