"""Waiting for a condition, with a deadline; never for luck."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.runner.memory import Memory

DEADLINE_S = 20.0


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds.

    Raises:
        TimeoutError: It does not within the deadline.
    """
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  any condition, whoever brings it about
            await asyncio.sleep(0.002)


async def keep(
    memory: Memory,
    launches: Mapping[str, LaunchRecord],
    gone: Sequence[str] = (),
    then: Callable[[], None] | None = None,
    *,
    void: Sequence[str] = (),
) -> None:
    """Have launches kept, and wait until they are.

    Raises:
        Unavailable: They could not be.
    """
    done = asyncio.Event()
    failures: list[BaseException] = []

    def on_done(error: BaseException | None) -> None:
        failures.extend([] if error is None else [error])
        done.set()

    memory.keep_launches(launches, on_done, gone, then, void=void)
    async with asyncio.timeout(DEADLINE_S):
        await done.wait()
    if failures:
        raise failures[0]
