"""Deadlines pass once, in time, and not when they are void."""

from __future__ import annotations

import asyncio

from kohaku_daemon.core.node.events import DeadlinePassed
from kohaku_daemon.runner.deadlines import Deadlines
from tests.kohaku_daemon.runner.waiting import until


async def test_a_deadline_passes_once_and_not_before_its_time() -> None:
    passed: list[DeadlinePassed] = []
    deadlines = Deadlines(passed.append)
    loop = asyncio.get_running_loop()
    began = loop.time()
    deadlines.set("1-1", 0.05)
    deadlines.set("2-1", 0.0)
    await until(lambda: len(passed) == 2)
    assert loop.time() - began >= 0.05
    assert [event.key for event in passed] == ["2-1", "1-1"]
    deadlines.set("1-1", None)  # of one that has passed


async def test_what_is_void_never_passes() -> None:
    passed: list[DeadlinePassed] = []
    deadlines = Deadlines(passed.append)
    deadlines.set("1-1", 0.0)
    deadlines.set("1-1", None)
    deadlines.set("2-1", 0.0)
    deadlines.set("2-1", 0.02)  # instead
    deadlines.set("3-1", 0.01)
    await until(lambda: len(passed) == 2)
    assert [event.key for event in passed] == ["3-1", "2-1"]
    deadlines.set("4-1", 0.0)
    deadlines.clear()
    deadlines.set("5-1", 0.01)
    await until(lambda: len(passed) == 3)
    assert passed[-1].key == "5-1"
