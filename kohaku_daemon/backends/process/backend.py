"""Tasks as processes of the machine itself: the backend that is always there.

Knows: how a launch is given to the launcher, found again by its state folder, ended, held.
Does not know: how its walls are put up (``sandbox``) or what they are (``planning``).

A launch belongs to a shim that outlives the runner and writes down the program's own wait
status. It is not wrapped in bubblewrap: that ends with 137 for a program that exits 137 as
well as for one that SIGKILL ended, and its ``--json-status-fd`` says 137 for both too (seen
with 0.8.0), while a task's end must tell a code from a signal.

What is promised where:

- At most once. Whoever takes the state folder first, a shim or a runner that gives the launch
  up, has it for ever (``record``).
- A restart of the machine is told by the boot id in the handle. If no keeper is recorded and
  the boot is another one, a power cut may have eaten the record, so the answer is "ended with
  the machine", not "never started".
- Without namespaces or users of its own (a runner that is not root) a task can reach whatever
  the runner's user can. ``Started.note`` and ``BackendInfo.isolation`` say what was given.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from kohaku_daemon.backends.base import BackendFailed, OnExit, TaskFolders
from kohaku_daemon.backends.process import tree
from kohaku_daemon.backends.process.cgroups import GroupSite, find_site
from kohaku_daemon.backends.process.environment import mark_launch
from kohaku_daemon.backends.process.kept import KeptLaunch
from kohaku_daemon.backends.process.link import LauncherLink
from kohaku_daemon.backends.process.planning import Means, Planner, find_users
from kohaku_daemon.backends.process.record import (
    NOBODY,
    Keeper,
    LaunchPlan,
    read_ending,
    read_keeper,
    take,
)
from kohaku_daemon.backends.process.settings import ProcessSettings
from kohaku_daemon.backends.process.shim import FAILED, SWEEP_S
from kohaku_daemon.backends.process.trial import choose_means
from kohaku_daemon.backends.process.verdict import judge, judge_lost
from kohaku_daemon.clock import Clock, SystemClock
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch, Started
from kohaku_daemon.supervise import spawn
from protocol.ids import TaskId
from protocol.models.node import BackendInfo, TaskReading

_log = logging.getLogger(__name__)
T = TypeVar("T")

#: Between two looks at a tree that is being ended or held, at first and at most.
_SOON_S: Final = 0.01
_LATER_S: Final = 0.5
#: How long a tree may take to be still before that is called a failure.
_HOLD_S: Final = 10.0
#: How long a shim may take whose program ends at once.
_SHORT_S: Final = 20.0


@dataclass(slots=True)
class _Watched:
    """One launch whose end is awaited."""

    keeper: Keeper
    on_exit: OnExit
    #: Of the shim; -1 if it was over before anybody looked.
    descriptor: int


class ProcessBackend:
    """Runs tasks as processes of the machine itself. See ``base.Backend``."""

    name: Final = "process"

    def __init__(
        self,
        *,
        state_root: Path,
        node: str,
        hidden: Sequence[Path] = (),
        settings: ProcessSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Make a backend; ``open`` makes it ready.

        Args:
            state_root: Folder for what launches leave, this backend's alone, on a local disk.
            node: Name of the node.
            hidden: Folders that no task may see: the daemons' own data.
            settings: What the administrator chose.
            clock: Source of the time.
        """
        self._root = state_root
        self._node = node
        # Of this runner alone: another cluster on the machine may have a node of the same name.
        place = hashlib.sha256(os.fsencode(state_root.absolute())).hexdigest()
        self._site_name = f"{node}-{place[:8]}"
        self._settings = settings or ProcessSettings()
        self._clock = clock or SystemClock()
        self._hidden = (state_root, *hidden)
        self._link = LauncherLink(state_root / "launcher.log")
        self._planner: Planner | None = None
        self._site: GroupSite | None = None
        self._boot = ""
        # Begins anywhere, so that no two runs of a runner number alike.
        self._plans = itertools.count(secrets.randbits(60))
        self._watched: dict[str, _Watched] = {}
        self._kills: dict[str, tuple[float, asyncio.Task[None]]] = {}
        #: When and what CPU seconds were read last, for the percentage.
        self._readings: dict[str, tuple[float, float]] = {}

    def __repr__(self) -> str:
        return f"ProcessBackend({self._node}, watched={len(self._watched)})"

    @property
    def launcher_pid(self) -> int | None:
        """Pid of the launcher, for those who look after the machine; None if none runs."""
        return self._link.pid

    async def open(self) -> BackendInfo:
        """Make ready, and find out by trials what this machine allows."""
        try:
            # Tasks may pass through it, as the trial does, but list nothing.
            self._root.mkdir(parents=True, exist_ok=True)
            self._root.chmod(0o711)
            self._boot = tree.read_boot_id()
            site = await asyncio.to_thread(find_site, self._settings.cgroup_root, self._site_name)
            self._site = site
            hoped = Means(namespaces=True, site=site, users=find_users(self._settings))
            planner = Planner(self._node, self._hidden, self._settings, hoped, self._boot)
            means, trouble = await choose_means(
                planner, self._settings.isolation, self._root, self._run_trial
            )
        except OSError as error:
            return BackendInfo(self.name, healthy=False, message=f"cannot make ready: {error}")
        if means is None:
            return BackendInfo(self.name, healthy=False, message=trouble)
        self._planner = replace(planner, means=means)
        if trouble:
            _log.warning("process backend: %s", trouble)
        return BackendInfo(
            self.name,
            message=trouble,
            isolation=means.describe(),
            enforces=means.list_enforced(),
        )

    async def close(self) -> None:
        """Let go of everything. Launches go on."""
        for key in list(self._watched):
            self._unwatch(key)
        for _, job in self._kills.values():
            job.cancel()
        self._kills.clear()
        await self._link.close()
        if self._site is not None:
            self._site.remove()

    def plan(self, launch: Launch) -> Handle:
        """Make the handle of a launch that does not exist yet."""
        return Handle(
            backend=self.name,
            data={
                "task": launch.task,
                "attempt": launch.attempt,
                "boot": self._boot,
                # A launch that was given up before it began may be planned again: the late
                # start of the first plan must not find the folder of the second.
                "plan": f"{next(self._plans):016x}",
            },
        )

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        """Start a launch; again with the same handle, say that it was started.

        Raises:
            BackendFailed: It did not start, and never will under this handle.
        """
        if self._planner is None:
            raise BackendFailed(f"the process backend of {self._node} is not ready")
        folder = self._find_folder(handle)
        plan = self._planner.plan(launch, folder, folders)
        try:
            if self._site is not None and not self._site.is_ready():
                await asyncio.to_thread(find_site, self._settings.cgroup_root, self._site_name)
            folder.mkdir(mode=0o700, exist_ok=True)
            kind, text = await self._link.launch(plan)
        except OSError as error:
            kind, text = FAILED, f"no launcher on {self._node}: {error}"
        return await self._settle(folder, kind, text)

    async def adopt(self, handle: Handle) -> Finding:
        """Say what became of a launch started, or about to be, by an earlier run of the runner.

        Raises:
            BackendFailed: Its state folder cannot be used.
        """
        folder = self._find_folder(handle)
        keeper = read_keeper(str(folder))
        if keeper is None and handle.data.get("boot") == self._boot:
            keeper = _give_up(folder)
        if keeper == NOBODY:
            return Finding(found=Found.NEVER_STARTED)
        kept = self._open_kept(handle, keeper)
        if kept is not None and kept.is_kept():
            held = await self._call(kept, kept.is_held)
            state = Found.PAUSED if held else Found.RUNNING
            return Finding(found=state, started_at=keeper.started_at if keeper else 0.0)
        return await self._find_end(folder, keeper, kept)

    def watch(self, handle: Handle, on_exit: OnExit) -> None:
        """Call ``on_exit`` once when the launch ends, or has ended.

        Raises:
            BackendFailed: There is no such launch.
        """
        key = _name(handle)
        keeper = read_keeper(str(self._find_folder(handle)))
        if keeper is None or keeper == NOBODY:
            raise BackendFailed(f"{self._node} knows no launch {key}")
        self._unwatch(key)
        kept = self._open_kept(handle, keeper)
        descriptor = kept.open() if kept is not None else None
        self._watched[key] = _Watched(keeper, on_exit, -1 if descriptor is None else descriptor)
        loop = asyncio.get_running_loop()
        if descriptor is None:
            loop.call_soon(self._end, handle)
        else:
            loop.add_reader(descriptor, self._end, handle)

    async def kill(self, handle: Handle, grace_s: float) -> None:
        """Ask the whole tree to end: SIGTERM, then after ``grace_s`` SIGKILL. Returns at once.

        Asked again with less grace left than the first time, it hurries.
        """
        key = _name(handle)
        kept = self._find_kept(handle)
        if kept is None or not kept.is_kept():
            return
        deadline = self._clock.monotonic() + grace_s
        if key in self._kills:
            earlier, job = self._kills[key]
            if earlier <= deadline:
                return
            job.cancel()
        job = spawn(self._end_tree(kept, deadline, gently=grace_s > 0), name=f"kill {key}")
        self._kills[key] = (deadline, job)
        job.add_done_callback(lambda done: self._forget_kill(key, done))

    async def pause(self, handle: Handle) -> None:
        """Hold every process of the launch still. Idempotent; of an ended launch, nothing.

        Raises:
            BackendFailed: It does not come to rest.
        """
        kept = self._find_kept(handle)
        if kept is None:
            return
        deadline = self._clock.monotonic() + _HOLD_S
        while kept.is_kept() and not await self._call(kept, kept.hold):
            if self._clock.monotonic() > deadline:
                await self._call(kept, kept.release)
                raise BackendFailed(f"launch {_name(handle)} on {self._node} does not come to rest")
            await asyncio.sleep(_SOON_S)

    async def resume(self, handle: Handle) -> None:
        """Let it go on. Idempotent; of an ended launch, nothing."""
        kept = self._find_kept(handle)
        if kept is not None and kept.is_kept():
            await self._call(kept, kept.release)

    async def remove(self, handle: Handle) -> None:
        """Remove what is left of an ended launch. Idempotent.

        Raises:
            BackendFailed: It has not ended.
        """
        key, folder, kept = _name(handle), self._find_folder(handle), self._find_kept(handle)
        if kept is not None:
            if kept.is_kept():
                raise BackendFailed(f"launch {key} on {self._node} has not ended")
            kept.remove_group()
        self._unwatch(key)
        self._readings.pop(key, None)
        shutil.rmtree(folder, ignore_errors=True)

    async def read(self, handle: Handle) -> TaskReading | None:
        """Read what a running launch uses; None if it has ended."""
        key, kept = _name(handle), self._find_kept(handle)
        if kept is None or not kept.is_kept():
            self._readings.pop(key, None)
            return None
        usage = await self._call(kept, kept.read_usage)
        now = self._clock.monotonic()
        before, cpu_s = self._readings.get(key, (now, usage.cpu_s))
        self._readings[key] = (now, usage.cpu_s)
        percent = 100 * (usage.cpu_s - cpu_s) / (now - before) if now > before else 0.0
        return TaskReading(
            task=TaskId(int(handle.data["task"])),
            cpu_s=usage.cpu_s,
            cpu_percent=max(0.0, percent),
            memory=usage.memory,
            processes=usage.processes,
        )

    def _find_folder(self, handle: Handle) -> Path:
        return self._root / _name(handle)

    def _find_kept(self, handle: Handle) -> KeptLaunch | None:
        return self._open_kept(handle, read_keeper(str(self._find_folder(handle))))

    def _open_kept(self, handle: Handle, keeper: Keeper | None) -> KeptLaunch | None:
        """Look at a launch's processes; None if this boot of the machine never had any."""
        if keeper is None or keeper.boot != self._boot:
            return None
        task, attempt = int(handle.data["task"]), int(handle.data["attempt"])
        return KeptLaunch(keeper, mark_launch(task, attempt))

    async def _call(self, kept: KeptLaunch, function: Callable[[], T]) -> T:
        return function() if kept.is_quick else await asyncio.to_thread(function)

    async def _settle(self, folder: Path, kind: str, text: str) -> Started:
        """Say what became of a start, whatever was answered: the folder knows.

        Raises:
            BackendFailed: It did not start, and never will.
        """
        try:
            keeper = read_keeper(str(folder)) or _give_up(folder)
        except BackendFailed as error:
            raise BackendFailed(text or error.message) from error
        if keeper == NOBODY:
            raise BackendFailed(text or f"launch {folder.name} was given up before it started")
        ending = read_ending(str(folder))
        if kind == FAILED or (ending is not None and ending.error):
            # Its shim is about to end; whoever is told of the failure may remove what is left.
            await self._wait_for_end(keeper)
            raise BackendFailed(ending.error if ending is not None else text)
        return Started(started_at=keeper.started_at, note=keeper.note)

    async def _find_end(
        self, folder: Path, keeper: Keeper | None, kept: KeptLaunch | None
    ) -> Finding:
        started_at = keeper.started_at if keeper is not None else 0.0
        ending = read_ending(str(folder))
        if ending is not None:
            exit_ = judge(ending)
            return Finding(
                found=Found.ENDED, exit=exit_, started_at=started_at, ended_at=ending.ended_at
            )
        if kept is not None:
            await self._clear(kept)
        exit_ = judge_lost(keeper, self._boot, self._node)
        return Finding(found=Found.ENDED, exit=exit_, started_at=started_at)

    def _end(self, handle: Handle) -> None:
        """Take up the end of a watched launch: its shim is over."""
        key = _name(handle)
        watched = self._watched.get(key)
        if watched is None:
            return
        self._unwatch(key)
        spawn(self._tell(handle, watched), name=f"end of {key}")

    async def _tell(self, handle: Handle, watched: _Watched) -> None:
        kept = self._open_kept(handle, watched.keeper)
        finding = await self._find_end(self._find_folder(handle), watched.keeper, kept)
        if finding.exit is not None:
            ended_at = finding.ended_at or self._clock.now()
            await watched.on_exit(finding.exit, finding.started_at, ended_at)

    def _unwatch(self, key: str) -> None:
        watched = self._watched.pop(key, None)
        if watched is not None and watched.descriptor >= 0:
            asyncio.get_running_loop().remove_reader(watched.descriptor)
            os.close(watched.descriptor)

    def _forget_kill(self, key: str, job: asyncio.Task[None]) -> None:
        if key in self._kills and self._kills[key][1] is job:
            del self._kills[key]

    async def _end_tree(self, kept: KeptLaunch, deadline: float, *, gently: bool) -> None:
        pause_s = _SOON_S
        # A launch that was just taken may have no program yet to be told.
        told = not gently
        while kept.is_kept() and self._clock.monotonic() < deadline:
            told = told or await self._call(kept, kept.terminate) > 0
            await asyncio.sleep(min(pause_s, max(0.0, deadline - self._clock.monotonic())))
            pause_s = min(2 * pause_s, _LATER_S)
        await self._clear(kept)

    async def _clear(self, kept: KeptLaunch) -> None:
        """Kill all of a launch, until its shim is over and nothing is left.

        What is stuck in the kernel is not waited for longer than a shim would.
        """
        pause_s, deadline = _SOON_S, self._clock.monotonic() + SWEEP_S
        while (await self._call(kept, kept.kill) and self._clock.monotonic() < deadline) or (
            kept.is_kept()
        ):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LATER_S)
        kept.remove_group()

    async def _run_trial(self, plan: LaunchPlan) -> tuple[str, str]:
        answer = await self._link.launch(plan)
        keeper = read_keeper(plan["folder"])
        if keeper is not None:
            await self._wait_for_end(keeper)
        return answer

    async def _wait_for_end(self, keeper: Keeper) -> None:
        descriptor = tree.open_process(keeper.pid, keeper.start)
        if descriptor is None:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            async with asyncio.timeout(_SHORT_S):
                await ended.wait()
        except TimeoutError as error:
            raise BackendFailed(f"the shim {keeper.pid} does not end") from error
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)


def _name(handle: Handle) -> str:
    try:
        task, attempt = int(handle.data["task"]), int(handle.data["attempt"])
        return f"{task}-{attempt}-{int(str(handle.data['plan']), 16):016x}"
    except (KeyError, ValueError) as error:
        raise BackendFailed(f"this is no handle of the process backend: {handle.data}") from error


def _give_up(folder: Path) -> Keeper:
    """Decide that a launch never starts, unless a shim was faster; say who keeps it.

    Raises:
        BackendFailed: The folder cannot be used.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if take(str(folder), NOBODY):
            return NOBODY
    except OSError as error:
        raise BackendFailed(f"cannot use {folder}: {error.strerror}") from error
    return read_keeper(str(folder)) or NOBODY
