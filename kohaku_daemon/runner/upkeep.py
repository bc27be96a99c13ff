"""Keeps the disk from filling up: trims the output of what runs, sweeps out what is old, and
sees whether the disks take anything.

Knows: how often. Does not know: how large output may get, or how long it is kept (``logs``),
when a disk counts as full (``disks``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, NoReturn

from kohaku_daemon.clock import Clock
from kohaku_daemon.runner.disks import Disks
from kohaku_daemon.runner.logs import TaskLogs
from kohaku_daemon.runner.loop import NodeLoop

_log = logging.getLogger(__name__)

#: A program that writes 1 GB/s is at most that far above its cap.
_TRIM_S: Final = 1.0
_SWEEP_S: Final = 300.0


class Upkeep:
    """Looks after the output of launches."""

    def __init__(
        self,
        logs: TaskLogs,
        disks: Disks,
        loop: NodeLoop,
        clock: Clock,
        *,
        on_well: Callable[[], None],
    ) -> None:
        """``on_well`` is called on the loop when disks that were in trouble take all again."""
        self._on_well = on_well
        self._logs = logs
        self._disks = disks
        self._loop = loop
        self._clock = clock
        #: Why the disk could not be looked after the last time.
        self._trouble = ""

    async def run(self) -> NoReturn:
        """Trim and sweep until cancelled."""
        swept = -_SWEEP_S
        while True:
            before = self._disks.troubles
            await self._try(self._look)
            if before and not self._disks.troubles:
                _log.warning("the disks are well again")
                self._on_well()
            await self._try(self._trim)
            if self._clock.monotonic() - swept >= _SWEEP_S:
                swept = self._clock.monotonic()
                await self._try(self._sweep)
            await asyncio.sleep(_TRIM_S)

    async def _try(self, chore: Callable[[set[str]], None]) -> None:
        try:
            await asyncio.to_thread(chore, self._loop.unended())
        except Exception as error:
            # The disk is full or failed, or we have a bug: no reason to end a runner.
            if repr(error) != self._trouble:
                _log.warning("cannot look after the output of tasks", exc_info=error)
            self._trouble = repr(error)
        else:
            self._trouble = ""

    def _look(self, live: set[str]) -> None:
        before = self._disks.troubles
        self._disks.look()
        for trouble in self._disks.troubles:
            if trouble not in before:
                _log.error("%s; nothing new is started here", trouble)

    def _trim(self, live: set[str]) -> None:
        for key in live:
            self._logs.trim(key)

    def _sweep(self, live: set[str]) -> None:
        removed = self._logs.sweep(self._clock.now(), live)
        if removed:
            _log.info("removed old output", extra={"launches": len(removed)})
