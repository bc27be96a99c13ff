"""Ending and holding the processes of launches, from the runner's event loop.

Knows: how long that may take, what happens if it is asked again meanwhile.
Does not know: which processes those are (``kept``), or who is told of an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Final, TypeVar

from kohaku_daemon.backends.process.kept import KeptLaunch
from kohaku_daemon.backends.process.launching import SWEEP_S
from kohaku_daemon.clock import Clock
from kohaku_daemon.supervise import spawn

T = TypeVar("T")

#: Between two looks at a tree that is being ended or held, at first and at most.
_SOON_S: Final = 0.01
_LATER_S: Final = 0.5
#: How long a tree may take to be still before that is called a failure.
_HOLD_S: Final = 10.0
#: Seconds between looks whether a launch of an earlier runner still has a keeper.
_LOOK_S: Final = 1.0


class TreeControl:
    """The launches that are being ended."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kills: dict[str, tuple[float, asyncio.Task[None]]] = {}

    def __repr__(self) -> str:
        return f"TreeControl(kills={len(self._kills)})"

    def kill(self, key: str, kept: KeptLaunch, grace_s: float) -> None:
        """Begin to end a launch. Asked again with less grace left, it hurries."""
        deadline = self._clock.monotonic() + grace_s
        if key in self._kills:
            earlier, job = self._kills[key]
            if earlier <= deadline:
                return
            job.cancel()
        job = spawn(self._end_tree(kept, deadline, gently=grace_s > 0), name=f"kill {key}")
        self._kills[key] = (deadline, job)
        job.add_done_callback(lambda done: self._forget(key, done))

    async def hold(self, kept: KeptLaunch) -> bool:
        """Hold all of a launch still; say whether it came to rest, or has ended."""
        deadline = self._clock.monotonic() + _HOLD_S
        while kept.is_kept() and not await call(kept, kept.hold):
            if self._clock.monotonic() > deadline:
                await call(kept, kept.release)
                return False
            await asyncio.sleep(_SOON_S)
        return True

    async def clear(self, kept: KeptLaunch) -> None:
        """Kill all of a launch, until nothing is left and its end is recorded, if somebody does.

        What is stuck in the kernel is not waited for longer than a keeper would.
        """
        pause_s, deadline = _SOON_S, self._clock.monotonic() + SWEEP_S
        while (await call(kept, kept.kill) and self._clock.monotonic() < deadline) or (
            kept.is_kept()
        ):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LATER_S)
        kept.remove_group()

    def close(self) -> None:
        """End no more than is ended."""
        for _, job in self._kills.values():
            job.cancel()
        self._kills.clear()

    def _forget(self, key: str, job: asyncio.Task[None]) -> None:
        if key in self._kills and self._kills[key][1] is job:
            del self._kills[key]

    async def _end_tree(self, kept: KeptLaunch, deadline: float, *, gently: bool) -> None:
        pause_s = _SOON_S
        # A launch that was just taken may have no program yet to be told.
        told = not gently
        while kept.is_kept() and self._clock.monotonic() < deadline:
            told = told or await call(kept, kept.terminate) > 0
            await asyncio.sleep(min(pause_s, max(0.0, deadline - self._clock.monotonic())))
            pause_s = min(2 * pause_s, _LATER_S)
        await self.clear(kept)


async def call(kept: KeptLaunch, function: Callable[[], T]) -> T:
    """Call something of a launch, in a thread if it takes long."""
    return function() if kept.is_quick else await asyncio.to_thread(function)


async def wait_until_over(descriptor: int, is_worth_it: Callable[[], bool]) -> None:
    """Wait for a process, by its pidfd, which is closed, as long as that is worth it."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        while not over.is_set() and is_worth_it():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
