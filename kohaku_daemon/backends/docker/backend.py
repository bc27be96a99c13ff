"""Tasks in containers of the machine's Docker engine.

Knows: how a launch becomes a container, is found again by its labels, ended, held.
Does not know: how a container is written (``container``), how images come here (``images``).

What is promised where:

- At most once. A mark on the node's disk is made before a container is started; a container
  without a start is removed without force, so that one of start and removal fails (``starting``).
- The runner is not on the way of anything that a task does or says. Its output goes into files,
  its exit code into another (``init``). The engine is neither, but for starts and ends.
- A restart of the engine ends containers unless it keeps them (live-restore). Either way what
  became of them is found out, when it answers again.
- Containers of other runners, clusters and people are never touched: ours have a label that no
  other data folder gives.

A task without an image runs with the machine's own programs, read only (``machine``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import platform
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import (
    BackendAbsent,
    BackendAway,
    BackendFailed,
    OnExit,
    OnProgress,
    TaskFolders,
)
from kohaku_daemon.backends.docker.container import (
    RUNNER_LABEL,
    Surroundings,
    write_container,
)
from kohaku_daemon.backends.docker.engine import Containers, ListedContainer
from kohaku_daemon.backends.docker.engine_watch import EngineWatch
from kohaku_daemon.backends.docker.fates import Fates
from kohaku_daemon.backends.docker.images.bringing import Images
from kohaku_daemon.backends.docker.images.machine_images import MachineImages
from kohaku_daemon.backends.docker.images.source import ImageSource
from kohaku_daemon.backends.docker.images.task_images import TaskImages
from kohaku_daemon.backends.docker.init import make_init
from kohaku_daemon.backends.docker.keeping import Keeping
from kohaku_daemon.backends.docker.kept import KeptContainer
from kohaku_daemon.backends.docker.layout import lay_out
from kohaku_daemon.backends.docker.reading import describe_engine
from kohaku_daemon.backends.docker.record import ContainerRecord, list_names, name_launch
from kohaku_daemon.backends.docker.settings import DockerSettings
from kohaku_daemon.backends.docker.starting import give_up, start_container
from kohaku_daemon.backends.docker.stopping import stop_container
from kohaku_daemon.backends.docker.usage import find_group
from kohaku_daemon.backends.process.tree import read_boot_id
from kohaku_daemon.clock import Clock, SystemClock
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch, Started
from kohaku_daemon.dockerd.connection import Dockerd
from kohaku_daemon.dockerd.errors import EngineAbsent
from kohaku_daemon.dockerd.images import EngineImages
from kohaku_daemon.supervise import spawn
from protocol.errors import KohakuError
from protocol.ids import TaskId
from protocol.models.node import BackendInfo, TaskReading
from protocol.models.task import DOCKER

_log = logging.getLogger(__name__)

#: Folder of the launches' records, and beginning of the name of our helper, in the state folder.
_LAUNCHES: Final = "launches"
_INIT: Final = "init-"
#: Starts at once for each core: more only make each take longer (measured with dockerd 20.10).
_STARTS_PER_CORE: Final = 2
#: Looks at a container that is being removed, and seconds between them.
_REMOVAL_LOOKS: Final = 40
_REMOVAL_LOOK_S: Final = 0.05


class DockerBackend:
    """Runs tasks in containers. See ``base.Backend``."""

    name: Final = DOCKER

    def __init__(
        self,
        *,
        state_root: Path,
        node: str,
        source: ImageSource,
        hidden: tuple[Path, ...] = (),
        shared_dir: Path | None = None,
        settings: DockerSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Make a backend; ``open`` makes it ready.

        Args:
            state_root: Folder for what launches leave, this backend's alone, on a local disk.
            node: Name of the node.
            source: Where images come from.
            hidden: Folders that no task may see: the daemons' own data.
            shared_dir: The folder that all nodes share, if there is one.
            settings: What the administrator chose.
            clock: Source of the time.
        """
        self._root = state_root
        self._node = node
        self._settings = settings or DockerSettings()
        self._clock = clock or SystemClock()
        self._hidden = (state_root, *hidden)
        self._shared_dir = os.path.realpath(shared_dir) if shared_dir is not None else ""
        # Of this runner alone: another cluster may use the same engine, with a node of this name.
        place = hashlib.sha256(os.fsencode(state_root.absolute())).hexdigest()
        self._runner = f"{node}-{place[:16]}"
        self._dockerd = Dockerd(self._settings.socket)
        self._containers = Containers(self._dockerd, self._runner)
        self._keeping = Keeping(state_root / _LAUNCHES)
        self._fates = Fates(node, self._dockerd, self._containers, self._keeping, self._clock)
        self.images = Images(
            self._dockerd,
            source,
            notes=state_root / "images.json",
            free=self._settings.images_free,
            clock=self._clock,
        )
        self._machine = MachineImages(self._dockerd, self._settings.machine_folders, self._clock)
        self._task_images = TaskImages(EngineImages(self._dockerd), self.images, self._machine)
        self._watch = EngineWatch(
            self._dockerd,
            f"{RUNNER_LABEL}={self._runner}",
            on_end=self._fates.take_end,
            on_back=self._fates.look_at_all,
            on_gone=self._fates.note_gone,
        )
        #: Set by ``open``.
        self._here: Surroundings | None = None
        #: Starts that go on; each gives what came of it.
        self._starts: dict[str, asyncio.Task[Started | KohakuError]] = {}
        self._slots = asyncio.Semaphore(max(2, _STARTS_PER_CORE * (os.cpu_count() or 1)))
        #: Plans whose start was asked for since somebody began to tidy up.
        self._younger: set[str] | None = None

    def __repr__(self) -> str:
        return f"DockerBackend({self._node}, {self._dockerd!r}, kept={len(self._keeping)})"

    # Being there ----------------------------------------------------------------------

    async def open(self) -> BackendInfo:
        """Reach the engine, and say what it allows.

        Raises:
            BackendAbsent: There is no Docker engine here.
        """
        try:
            # First, and not from the engine: nothing is planned without it.
            self._fates.boot = read_boot_id()
            await self._dockerd.open()
            told = await self._dockerd.ask("info")
            init = await asyncio.to_thread(self._make_ready)
            await self.images.open()
        except EngineAbsent as error:
            raise BackendAbsent(error.message, hint=error.hint) from error
        except (OSError, KohakuError) as error:
            return BackendInfo(self.name, healthy=False, message=f"cannot make ready: {error}")
        if not init:
            kind = platform.machine()
            return BackendInfo(
                self.name, healthy=False, message=f"there is no helper for machines of {kind}"
            )
        self._here = Surroundings(
            node=self._node,
            runner=self._runner,
            init=init,
            settings=self._settings,
            shared_dir=self._shared_dir,
        )
        self._watch.begin()
        return describe_engine(told, self._settings, self._shared_dir)

    def _make_ready(self) -> str:
        """Make the folders and our helper; give its path, empty if there is none for this kind.

        Raises:
            OSError: That is not possible.
        """
        self._keeping.records.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root.chmod(0o700)
        program = make_init(platform.machine())
        if program is None:
            return ""
        # By what is in it: containers of an earlier version go on with theirs.
        path = self._root / f"{_INIT}{hashlib.sha256(program).hexdigest()[:12]}"
        if not path.exists() or path.read_bytes() != program:  # a power cut may have emptied it
            fresh = path.with_name(f"{path.name}.{os.getpid()}")
            fresh.write_bytes(program)
            fresh.chmod(0o755)
            fresh.rename(path)
        return str(path)

    async def close(self) -> None:
        """Let go of everything. Containers go on."""
        await self._watch.close()
        killers = [kept.killer for kept in self._keeping if kept.killer is not None]
        jobs = [*self._starts.values(), *killers]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self._fates.close()
        await self.images.close()
        await self._dockerd.close()

    @property
    def trouble(self) -> str:
        """Why nothing can be started now; empty if it can."""
        return self._watch.trouble

    # Starting -------------------------------------------------------------------------

    async def prepare(self, launch: Launch, on_progress: OnProgress) -> None:
        """Bring the image of a launch to this machine.

        Raises:
            BackendFailed: It cannot be had.
            BackendAway: The engine, or where it comes from, does not answer now.
        """
        if launch.image is not None:
            await self.images.bring(launch, on_progress)
        else:
            await self._machine.find()

    def plan(self, launch: Launch) -> Handle:
        """Make the handle of a launch that does not exist yet."""
        return Handle(
            backend=self.name,
            data={
                "task": launch.task,
                "attempt": launch.attempt,
                "boot": self._fates.boot,
                "plan": secrets.token_hex(8),
            },
        )

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        """Start a launch; again with the same handle, say that it was started.

        Raises:
            BackendFailed: It did not start, and never will under this handle.
            BackendAway: It may have started.
        """
        plan = name_launch(handle)
        if self._younger is not None:
            self._younger.add(plan)
        job = self._starts.get(plan)
        if job is None:
            job = spawn(self._start(launch, handle, folders), name=f"start {plan}")
            self._starts[plan] = job
            job.add_done_callback(lambda _: self._starts.pop(plan, None))
        # Whoever gives up waiting must not leave it half-way: what is told is told by adopt.
        outcome = await asyncio.shield(job)
        if isinstance(outcome, KohakuError):
            raise outcome
        return outcome

    async def _start(
        self, launch: Launch, handle: Handle, folders: TaskFolders
    ) -> Started | KohakuError:
        kept = self._keeping.keep(handle)
        if kept.started is not None:
            return kept.started
        kept.is_starting = True
        try:
            self._check_startable(kept)
            kept.started = await self._start_new(launch, kept, folders)
        except BackendFailed as error:
            self._keeping.forget(kept)
            return await self._refuse(kept, error)
        except BackendAway as error:
            self._keeping.forget(kept)
            return error
        finally:
            kept.is_starting = False
            if kept.has_died:
                self._fates.take_end(kept.id)
        return kept.started

    async def _refuse(self, kept: KeptContainer, error: BackendFailed) -> KohakuError:
        """Have it that a launch that failed to start never does."""
        if kept.record.failure is None:
            try:
                await give_up(self._containers, kept, error.message)
            except (BackendFailed, BackendAway) as worse:
                return worse
        return error

    def _check_startable(self, kept: KeptContainer) -> None:
        failure = kept.record.failure
        if failure is not None:
            raise BackendFailed(failure or f"launch {kept.plan} was given up before it started")
        if kept.record.has_begun:
            raise BackendAway(f"launch {kept.plan} was begun before")

    async def _start_new(
        self, launch: Launch, kept: KeptContainer, folders: TaskFolders
    ) -> Started:
        here = self._here
        if here is None:
            raise BackendAway(f"the docker backend of {self._node} has not been made ready yet")
        image, machine_folders = await self._task_images.find(launch)
        kept.command, kept.where = launch.spec.command[0], image.title
        laid = await asyncio.to_thread(
            lay_out, launch, folders, kept.record, here, self._hidden, machine_folders
        )
        body = write_container(
            launch, kept.plan, image, here,
            folders=laid.folders, exit_file=kept.record.exit_file, mounts=laid.mounts,
        )  # fmt: skip
        note = f"in {image.title}, Docker {self._dockerd.version}"
        async with self._slots:
            return await start_container(self._containers, kept, body, note, self._keeping.register)

    # Finding again --------------------------------------------------------------------

    async def adopt(self, handle: Handle) -> Finding:
        """Say what became of a launch started, or about to be, by an earlier run of the runner.

        Raises:
            BackendFailed: The disk does not let it be decided.
            BackendAway: The engine does not answer now.
        """
        plan = name_launch(handle)
        if (job := self._starts.get(plan)) is not None:
            await asyncio.wait({job})
        known = self._keeping.find(plan)
        if known is not None and known.exit is not None:
            return known.finding
        kept = self._keeping.keep(handle)
        try:
            finding = await self._fates.find(kept)
        except BaseException:  # a caller that gave up too leaves nothing remembered half
            if known is None:
                self._keeping.forget(kept)
            raise
        if finding.found is Found.NEVER_STARTED:
            self._keeping.forget(kept)
        return finding

    # Ends -----------------------------------------------------------------------------

    def watch(self, handle: Handle, on_exit: OnExit) -> None:
        """Call ``on_exit`` once when the launch ends, or has ended.

        Raises:
            BackendFailed: There is no such launch.
        """
        kept = self._keeping.find(name_launch(handle))
        if kept is None:
            raise BackendFailed(f"{self._node} knows no launch {name_launch(handle)}")
        kept.watch(on_exit)

    # What is done with one that runs --------------------------------------------------

    async def kill(self, handle: Handle, grace_s: float) -> None:
        """Ask all of it to end: SIGTERM, then after ``grace_s`` SIGKILL. Returns at once.

        Raises:
            BackendAway: It may not have been told.
        """
        if (kept := self._find_alive(handle)) is not None:
            await stop_container(self._containers, kept, grace_s)

    async def pause(self, handle: Handle) -> None:
        """Hold every process of it still. Idempotent; of an ended launch, nothing."""
        if (kept := self._find_alive(handle)) is not None:
            await self._containers.pause(kept.id)

    async def resume(self, handle: Handle) -> None:
        """Let it go on. Idempotent; of an ended launch, nothing."""
        if (kept := self._find_alive(handle)) is not None:
            await self._containers.unpause(kept.id)

    async def read(self, handle: Handle) -> TaskReading | None:
        """Read what a running launch uses; None if it has ended."""
        kept = self._find_alive(handle)
        if kept is None:
            return None
        if kept.group is None:
            facts = await self._containers.inspect(kept.id)
            if facts is None or not facts.is_alive or kept.exit is not None:
                return None
            kept.group = find_group(facts.pid, kept.id, self._settings.cgroup_root)
            if kept.group is None:
                return None
        usage = kept.group.read_usage()
        if not usage.processes:
            return None  # it has ended, and that is about to be told
        now = self._clock.monotonic()
        passed_s = now - kept.read_at if kept.read_at else 0.0
        percent = 100 * (usage.cpu_s - kept.read_cpu_s) / passed_s if passed_s > 0 else 0.0
        kept.read_at, kept.read_cpu_s = now, usage.cpu_s
        return TaskReading(
            task=kept.task,
            cpu_s=usage.cpu_s,
            cpu_percent=max(0.0, percent),
            memory=usage.memory,
            processes=usage.processes,
        )

    def owner(self, pid: int, cgroup: str) -> TaskId | None:
        """Name the task whose container a process is in: its control groups have the id."""
        return self._keeping.find_owner(cgroup)

    def _find_alive(self, handle: Handle) -> KeptContainer | None:
        return self._keeping.find_alive(name_launch(handle))

    # What is left ---------------------------------------------------------------------

    async def remove(self, handle: Handle) -> None:
        """Remove what is left of an ended launch. Idempotent.

        Raises:
            BackendFailed: It has not ended, or cannot be removed.
            BackendAway: The engine does not answer now.
        """
        plan = name_launch(handle)
        if (job := self._starts.get(plan)) is not None:
            await asyncio.wait({job})
        kept = self._keeping.find(plan)
        ids = [kept.id] if kept is not None and kept.id else []
        for container in ids or [one.id for one in await self._containers.list_ours(plan)]:
            await self._remove_container(container, plan)
        await self._remove_record(plan)

    async def _remove_container(self, container: str, plan: str) -> None:
        for _ in range(_REMOVAL_LOOKS):
            if await self._containers.remove(container):
                return
            facts = await self._containers.inspect(container)
            if facts is None:
                return
            if facts.is_alive:
                raise BackendFailed(f"launch {plan} on {self._node} has not ended")
            await asyncio.sleep(_REMOVAL_LOOK_S)  # somebody else is removing it
        raise BackendFailed(f"Docker on {self._node} does not remove the container of {plan}")

    async def _remove_record(self, plan: str) -> None:
        try:
            await asyncio.to_thread(ContainerRecord(self._keeping.records, plan).remove)
        except OSError as error:
            raise BackendFailed(f"cannot tidy up {self._root}: {error.strerror}") from error
        if (kept := self._keeping.find(plan)) is not None:
            self._keeping.forget(kept)

    async def tidy(self, wanted: Collection[Handle]) -> None:
        """Remove containers and records of this runner's launches that nobody wants.

        Raises:
            BackendFailed: One cannot be removed.
            BackendAway: The engine does not answer now.
        """
        keep = self._younger = {name_launch(handle) for handle in wanted}
        try:
            for one in await self._containers.list_ours():
                if one.plan not in keep:
                    await self._remove_unwanted(one)
            for plan in await asyncio.to_thread(list_names, self._keeping.records):
                if plan not in keep and plan not in self._starts:
                    await self._remove_record(plan)
        except OSError as error:
            raise BackendFailed(f"cannot tidy up {self._root}: {error.strerror}") from error
        finally:
            self._younger = None
        await self._machine.tidy()

    async def _remove_unwanted(self, one: ListedContainer) -> None:
        if one.is_alive:
            _log.warning("nobody wants launch %s: it is ended", one.plan)
        if (kept := self._keeping.find(one.plan)) is not None:
            kept.kill_at = asyncio.get_running_loop().time()  # nobody wonders who ended it
        await self._containers.remove(one.id, force=True)
        await self._remove_record(one.plan)
