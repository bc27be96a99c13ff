"""Waiting for a condition, with a deadline; never for luck."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

DEADLINE_S = 20.0


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds.

    Raises:
        TimeoutError: It does not within the deadline.
    """
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  any condition, whoever brings it about
            await asyncio.sleep(0.002)
