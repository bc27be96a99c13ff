"""Hears of the containers' ends, and of the engine's own.

Knows: how its stream of events is followed, and taken up again when it breaks; that an engine
that hangs is as good as gone.
Does not know: what an end means.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn

from kohaku_daemon.dockerd.connection import Dockerd, reading
from kohaku_daemon.dockerd.errors import EngineAway, EngineRefused
from kohaku_daemon.supervise import spawn, until_one_fails
from protocol.backoff import delay_s

_log = logging.getLogger(__name__)

#: Seconds between questions whether it still answers, and how long that may take.
_ASK_EVERY_S: Final = 10.0
_ANSWER_S: Final = 10.0
#: Wait between tries to reach it again, at first and at most.
_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 2.0
#: An event has all labels of its container, which may be those of a large image.
_LONGEST_EVENT: Final = 16 * 2**20


class EngineWatch:
    """Follows one engine's events, once ``begin`` is called."""

    def __init__(
        self,
        dockerd: Dockerd,
        label: str,
        *,
        on_end: Callable[[str], None],
        on_back: Callable[[], Awaitable[None]],
        on_gone: Callable[[], None],
    ) -> None:
        """Watch the containers with this label.

        Args:
            dockerd: The engine.
            label: ``NAME=VALUE``.
            on_end: Gets the id of each container whose first process has ended.
            on_back: Called when the engine's events are heard, at first and again: whatever
                happened before then, nobody has been told of.
            on_gone: Called when it stops to answer.
        """
        self._dockerd = dockerd
        filters = {"type": ["container"], "event": ["die"], "label": [label]}
        self._params = {"filters": json.dumps(filters)}
        self._on_end = on_end
        self._on_back = on_back
        self._on_gone = on_gone
        self._job: asyncio.Task[NoReturn] | None = None
        #: Why the engine cannot be used now; empty if it can.
        self.trouble = ""

    def begin(self) -> None:
        """Begin, unless that was done. The engine answers at this moment."""
        if self._job is None:
            self._job = spawn(self._run(), name="watch Docker")

    async def close(self) -> None:
        """Stop."""
        job, self._job = self._job, None
        if job is not None:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)

    async def _run(self) -> NoReturn:
        tries = 0
        while True:
            was_well = asyncio.Event()
            try:
                error: Exception = await until_one_fails(
                    self._follow(was_well), self._ask(), name="hear of containers"
                )
            except Exception as bug:  # ours: with nobody to follow it, no task would ever end
                _log.error("following Docker's events failed", exc_info=bug)
                error = bug
            if was_well.is_set():
                tries = 0
                self._on_gone()
            if not self.trouble:
                _log.warning("Docker cannot be used: %s", error)
            self.trouble = str(error) or repr(error)
            # Nobody else comes back with us: there is nothing to spread by chance.
            await asyncio.sleep(delay_s(tries, 1.0, first_s=_WAIT_S, longest_s=_LONGEST_WAIT_S))
            tries += 1

    async def _follow(self, was_well: asyncio.Event) -> NoReturn:
        async with self._dockerd.stream(
            "events", params=self._params, timeout_s=_ANSWER_S
        ) as response:
            was_well.set()
            # What ended before this moment is in its list, and what ends after it in the stream.
            await self._on_back()
            if self.trouble:
                _log.info("Docker answers again")
            self.trouble = ""
            async with reading():
                async for event in _events(response.content.iter_any()):
                    self._on_end(str(event["Actor"]["ID"]))
        raise EngineAway("the Docker engine ended its stream of events")

    async def _ask(self) -> NoReturn:
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            await self._dockerd.ask("version", timeout_s=_ANSWER_S)


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Read the events, one a line."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.strip():
                yield json.loads(line)
        if len(rest) > _LONGEST_EVENT:
            raise EngineRefused(500, "the Docker engine tells of an event without an end")
