"""What waits for the link: the newest of each launch, in messages that fit."""

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
    outbox.put(a_report(1, AttemptState.ENDED))
    assert await outbox.take() == (a_report(2), a_report(1, AttemptState.ENDED))


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
