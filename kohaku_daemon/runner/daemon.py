"""The runner daemon: put the parts together, run them, stop in order."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from kohaku_daemon.backends.registry import BackendPlace
from kohaku_daemon.clock import SystemClock
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle
from kohaku_daemon.packing.pieces import ENVIRONMENTS
from kohaku_daemon.probe.prober import Prober
from kohaku_daemon.runner.backend_kit import BackendKit, BackendWatch, open_backends
from kohaku_daemon.runner.config import RunnerConfig
from kohaku_daemon.runner.disks import Disks
from kohaku_daemon.runner.downloads import Downloads
from kohaku_daemon.runner.effects import Effects
from kohaku_daemon.runner.images import HostImages, ImageKeeper
from kohaku_daemon.runner.link import Link
from kohaku_daemon.runner.logs import TaskLogs
from kohaku_daemon.runner.loop import NodeLoop
from kohaku_daemon.runner.memory import Memory
from kohaku_daemon.runner.outbox import Outbox
from kohaku_daemon.runner.readings import Instruments
from kohaku_daemon.runner.scratch import ScratchFolders
from kohaku_daemon.runner.streams import LogStreams
from kohaku_daemon.runner.tidying import Tidying
from kohaku_daemon.runner.upkeep import Upkeep
from kohaku_daemon.runner.uplink import Uplink
from kohaku_daemon.store.vault import Vault
from protocol.home import config_dir, data_dir
from protocol.models.node import BackendInfo

_log = logging.getLogger(__name__)

VAULT: Final = "vault.sqlite"
LOGS: Final = "logs"
SCRATCH: Final = "scratch"
BACKENDS: Final = "backends"
#: Seconds the last commit may take when the runner stops; a restart finds out what it missed.
_COMMIT_S: Final = 5.0


async def run_runner(
    config: RunnerConfig, *, stop: asyncio.Event, on_ready: Callable[[str], None]
) -> None:
    """Run until ``stop`` is set; tasks go on after it.

    ``on_ready`` gets the node's name once the fate of every launch of an earlier run is
    known, whether or not the host can be reached.

    Raises:
        KohakuError: The vault cannot be opened or read, another runner has it, or the
            configuration does not fit this machine.
    """
    config.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    memory = Memory(Vault.open(config.data / VAULT))
    _let_tasks_pass(config.data)
    try:
        images = image_source(config, memory)
        kit = await _open_backends(config, images)
        try:
            await Runner(config, memory, kit, images).run(stop, on_ready)
        finally:
            for backend in kit.backends.values():
                await backend.close()
    finally:
        memory.close()


class Runner:
    """The parts of one runner. Lives for one run."""

    def __init__(
        self, config: RunnerConfig, memory: Memory, kit: BackendKit, images: HostImages
    ) -> None:
        clock = SystemClock()
        self._config = config
        self._memory = memory
        self._loop = NodeLoop(NodeEngine(), memory, clock)
        outbox = Outbox()
        logs = TaskLogs(
            config.data / LOGS,
            cap=config.log_cap,
            keep_s=config.log_keep_s,
            most=config.log_total,
            node=config.name,
        )
        self._effects = Effects(
            kit.backends,
            node=config.name,
            there=[info.name for info in kit.infos],
            default_backend=kit.default,
            scratch=ScratchFolders(config.data / SCRATCH),
            logs=logs,
            post=self._loop.post,
            report=outbox.put,
        )
        self._disks = Disks(
            {
                "what it started": config.data,
                "output": config.data / LOGS,
                "scratch folders": config.data / SCRATCH,
                "what backends know": config.data / BACKENDS,
            }
        )
        self._images = ImageKeeper(kit.backends, self._loop.live, images.sweep)
        self._instruments = Instruments(
            Prober(
                disks=(config.data,),
                max_tasks=config.max_tasks,
                cores=config.cores,
                memory=config.memory,
            ),
            kit.backends,
            kit.infos,
            kit.default,
            self._loop.live,
            self._list_troubles,
            self._images.readings,
        )
        self._watch = BackendWatch(
            kit, config.default_backend, self._take_backends, self._effects.hurry
        )
        self._upkeep = Upkeep(logs, self._disks, self._loop, clock, on_well=self._watch.hurry)
        self._tidying = Tidying(kit.backends, self._list_wanted)
        link = Link(
            node=config.name,
            instance=secrets.token_hex(16),
            loop=self._loop,
            outbox=outbox,
            planner=self._effects,
            instrument=self._instruments,
            streams=LogStreams(config.host, memory.credential, logs, self._loop, config.name),
            asker=images,
            puller=self._images,
        )
        self._uplink = Uplink(config, memory, link)

    async def run(self, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
        """Run until ``stop`` is set. Raises as ``run_runner``."""
        try:
            records = self._memory.launches()
            # What is wrong with the configuration is told before anything is touched.
            await self._instruments.inventory()
            async with asyncio.TaskGroup() as jobs:
                parts = [
                    jobs.create_task(self._loop.run(records, self._effects), name="loop"),
                    jobs.create_task(self._instruments.run(), name="readings"),
                    jobs.create_task(self._upkeep.run(), name="upkeep"),
                    jobs.create_task(self._watch.run(), name="backends"),
                    jobs.create_task(self._tidy(), name="tidying"),
                    jobs.create_task(self._images.run(), name="images"),
                ]
                link = jobs.create_task(self._keep_link(records, on_ready), name="uplink")
                await stop.wait()
                _log.info("stopping; tasks go on")
                link.cancel()
                await asyncio.wait({link})
                # The loop is still there to take note of what finishes in time.
                await self._effects.close()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_COMMIT_S):
                        await self._loop.committed()
                for part in parts:
                    part.cancel()
        finally:
            await self._effects.close()
            await self._images.close()
            self._instruments.close()

    async def _keep_link(
        self, records: Iterable[LaunchRecord], on_ready: Callable[[str], None]
    ) -> None:
        await self._loop.recovered()
        self._effects.clean_up(records)
        await self._instruments.read()
        on_ready(self._config.name)
        await self._uplink.run()

    async def _tidy(self) -> NoReturn:
        # With a copied data folder we would know of no launch that came later, and end it. The
        # host takes only the node itself in, and that only with its launches found again.
        await self._loop.taken_in()
        await self._tidying.run()

    def _list_wanted(self) -> list[Handle]:
        """Give the handle of each launch that has to be found again, or is being removed."""
        return [*self._loop.handles(), *self._effects.leaving()]

    def _take_backends(self, infos: tuple[BackendInfo, ...], default: str) -> None:
        self._effects.use([info.name for info in infos], default)
        self._instruments.set_backends(infos, default)

    def _list_troubles(self) -> tuple[str, ...]:
        """Say why nothing new can be started here. Of a disk that is full once is enough."""
        troubles = self._disks.troubles
        if self._loop.trouble and not troubles:
            return (f"it cannot keep what it starts: {self._loop.trouble}",)
        return troubles


def image_source(config: RunnerConfig, memory: Memory) -> HostImages:
    """Make what backends get images from."""
    downloads = Downloads(config.host, memory.credential, config.data / ENVIRONMENTS)
    return HostImages(downloads, config.shared_dir)


async def _open_backends(config: RunnerConfig, images: HostImages) -> BackendKit:
    place = BackendPlace(
        node=config.name,
        state_root=config.data / BACKENDS,
        # This node's secrets, and those of other daemons and people of the same user and home.
        hidden=(config.data, data_dir(), config_dir()),
        shared_dir=config.shared_dir,
        images=images,
        process=config.process,
        docker=config.docker,
    )
    return await open_backends(config.backends, config.default_backend, place)


def _let_tasks_pass(data: Path) -> None:
    """Let tasks reach their scratch folders, as users of their own under a runner that is root.

    They may pass through the folders above, and list none of them: what is secret there has
    modes of its own. Above our own folders nothing is touched.
    """
    if os.geteuid() != 0:
        return
    ours = data_dir()
    for folder in (data / SCRATCH, data / BACKENDS, data, *data.parents):
        if folder.is_relative_to(ours) or folder.is_relative_to(data):
            folder.mkdir(exist_ok=True)
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IXGRP)
