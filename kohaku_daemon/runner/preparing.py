"""Has backends bring what launches need to this machine, before they are started.

Knows: that it may take minutes or be let go of, that what a backend works with may be away for
a while, how often people hear how far it is.
Does not know: what is brought (the backends), when anything is started (``effects``).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Final

from kohaku_daemon.backends.base import Backend, BackendAway, BackendFailed
from kohaku_daemon.core.node.events import LaunchFailed, LaunchProgressed, NodeEvent
from kohaku_daemon.core.workload import Handle, Launch
from kohaku_daemon.runner.patience import Patience
from kohaku_daemon.runner.reasons import cut, explain, waits_for
from kohaku_daemon.supervise import spawn

#: Seconds between two things said of one launch: the host stores each.
_TELL_S: Final = 1.0


class Preparing:
    """The launches that are being prepared, each by a job of its own.

    They are as many as come: a job that waits for an image that others wait for, too, costs
    next to nothing, and none may stand in the way of those that need nothing.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        *,
        node: str,
        patience: Patience,
        post: Callable[[NodeEvent], None],
        on_ready: Callable[[Launch, Handle], None],
    ) -> None:
        """``on_ready`` is called with what may be started now."""
        self._backends = backends
        self._node = node
        self._patience = patience
        self._post = post
        self._on_ready = on_ready
        self._jobs: dict[str, asyncio.Task[None]] = {}

    def begin(self, launch: Launch, handle: Handle) -> None:
        """Prepare a launch."""
        work = self._prepare(launch, handle)
        self._jobs[launch.key] = spawn(work, name=f"prepare {launch.key}")

    def let_go(self, key: str) -> bool:
        """Stop preparing a launch; say whether it was being prepared. It is not ready then."""
        job = self._jobs.pop(key, None)
        if job is not None:
            job.cancel()
        return job is not None

    async def close(self) -> None:
        """Let go of all."""
        jobs = list(self._jobs.values())
        for key in list(self._jobs):
            self.let_go(key)
        await asyncio.gather(*jobs, return_exceptions=True)

    async def _prepare(self, launch: Launch, handle: Handle) -> None:
        words = _Words(lambda text: self._post(LaunchProgressed(launch.key, cut(text))))
        try:
            failure = await self._bring(launch, handle.backend, words)
        finally:
            words.close()
        if self._jobs.pop(launch.key, None) is None:
            return  # let go of just when it was through
        if failure:
            self._post(LaunchFailed(launch.key, failure))
        else:
            self._on_ready(launch, handle)

    async def _bring(self, launch: Launch, name: str, words: _Words) -> str:
        """Have it brought, however long its backend is away; give why that will never work."""
        for tries in itertools.count(1):
            try:
                await self._backends[name].prepare(launch, words.say)
            except BackendAway as error:
                words.say(waits_for(name, error))
            except BackendFailed as error:
                return cut(error.message)
            except Exception as error:  # a backend's bug, which must cost its own launch at most
                return explain(error, "preparing", launch.key, self._node)
            else:
                return ""
            await self._patience.wait(tries)
        raise AssertionError("tries have no end")


class _Words:
    """What is said of one launch: the newest, and not too often."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._newest = self._told = ""
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def say(self, text: str) -> None:
        """Have something said now, or when enough time has passed; only the newest is."""
        self._newest = text
        if self._timer is None and not self._is_closed:
            self._say_now()

    def close(self) -> None:
        """Say no more, whatever comes late."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _say_now(self) -> None:
        self._timer = None
        if self._newest != self._told:
            self._told = self._newest
            self._tell(self._newest)
            self._timer = asyncio.get_running_loop().call_later(_TELL_S, self._say_now)
