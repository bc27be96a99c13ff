"""Tasks as processes of the machine itself: the backend that is always there.

Knows: how a launch is given to a keeper, found again by its record, ended, held.
Does not know: how its walls are put up (``sandbox``) or what they are (``planning``).

A launch belongs to a keeper that outlives the runner and writes down the program's own wait
status. It is not wrapped in bubblewrap: that ends with 137 for a program that exits 137 as
well as for one that SIGKILL ended, and its ``--json-status-fd`` says 137 for both too (seen
with 0.8.0), while a task's end must tell a code from a signal.

What is promised where:

- At most once. Whoever takes the record first, a keeper or a runner that gives the launch up,
  has it for ever (``record``).
- A killed keeper costs nothing: its guard goes on with all that it kept (``guard``). Only if
  both are killed, its launches are ended and told to be lost.
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
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import BackendFailed, OnExit, OnProgress, TaskFolders
from kohaku_daemon.backends.process import tree
from kohaku_daemon.backends.process.cgroups import GroupSite, find_site
from kohaku_daemon.backends.process.control import TreeControl, call, wait_until_over
from kohaku_daemon.backends.process.conversation import Answer
from kohaku_daemon.backends.process.handles import (
    find_handle,
    is_there,
    name_launch,
    prepare,
    try_give_up,
)
from kohaku_daemon.backends.process.kept import KeptLaunch
from kohaku_daemon.backends.process.launching import FAILED, STARTED, TAKEN
from kohaku_daemon.backends.process.link import KeeperLink
from kohaku_daemon.backends.process.owners import find_group_owner, find_marked_owner
from kohaku_daemon.backends.process.planning import Means, Planner, find_users
from kohaku_daemon.backends.process.record import (
    Ending,
    LaunchPlan,
    Record,
    read_record,
)
from kohaku_daemon.backends.process.settings import ProcessSettings
from kohaku_daemon.backends.process.spares import RecordFolder
from kohaku_daemon.backends.process.trial import choose_means
from kohaku_daemon.backends.process.verdict import judge, judge_lost
from kohaku_daemon.clock import Clock, SystemClock
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch, Started
from kohaku_daemon.supervise import spawn
from protocol.ids import TaskId
from protocol.models.node import BackendInfo, TaskReading

_log = logging.getLogger(__name__)

#: Between two looks at a record that is about to change, at first and at most.
_SOON_S: Final = 0.01
_LATER_S: Final = 0.5
#: Seconds by which a clock may be off without having been set.
_CLOCK_STEP_S: Final = 2.0
#: How long what was just taken may take until it runs, or not.
_SHORT_S: Final = 20.0
#: Seconds that the cgroups' folders are believed to be there: a look costs 15 us, and somebody
#: who removes them does not do it with each launch.
_SITE_S: Final = 1.0


class ProcessBackend:
    """Runs tasks as processes of the machine itself. See ``base.Backend``."""

    name: Final = "process"

    def __init__(
        self,
        *,
        state_root: Path,
        node: str,
        hidden: Sequence[Path] = (),
        shared_dir: Path | None = None,
        settings: ProcessSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Make a backend; ``open`` makes it ready.

        Args:
            state_root: Folder for what launches leave, this backend's alone, on a local disk.
            node: Name of the node.
            hidden: Folders that no task may see: the daemons' own data.
            shared_dir: The folder that all nodes share, if there is one.
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
        self._shared_dir = str(shared_dir) if shared_dir is not None else ""
        self._link = KeeperLink(state_root, state_root / "keeper.log")
        self._planner: Planner | None = None
        self._records = RecordFolder(state_root)
        self._site: GroupSite | None = None
        #: When its folders were looked for last.
        self._site_seen_at = -_SITE_S
        self._boot = ""
        # Begins anywhere, so that no two runs of a runner number alike.
        self._plans = itertools.count(secrets.randbits(60))
        self._watched: dict[str, OnExit] = {}
        #: What follows launches that no keeper of ours has.
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._control = TreeControl(self._clock)
        #: When and what CPU seconds were read last, for the percentage.
        self._readings: dict[str, tuple[float, float]] = {}

    def __repr__(self) -> str:
        return f"ProcessBackend({self._node}, watched={len(self._watched)})"

    @property
    def keeper_pids(self) -> list[int]:
        """Pids of the keepers that take launches, for those who look after the machine."""
        return self._link.pids

    async def open(self) -> BackendInfo:
        """Make ready, and find out by trials what this machine allows."""
        try:
            # First, and not from the disk: without it nothing is told apart from before a reboot.
            self._boot = tree.read_boot_id()
            self._records.open()
            site = await asyncio.to_thread(find_site, self._settings.cgroup_root, self._site_name)
            self._site = site
            hoped = Means(namespaces=True, site=site, users=find_users(self._settings))
            planner = Planner(
                self._node, self._hidden, self._settings, hoped, self._boot, self._shared_dir
            )
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
        self._control.close()
        await self._link.close()
        if self._site is not None:
            self._site.remove()

    @property
    def trouble(self) -> str:
        """Nothing: it works with the kernel, which is there."""
        return ""

    async def prepare(self, launch: Launch, on_progress: OnProgress) -> None:
        """Do nothing: a process runs with what the machine has."""

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
        path = self._find_path(handle)
        plan = self._planner.plan(launch, path, folders)
        try:
            await self._see_to_site()
            self._records.make(path)
        except OSError as error:
            raise BackendFailed(f"cannot make {path}: {error.strerror}") from error
        while True:
            try:
                answer = await self._link.launch(plan)
            except OSError as error:
                answer = Answer(FAILED, f"no keeper on {self._node}: {error}")
            if answer.kind == STARTED:
                return Started(started_at=answer.started_at, note=plan["note"])
            started = await self._settle(path, answer)
            if started is not None:
                return started

    async def _see_to_site(self) -> None:
        """Make the cgroups' folders if they are gone: an earlier runner of the node took them."""
        now = self._clock.monotonic()
        if self._site is None or now - self._site_seen_at < _SITE_S:
            return
        if not self._site.is_ready():
            await asyncio.to_thread(find_site, self._settings.cgroup_root, self._site_name)
        self._site_seen_at = now

    async def adopt(self, handle: Handle) -> Finding:
        """Say what became of a launch started, or about to be, by an earlier run of the runner.

        Raises:
            BackendFailed: Its record cannot be used.
        """
        path = self._find_path(handle)
        found = read_record(path)
        if found.keeper is None and handle.data.get("boot") == self._boot:
            prepare(path)  # a start under this handle must find that it comes too late
            found = try_give_up(path)
        if found.is_given_up:
            return Finding(found=Found.NEVER_STARTED)
        kept = self._open_kept(path, found)
        if found.ending is None and kept is not None and kept.is_kept():
            held = await call(kept, kept.is_held)
            state = Found.PAUSED if held else Found.RUNNING
            return Finding(found=state, started_at=self._date(found, kept))
        return await self._find_end(path, found)

    def _date(self, found: Record, kept: KeptLaunch) -> float:
        """Say when a launch that runs began, by the clock as it is set now.

        If somebody has set it since, the launch must have neither more nor less of its time.
        """
        recorded, age_s = found.keeper.started_at if found.keeper else 0.0, kept.read_age_s()
        if age_s is None:
            return recorded
        began_at = self._clock.now() - age_s
        return began_at if abs(began_at - recorded) > _CLOCK_STEP_S else recorded

    def watch(self, handle: Handle, on_exit: OnExit) -> None:
        """Call ``on_exit`` once when the launch ends, or has ended.

        Raises:
            BackendFailed: There is no such launch.
        """
        key = name_launch(handle)
        self._unwatch(key)
        started_at = self._link.watch(key, lambda ending: self._take_end(key, ending))
        if started_at is None:
            found = read_record(self._find_path(handle))
            if found.keeper is None or found.is_given_up:
                raise BackendFailed(f"{self._node} knows no launch {key}")
        self._watched[key] = on_exit
        if started_at is None:
            self._follow(key)

    async def kill(self, handle: Handle, grace_s: float) -> None:
        """Ask the whole tree to end: SIGTERM, then after ``grace_s`` SIGKILL. Returns at once.

        Asked again with less grace left than the first time, it hurries.
        """
        kept = self._find_kept(handle)
        if kept is not None and kept.is_kept():
            self._control.kill(name_launch(handle), kept, grace_s)

    async def pause(self, handle: Handle) -> None:
        """Hold every process of the launch still. Idempotent; of an ended launch, nothing.

        Raises:
            BackendFailed: It does not come to rest.
        """
        kept = self._find_kept(handle)
        if kept is not None and not await self._control.hold(kept):
            name = name_launch(handle)
            raise BackendFailed(f"launch {name} on {self._node} does not come to rest")

    async def resume(self, handle: Handle) -> None:
        """Let it go on. Idempotent; of an ended launch, nothing."""
        kept = self._find_kept(handle)
        if kept is not None and kept.is_kept():
            await call(kept, kept.release)

    async def remove(self, handle: Handle) -> None:
        """Remove what is left of an ended launch. Idempotent.

        Raises:
            BackendFailed: It has not ended.
        """
        key, path = name_launch(handle), self._find_path(handle)
        if self._link.is_done_with(key):
            self._records.recycle(path)
        else:
            if not self._link.has_ended(key):
                await self._remove_unknown(key, path)
            self._records.remove(path)
        self._unwatch(key)
        self._link.forget(key)
        self._readings.pop(key, None)

    async def tidy(self, wanted: Collection[Handle]) -> None:
        """Remove the records of launches that nobody wants; what still runs of them, end.

        Raises:
            BackendFailed: The disk does not let it.
        """
        names = {name_launch(handle) for handle in wanted}
        try:
            # At once: what is planned from here on is not wanted yet, and must not be listed.
            for name in self._records.list_names():
                handle = find_handle(name)
                if handle is not None and name not in names:
                    await self._remove_unwanted(handle)
        except OSError as error:
            raise BackendFailed(f"cannot tidy up {self._root}: {error.strerror}") from error

    async def _remove_unwanted(self, handle: Handle) -> None:
        kept = self._find_kept(handle)
        if kept is not None and kept.is_kept():
            _log.warning("nobody wants launch %s: it is ended", name_launch(handle))
            await self.kill(handle, 0)  # and removed the next time
        else:
            await self.remove(handle)

    async def read(self, handle: Handle) -> TaskReading | None:
        """Read what a running launch uses; None if it has ended."""
        key, kept = name_launch(handle), self._find_kept(handle)
        if kept is None or not kept.is_kept():
            self._readings.pop(key, None)
            return None
        usage = await call(kept, kept.read_usage)
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

    def owner(self, pid: int, cgroup: str) -> TaskId | None:
        """Name the task that a process of this machine belongs to; None if it is none of ours."""
        if self._planner is None:
            return None
        if self._site is None:
            return find_marked_owner(pid)
        return find_group_owner(cgroup, self._site_name)

    async def _remove_unknown(self, key: str, path: str) -> None:
        """Make sure that nothing is left of a launch, or will begin."""
        found = read_record(path)
        if found.keeper is None and found.ending is None:
            # A keeper may have it open, about to take it.
            found = try_give_up(path)
        kept = self._open_kept(path, found)
        if kept is not None:
            if kept.is_kept():
                raise BackendFailed(f"launch {key} on {self._node} has not ended")
            kept.remove_group()

    def _find_path(self, handle: Handle) -> str:
        return f"{self._root}/{name_launch(handle)}"

    def _find_kept(self, handle: Handle) -> KeptLaunch | None:
        path = self._find_path(handle)
        return self._open_kept(path, read_record(path))

    def _open_kept(self, path: str, found: Record) -> KeptLaunch | None:
        """Look at a launch's processes; None if this boot of the machine never had any."""
        if found.keeper is None or found.keeper.boot != self._boot:
            return None
        return KeptLaunch(path, found.keeper)

    async def _settle(self, path: str, answer: Answer) -> Started | None:
        """Say what became of a start that no keeper called started: the record knows.

        None if it was another keeper's, which was killed before it ran anything.

        Raises:
            BackendFailed: It did not start, and never will.
        """
        deadline = self._clock.monotonic() + _SHORT_S
        while True:
            found = read_record(path)
            if found.keeper is None and answer.kind == TAKEN and is_there(path):
                return None
            try:
                found = found if found.keeper is not None else try_give_up(path)
            except BackendFailed as error:
                raise BackendFailed(answer.text or error.message) from error
            if found.keeper is None or found.is_given_up:
                name = os.path.basename(path)
                raise BackendFailed(answer.text or f"launch {name} was given up before it started")
            if found.ending is not None and found.ending.error:
                raise BackendFailed(found.ending.error)
            kept = self._open_kept(path, found)
            is_decided = found.program is not None or found.ending is not None
            if is_decided or kept is None or not kept.has_keeper():
                return Started(started_at=found.keeper.started_at, note=found.keeper.note)
            # Its keeper, or the guard of one that was killed, is just about to say.
            if self._clock.monotonic() > deadline:
                raise BackendFailed(f"the keeper {found.keeper.pid} does not start what it took")
            await asyncio.sleep(_SOON_S)

    async def _find_end(self, path: str, found: Record) -> Finding:
        keeper = found.keeper
        started_at = keeper.started_at if keeper is not None else 0.0
        if found.ending is not None:
            exit_ = judge(found.ending)
            return Finding(
                found=Found.ENDED, exit=exit_, started_at=started_at,
                ended_at=found.ending.ended_at,
            )  # fmt: skip
        kept = self._open_kept(path, found)
        if kept is not None:
            await self._control.clear(kept)
            # It may have been recorded between the looks at the record and at its keeper.
            ending = read_record(path).ending
            if ending is not None:
                return await self._find_end(path, found._replace(ending=ending))
        exit_ = judge_lost(keeper, self._boot, self._node)
        return Finding(found=Found.ENDED, exit=exit_, started_at=started_at)

    def _take_end(self, key: str, ending: Ending | None) -> None:
        """Take what a keeper of ours told: an end, or that the keeper was lost."""
        on_exit = self._watched.get(key)
        if on_exit is None:
            return
        if ending is None:
            self._follow(key)
            return
        del self._watched[key]
        started_at = self._link.watch(key, _ignore) or ending.ended_at
        on_exit(judge(ending), started_at, ending.ended_at)

    def _follow(self, key: str) -> None:
        job = spawn(self._wait_for_end(key), name=f"follow {key}")
        self._followers[key] = job
        job.add_done_callback(lambda _: self._followers.pop(key, None))

    async def _wait_for_end(self, key: str) -> None:
        """Wait for the end of a launch that is kept, but by no keeper we talk to; tell it."""
        path = f"{self._root}/{key}"
        found = read_record(path)
        kept = self._open_kept(path, found)
        pause_s = _SOON_S
        while kept is not None and kept.is_kept():
            descriptor = kept.open_program()
            if descriptor is not None:
                pause_s = _SOON_S
                await wait_until_over(descriptor, kept.has_keeper)
            # What it has left is swept, and its end recorded; or its guard is looking for it.
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LATER_S)
        finding = await self._find_end(path, read_record(path))
        on_exit = self._watched.pop(key, None)
        if on_exit is not None and finding.exit is not None:
            ended_at = finding.ended_at or self._clock.now()
            on_exit(finding.exit, finding.started_at, ended_at)

    def _unwatch(self, key: str) -> None:
        if self._watched.pop(key, None) is not None:
            self._link.unwatch(key)
        follower = self._followers.pop(key, None)
        if follower is not None:
            follower.cancel()

    async def _run_trial(self, plan: LaunchPlan) -> tuple[str, str]:
        answer = await self._link.launch(plan)
        name, over = os.path.basename(plan["record"]), asyncio.Event()
        if self._link.watch(name, lambda _: over.set()) is not None:
            try:
                async with asyncio.timeout(_SHORT_S):
                    await over.wait()
            except TimeoutError as error:
                raise BackendFailed("a trial does not end") from error
        self._link.forget(name)
        return answer.kind, answer.text


def _ignore(_: Ending | None) -> None:
    return
