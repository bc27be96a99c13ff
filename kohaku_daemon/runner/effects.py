"""Carries out what the engine decides, with the backends; what comes of it returns as events.

Knows: which backend a launch belongs to, folders, how much goes on at once, what a failure
may say to the task's owner.
Does not know: when anything should happen (``core.node``), the vault, the link.

A bug of a backend must cost its own launch at most, so whatever a backend raises is caught
here, logged under an incident number and turned into an event.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, assert_never

from msgspec.structs import replace

from kohaku_daemon.backends.base import Backend, BackendFailed, TaskFolders
from kohaku_daemon.core.node.actions import (
    AdoptLaunch,
    Forget,
    KillLaunch,
    NodeAction,
    PauseLaunch,
    Remember,
    RemoveLaunch,
    ResumeLaunch,
    SendReport,
    StartLaunch,
    WatchLaunch,
)
from kohaku_daemon.core.node.events import (
    LaunchExited,
    LaunchFailed,
    LaunchFound,
    LaunchHeld,
    LaunchRefused,
    LaunchStarted,
    NodeEvent,
    StartOrdered,
)
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch, Started
from kohaku_daemon.runner.logs import TaskLogs
from kohaku_daemon.runner.scratch import ScratchFolders
from kohaku_daemon.supervise import spawn
from protocol.errors import KohakuError
from protocol.messages.runner import AttemptReport
from protocol.models.task import Cause, Exit

_log = logging.getLogger(__name__)

#: Starts at once: enough to keep a machine busy, few enough not to starve what runs on it.
_STARTS_AT_ONCE: Final = 16
#: Seconds between tries to learn what became of a launch: the first, and the longest.
_ASK_FIRST_S: Final = 0.5
_ASK_LONGEST_S: Final = 30.0
#: Seconds that what is under way has to finish when the runner stops.
_FINISH_S: Final = 5.0
#: Characters of a text a backend gives for people. A report has to fit a message.
_LONGEST_TEXT: Final = 2000


class Effects:
    """The runner's hands."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        *,
        default_backend: str,
        scratch: ScratchFolders,
        logs: TaskLogs,
        post: Callable[[NodeEvent], None],
        report: Callable[[AttemptReport], None],
    ) -> None:
        self._backends = backends
        self._default = default_backend
        self._scratch = scratch
        self._logs = logs
        self._post = post
        self._report = report
        self._starts = asyncio.Semaphore(_STARTS_AT_ONCE)
        #: Pausing and resuming one launch keep their order.
        self._holding: dict[str, asyncio.Lock] = {}
        self._jobs: set[asyncio.Task[None]] = set()

    def plan(self, launch: Launch) -> StartOrdered:
        """Turn the order to launch into an event, with the handle its backend would use."""
        name = launch.spec.backend or self._default
        backend = self._backends.get(name)
        if backend is None:
            there = ", ".join(sorted(self._backends)) or "none"
            problem = f"backend {name or '(default)'} is not on this node; there is: {there}"
            return StartOrdered(launch, None, problem)
        try:
            return StartOrdered(launch, backend.plan(launch))
        except Exception as error:  # a backend's bug, see above
            return StartOrdered(launch, None, _explain(error, "planning", launch.key))

    def carry_out(self, action: NodeAction) -> None:
        """Begin an action; does not wait for its end."""
        match action:
            case StartLaunch():
                self._begin(self._start(action.launch, action.handle), "start", action.launch.key)
            case AdoptLaunch():
                self._begin(self._adopt(action.launch, action.handle), "adopt", action.launch.key)
            case WatchLaunch():
                self._watch(action)
            case KillLaunch():
                self._begin(self._kill(action), "kill", action.key)
            case PauseLaunch() | ResumeLaunch():
                self._begin(self._hold(action), "hold", action.key)
            case RemoveLaunch():
                self._begin(
                    self._remove(action.launch.key, action.handle), "remove", action.launch.key
                )
            case SendReport(report):
                self._report(report)
            case Remember() | Forget():
                pass  # the loop has seen to it
            case _:
                assert_never(action)

    async def close(self) -> None:
        """Give what is under way a moment to finish, then let go of it; a restart finds it."""
        jobs = set(self._jobs)
        if jobs:
            await asyncio.wait(jobs, timeout=_FINISH_S)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None], verb: str, key: str) -> None:
        job = spawn(work, name=f"{verb} {key}")
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    # Starting -----------------------------------------------------------------------

    async def _start(self, launch: Launch, handle: Handle) -> None:
        async with self._starts:
            try:
                folders = await asyncio.to_thread(self._make_folders, launch.key)
            except OSError as error:
                self._post(
                    LaunchFailed(launch.key, f"cannot make its folders: {error.strerror or error}")
                )
                return
            try:
                started = await self._backends[handle.backend].start(launch, handle, folders)
            except BackendFailed as error:
                self._post(LaunchFailed(launch.key, _cut(error.message)))
            except Exception as error:  # a backend's bug, see above
                message = _explain(error, "starting", launch.key)
                await self._find_out(launch, handle, message)
            else:
                self._post(LaunchStarted(launch.key, replace(started, note=_cut(started.note))))

    async def _find_out(self, launch: Launch, handle: Handle, message: str) -> None:
        """Learn whether a start that broke off has begun: what runs must not count as failed."""
        finding = await self._ask_fate(launch.key, handle)
        if finding.found is Found.NEVER_STARTED:
            self._post(LaunchFailed(launch.key, message))
        else:
            started = Started(started_at=finding.started_at, note=message)
            self._post(LaunchStarted(launch.key, started))

    def _make_folders(self, key: str) -> TaskFolders:
        stdout, stderr = self._logs.make(key)
        return TaskFolders(scratch=self._scratch.make(key), stdout=stdout, stderr=stderr)

    def _clear_folders(self, key: str) -> None:
        self._logs.finish(key)
        self._scratch.remove(key)

    # After a restart ----------------------------------------------------------------

    async def _adopt(self, launch: Launch, handle: Handle) -> None:
        finding = await self._ask_fate(launch.key, handle)
        if finding.exit is not None:
            finding = replace(finding, exit=_cut_exit(finding.exit))
        fresh = None
        if finding.found is Found.NEVER_STARTED:
            fresh = self._plan_again(launch, handle)
            if (backend := self._backends.get(handle.backend)) is not None:
                await _drop_plan(backend, handle)
        self._post(LaunchFound(launch.key, finding, fresh))

    def _plan_again(self, launch: Launch, handle: Handle) -> Handle | None:
        backend = self._backends.get(handle.backend)
        if backend is None:
            return None
        try:
            return backend.plan(launch)
        except Exception as error:  # a backend's bug, see above
            _explain(error, "planning", launch.key)
            return None

    async def _ask_fate(self, key: str, handle: Handle) -> Finding:
        """Ask until there is an answer: guessing could end what runs, or run it twice."""
        backend = self._backends.get(handle.backend)
        if backend is None:
            return _unknowable(handle.backend)
        wait_s, told = _ASK_FIRST_S, False
        while True:
            try:
                return await backend.adopt(handle)
            except Exception as error:  # a backend's bug, see above
                if not told:
                    told = True
                    _explain(error, "adopting", key)
                    _log.error("cannot learn what became of a launch", extra={"launch": key})
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _ASK_LONGEST_S)

    # Running launches ---------------------------------------------------------------

    def _watch(self, action: WatchLaunch) -> None:
        async def on_exit(exit_: Exit, started_at: float, ended_at: float) -> None:
            self._post(LaunchExited(action.key, _cut_exit(exit_), started_at, ended_at))

        try:
            self._backends[action.handle.backend].watch(action.handle, on_exit)
        except Exception as error:  # a backend's bug, see above
            self._post(LaunchRefused(action.key, _explain(error, "watching", action.key)))

    async def _kill(self, action: KillLaunch) -> None:
        try:
            await self._backends[action.handle.backend].kill(action.handle, action.grace_s)
        except Exception as error:  # a backend's bug, see above
            self._post(LaunchRefused(action.key, _explain(error, "ending", action.key)))

    async def _hold(self, action: PauseLaunch | ResumeLaunch) -> None:
        paused = isinstance(action, PauseLaunch)
        backend = self._backends[action.handle.backend]
        async with self._holding.setdefault(action.key, asyncio.Lock()):
            try:
                await (backend.pause if paused else backend.resume)(action.handle)
            except Exception as error:  # a backend's bug, see above
                verb = "pausing" if paused else "resuming"
                self._post(LaunchRefused(action.key, _explain(error, verb, action.key)))
            else:
                self._post(LaunchHeld(action.key, paused))

    # Ended launches -----------------------------------------------------------------

    def clean_up(self, is_over: Callable[[str], Handle | None]) -> None:
        """Remove what an earlier run did not come to remove.

        ``is_over`` gives the handle of a launch whose end the host knows, else None.
        """
        for key in self._scratch.list_keys():
            handle = is_over(key)
            if handle is not None:
                self._begin(self._remove(key, handle), "remove", key)

    async def _remove(self, key: str, handle: Handle) -> None:
        self._holding.pop(key, None)
        try:
            # The scratch folder goes last: it is the mark that there is something to remove.
            if (backend := self._backends.get(handle.backend)) is not None:
                await backend.remove(handle)
            await asyncio.to_thread(self._clear_folders, key)
        except (KohakuError, OSError) as error:
            # Tried again by ``clean_up`` after the next start.
            _log.warning("cannot remove what is left: %s", error, extra={"launch": key})
        except Exception as error:  # a backend's bug, see above
            _explain(error, "removing", key)


async def _drop_plan(backend: Backend, handle: Handle) -> None:
    """Remove what the backend keeps of a launch that never began, so that nothing piles up."""
    try:
        await backend.remove(handle)
    except KohakuError as error:
        _log.warning("cannot remove a plan that was given up: %s", error)


def _unknowable(backend: str) -> Finding:
    message = f"backend {backend} is no longer on this node: what became of it is not known"
    return Finding(found=Found.ENDED, exit=Exit(Cause.NODE_FAILED, message=message))


def _explain(error: Exception, doing: str, key: str) -> str:
    """Say why a backend failed. Only its own errors are for people; others are bugs of ours."""
    if isinstance(error, KohakuError):
        _log.warning("%s failed: %s", doing, error, extra={"launch": key})
        return _cut(error.message)
    incident = secrets.token_hex(4)
    _log.error("%s failed, incident %s", doing, incident, exc_info=error, extra={"launch": key})
    return f"{doing} it failed on its node, incident {incident} in the runner's log"


def _cut_exit(exit_: Exit) -> Exit:
    return replace(exit_, message=_cut(exit_.message))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
