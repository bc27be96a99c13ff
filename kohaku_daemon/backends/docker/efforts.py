"""Work that many wait for and that is done once: it goes on as long as anybody waits.

Knows: who waits, what was said last. Does not know: what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kohaku_daemon.backends.base import BackendAway, OnProgress
from kohaku_daemon.supervise import spawn
from protocol.errors import KohakuError

#: Makes the work; what it is given takes how far it is, for people.
Work: TypeAlias = Callable[[OnProgress], Coroutine[Any, Any, None]]


@dataclass(slots=True, eq=False)
class _Effort:
    job: asyncio.Task[KohakuError | None]
    listeners: list[OnProgress] = field(default_factory=list)
    said: str = ""
    #: Nobody waits for it any more, and it has not ended yet.
    is_ending: bool = False


class Efforts:
    """What is being done, by name."""

    def __init__(self) -> None:
        self._efforts: dict[str, _Effort] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._efforts

    async def share(self, name: str, work: Work, on_progress: OnProgress) -> None:
        """Wait until the work of this name is done; begin it if nobody has.

        Raises:
            KohakuError: As the work did.
            BackendAway: All was given up by ``close``.
        """
        while (effort := self._efforts.get(name)) is not None and effort.is_ending:
            await asyncio.wait({effort.job})
        if effort is None:
            effort = self._begin(name, work)
        if effort.said:
            on_progress(effort.said)
        effort.listeners.append(on_progress)
        try:
            await asyncio.wait({effort.job})
        finally:
            effort.listeners.remove(on_progress)
            if not effort.listeners and not effort.job.done():
                effort.is_ending = True
                effort.job.cancel()
        if effort.job.cancelled():
            raise BackendAway(f"{name} was given up: this runner stops")
        error = effort.job.result()
        if error is not None:
            # Many raise it: each has its own way here.
            raise error.with_traceback(None)

    async def close(self) -> None:
        """Give up all, and wait until nothing is left of it."""
        jobs = [effort.job for effort in self._efforts.values()]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    def _begin(self, name: str, work: Work) -> _Effort:
        def say(text: str) -> None:
            effort.said = text
            for listener in tuple(effort.listeners):
                listener(text)

        async def run() -> KohakuError | None:
            try:
                await work(say)
            except KohakuError as error:
                return error
            return None

        effort = _Effort(spawn(run(), name=f"bring {name}"))
        self._efforts[name] = effort
        # First, before those who wait go on: what they ask for next is begun anew.
        effort.job.add_done_callback(lambda _: self._efforts.pop(name))
        return effort
