"""Carries out what the engine decides, with the backends; what comes of it returns as events.

Knows: which backend a launch belongs to, folders, how much goes on at once, what a failure
may say to the task's owner.
Does not know: when anything should happen (``core.node``), the vault, the link.

What comes together is done together: a burst of starts has its folders made in one go, and a
few jobs go through them. What a launch needs is brought before, outside of those few.

A backend may be away for a while, as a daemon it works with may be down. Then nothing is known
of what it was asked: what has to be done or found out is asked again until there is an answer.

A bug of a backend must cost its own launch at most, so whatever a backend raises is caught
here, logged under an incident number and turned into an event.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final, assert_never

from msgspec.structs import replace

from kohaku_daemon.backends.base import Backend, BackendAway, BackendFailed, TaskFolders
from kohaku_daemon.core.node.actions import (
    AdoptLaunch,
    Forget,
    KillLaunch,
    LetGo,
    NodeAction,
    PauseLaunch,
    Remember,
    RemoveLaunch,
    ResumeLaunch,
    SendReport,
    SetDeadline,
    StartLaunch,
    WatchLaunch,
)
from kohaku_daemon.core.node.events import (
    LaunchBrokeOff,
    LaunchExited,
    LaunchFailed,
    LaunchFound,
    LaunchHeld,
    LaunchLetGo,
    LaunchRefused,
    LaunchStarted,
    NodeEvent,
    StartOrdered,
)
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch, Started
from kohaku_daemon.runner.deadlines import Deadlines
from kohaku_daemon.runner.logs import TaskLogs
from kohaku_daemon.runner.patience import Patience
from kohaku_daemon.runner.preparing import Preparing
from kohaku_daemon.runner.reasons import about, cut, explain, waits_for
from kohaku_daemon.runner.removal import Removal
from kohaku_daemon.runner.scratch import ScratchFolders
from kohaku_daemon.supervise import spawn
from protocol.errors import KohakuError
from protocol.messages.runner import AttemptReport
from protocol.models.task import Cause, Exit

_log = logging.getLogger(__name__)

#: Starts at once: enough to keep a machine busy, few enough not to starve what runs on it.
_STARTS_AT_ONCE: Final = 16
#: Seconds that what is under way has to finish when the runner stops.
_FINISH_S: Final = 5.0


class Effects:
    """The runner's hands."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        *,
        node: str,
        there: Iterable[str],
        default_backend: str,
        scratch: ScratchFolders,
        logs: TaskLogs,
        post: Callable[[NodeEvent], None],
        report: Callable[[AttemptReport], None],
    ) -> None:
        """``there`` are those of ``backends`` that launches are planned for, see ``use``."""
        self._backends = backends
        self._there = tuple(there)
        self._node = node
        self._default = default_backend
        self._scratch = scratch
        self._logs = logs
        self._post = post
        self._report = report
        self._patience = Patience()
        self._preparing = Preparing(
            backends, node=node, patience=self._patience, post=post, on_ready=self._put_to_start
        )
        #: Launches to be started, those of them that still shall be, and how many jobs go
        #: through them.
        self._to_start: deque[tuple[Launch, Handle]] = deque()
        self._wanted: set[str] = set()
        self._starters = 0
        #: Folders that were made for a start, or why they could not be.
        self._prepared: dict[str, TaskFolders | OSError] = {}
        self._removal = Removal(
            backends,
            node=node,
            scratch=scratch,
            logs=logs,
            patience=self._patience,
            begin=self._begin,
        )
        self._deadlines = Deadlines(post)
        #: Pausing and resuming one launch keep their order.
        self._holding: dict[str, asyncio.Lock] = {}
        #: By launch, the grace of an end that its backend has not heard of yet.
        self._kills: dict[str, float] = {}
        self._jobs: set[asyncio.Task[None]] = set()

    def use(self, there: Iterable[str], default: str) -> None:
        """From now on plan launches for these backends only; those that name none for ``default``.

        What was planned before is seen through, also by others.
        """
        self._there = tuple(there)
        self._default = default

    def plan(self, launch: Launch) -> StartOrdered:
        """Turn the order to launch into an event, with the handle its backend would use."""
        name = launch.spec.wanted_backend or self._default
        backend = self._backends.get(name) if name in self._there else None
        if backend is None:
            there = ", ".join(sorted(self._there)) or "none"
            problem = f"backend {name or '(default)'} is not on this node; there is: {there}"
            return StartOrdered(launch, None, problem)
        try:
            return StartOrdered(launch, backend.plan(launch))
        except Exception as error:  # a backend's bug, see above
            return StartOrdered(launch, None, self._explain(error, "planning", launch.key))

    def prepare(self, actions: Sequence[NodeAction]) -> None:
        """Make the folders of what is to be started. Blocks; called in a thread."""
        for action in actions:
            if isinstance(action, StartLaunch):
                self._prepared[action.key] = self._make_folders(action.key)

    def carry_out(self, actions: Sequence[NodeAction]) -> None:
        """Begin actions, in order; does not wait for their end."""
        for action in actions:
            match action:
                case SendReport(report):
                    self._report(report)
                case StartLaunch(launch, handle):
                    self._preparing.begin(launch, handle)
                case LetGo(key):
                    self._let_go(key)
                case WatchLaunch():
                    self._watch(action)
                case RemoveLaunch(launch, handle):
                    self._holding.pop(launch.key, None)
                    self._kills.pop(launch.key, None)
                    self._removal.put(launch.key, handle)
                case SetDeadline(key, in_s):
                    self._deadlines.set(key, in_s)
                case KillLaunch():
                    self._begin_kill(action)
                case AdoptLaunch(launch, handle):
                    self._begin(self._adopt(launch, handle), f"adopt {launch.key}")
                case PauseLaunch() | ResumeLaunch():
                    self._begin(self._hold(action), f"hold {action.key}")
                case Remember() | Forget():
                    pass  # the loop has seen to it
                case _:
                    assert_never(action)

    def hurry(self) -> None:
        """Try at once what waits for a backend: one is back."""
        self._patience.hurry()

    def leaving(self) -> list[Handle]:
        """Give the handles of launches that are being removed."""
        return self._removal.pending()

    def clean_up(self, records: Iterable[LaunchRecord]) -> None:
        """Remove what an earlier run did not come to remove of launches that are settled."""
        self._removal.put_left(records)

    async def close(self) -> None:
        """Give what is under way a moment to finish, then let go of it; a restart finds it."""
        self._deadlines.clear()
        await self._preparing.close()
        self._removal.begin()
        self._patience.end()
        jobs = set(self._jobs)
        if jobs:
            await asyncio.wait(jobs, timeout=_FINISH_S)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        job = spawn(work, name=name)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    # Starting -----------------------------------------------------------------------

    def _put_to_start(self, launch: Launch, handle: Handle) -> None:
        self._to_start.append((launch, handle))
        self._wanted.add(launch.key)
        if self._starters < _STARTS_AT_ONCE:
            self._starters += 1
            self._begin(self._start_all(), "start")

    async def _start_all(self) -> None:
        """Start one launch after the other until none waits."""
        try:
            while self._to_start:
                launch, handle = self._to_start.popleft()
                if launch.key in self._wanted:
                    self._wanted.remove(launch.key)
                    await self._start(launch, handle)
        finally:
            self._starters -= 1

    def _let_go(self, key: str) -> None:
        """Give a launch up whose start has not been tried. One that has been goes on."""
        if self._preparing.let_go(key) or key in self._wanted:
            self._wanted.discard(key)
            self._prepared.pop(key, None)
            self._post(LaunchLetGo(key))

    async def _start(self, launch: Launch, handle: Handle) -> None:
        key = launch.key
        folders = self._prepared.pop(key, None)
        if folders is None:  # it waited for something else than its commit
            folders = await asyncio.to_thread(self._make_folders, key)
        if isinstance(folders, OSError):
            why = folders.strerror or folders
            self._post(LaunchFailed(key, f"cannot make its folders: {why}"))
            return
        try:
            started = await self._backends[handle.backend].start(launch, handle, folders)
        except BackendFailed as error:
            self._post(LaunchFailed(key, cut(error.message)))
        except BackendAway as error:
            self._begin(self._break_off(handle.backend, key, error), f"break off {key}")
        except Exception as error:  # a backend's bug, see above
            message = self._explain(error, "starting", key)
            self._begin(self._find_out(launch, handle, message), f"find out {key}")
        else:
            if (note := cut(started.note)) is not started.note:
                started = replace(started, note=note)
            self._post(LaunchStarted(key, started))

    async def _break_off(self, backend: str, key: str, error: BackendAway) -> None:
        # Asked at once, one that is away whenever it starts something would be asked for ever.
        await self._patience.wait(1)
        self._post(LaunchBrokeOff(key, waits_for(backend, error)))

    async def _find_out(self, launch: Launch, handle: Handle, message: str) -> None:
        """Learn whether a start that a bug broke off has begun: what runs must not count as failed.

        If it has not, it is not tried again: the bug would be there again.
        """
        finding = await self._ask_fate(launch.key, handle)
        if finding.found is Found.NEVER_STARTED:
            self._post(LaunchFailed(launch.key, message))
        else:
            started = Started(started_at=finding.started_at, note=message)
            self._post(LaunchStarted(launch.key, started))

    def _make_folders(self, key: str) -> TaskFolders | OSError:
        try:
            scratch = self._scratch.make(key)
        except OSError as error:
            return error
        stdout, stderr = self._logs.new_paths(key)
        return TaskFolders(scratch=scratch, stdout=stdout, stderr=stderr)

    # Finding again ------------------------------------------------------------------

    async def _adopt(self, launch: Launch, handle: Handle) -> None:
        finding = await self._ask_fate(launch.key, handle)
        if finding.exit is not None:
            finding = replace(finding, exit=_cut_exit(finding.exit))
        fresh = None
        if finding.found is Found.NEVER_STARTED:
            if (backend := self._backends.get(handle.backend)) is not None:
                await _drop_plan(backend, handle)
            # Last, so that the engine has the new handle before anybody tidies up.
            fresh = self._plan_again(launch, handle)
        self._post(LaunchFound(launch.key, finding, fresh))

    def _plan_again(self, launch: Launch, handle: Handle) -> Handle | None:
        backend = self._backends.get(handle.backend)
        if backend is None:
            return None
        try:
            return backend.plan(launch)
        except Exception as error:  # a backend's bug, see above
            self._explain(error, "planning", launch.key)
            return None

    async def _ask_fate(self, key: str, handle: Handle) -> Finding:
        """Ask until there is an answer: guessing could end what runs, or run it twice."""
        backend = self._backends.get(handle.backend)
        if backend is None:
            return _unknowable(handle.backend)
        told = False
        for tries in itertools.count(1):
            try:
                return await backend.adopt(handle)
            except BackendAway as error:
                if tries == 1:
                    text = "cannot learn yet what became of a launch: %s"
                    _log.warning(text, error, extra=about(key, self._node))
            except Exception as error:  # a backend's bug, see above
                if not told:
                    told = True
                    self._explain(error, "adopting", key)
                    _log.error("cannot learn what became of a launch", extra=about(key, self._node))
            await self._patience.wait(tries)
        raise AssertionError("tries have no end")

    # Running launches ---------------------------------------------------------------

    def _watch(self, action: WatchLaunch) -> None:
        def on_exit(exit_: Exit, started_at: float, ended_at: float) -> None:
            self._post(LaunchExited(action.key, _cut_exit(exit_), started_at, ended_at))

        try:
            self._backends[action.handle.backend].watch(action.handle, on_exit)
        except Exception as error:  # a backend's bug, see above
            self._post(LaunchRefused(action.key, self._explain(error, "watching", action.key)))

    def _begin_kill(self, action: KillLaunch) -> None:
        """Have a launch ended. Of what is asked before its backend hears, the least grace."""
        key, grace_s = action.key, action.grace_s
        before_s = self._kills.get(key)
        self._kills[key] = grace_s if before_s is None else min(grace_s, before_s)
        if before_s is None:
            self._begin(self._kill(key, action.handle), f"kill {key}")

    async def _kill(self, key: str, handle: Handle) -> None:
        """Have a backend end a launch, however long it is away: an end must not be lost."""
        tries = 0
        while (grace_s := self._kills.get(key)) is not None:
            try:
                await self._backends[handle.backend].kill(handle, grace_s)
            except BackendAway as error:
                tries += 1
                if tries == 1:
                    text = f"its end is still {waits_for(handle.backend, error)}"
                    self._post(LaunchRefused(key, text))
                await self._patience.wait(tries)
                continue
            except Exception as error:  # a backend's bug, see above
                self._post(LaunchRefused(key, self._explain(error, "ending", key)))
            if self._kills.get(key) == grace_s:  # else it was asked for with less meanwhile
                del self._kills[key]

    async def _hold(self, action: PauseLaunch | ResumeLaunch) -> None:
        paused = isinstance(action, PauseLaunch)
        backend = self._backends[action.handle.backend]
        async with self._holding.setdefault(action.key, asyncio.Lock()):
            try:
                await (backend.pause if paused else backend.resume)(action.handle)
            except BackendAway as error:
                said = "paused" if paused else "resumed"
                message = f"it cannot be {said} now, ask again later: {error.message}"
                self._post(LaunchRefused(action.key, cut(message)))
            except Exception as error:  # a backend's bug, see above
                verb = "pausing" if paused else "resuming"
                self._post(LaunchRefused(action.key, self._explain(error, verb, action.key)))
            else:
                self._post(LaunchHeld(action.key, paused))

    def _explain(self, error: Exception, doing: str, key: str) -> str:
        return explain(error, doing, key, self._node)


async def _drop_plan(backend: Backend, handle: Handle) -> None:
    """Remove what the backend keeps of a launch that never began, so that nothing piles up."""
    try:
        await backend.remove(handle)
    except KohakuError as error:
        _log.warning("cannot remove a plan that was given up: %s", error)


def _unknowable(backend: str) -> Finding:
    message = f"backend {backend} is no longer on this node: what became of it is not known"
    return Finding(found=Found.ENDED, exit=Exit(Cause.NODE_FAILED, message=message))


def _cut_exit(exit_: Exit) -> Exit:
    return replace(exit_, message=cut(exit_.message)) if exit_.message else exit_
