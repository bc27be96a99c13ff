"""Reads the machine and what runs on it, again and again.

Knows: how often, in which thread, how much at once.
Does not know: how anything is read (``probe``, the backends), whom it is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NoReturn

from msgspec.structs import replace

import kohaku_daemon
from kohaku_daemon.backends.base import Backend
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.probe.prober import Look, Prober
from protocol.ids import TaskId
from protocol.models.environment import ImageReading
from protocol.models.node import BackendInfo, GpuProcess, Inventory, Readings, TaskReading

_log = logging.getLogger(__name__)

_PERIOD_S: Final = 2.0
#: Launches read at once, and seconds one may take.
_AT_ONCE: Final = 16
_LONGEST_S: Final = 5.0
#: Launches in one heartbeat: some 60 bytes each, in a message of at most 256 KiB.
_MOST_TASKS: Final = 2000


class Instruments:
    """What is known of this node."""

    def __init__(
        self,
        prober: Prober,
        backends: Mapping[str, Backend],
        infos: Iterable[BackendInfo],
        default_backend: str,
        live: Callable[[], list[LaunchRecord]],
        troubles: Callable[[], tuple[str, ...]],
        images: Callable[[], tuple[ImageReading, ...]] = tuple,
    ) -> None:
        self._prober = prober
        self._backends = backends
        self._infos = tuple(infos)
        self._default_backend = default_backend
        #: Set and replaced when backends have changed, or a GPU has come: an inventory said before
        #: is out of date.
        self.changed = asyncio.Event()
        self._live = live
        self._troubles = troubles
        self._images = images
        # One thread: the prober is used by one at a time, and a disk that hangs must not
        # hold up those who use the shared pool.
        self._thread = ThreadPoolExecutor(1, "probe")
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        #: Launches whose reading has failed in a way that was logged.
        self._failed: set[str] = set()
        #: Why the machine could not be read the last time.
        self._trouble = ""
        #: As of the last time; a heartbeat says how old it is.
        self._latest = Readings()

    @property
    def latest(self) -> Readings:
        """What was read last, with what is wrong and which images are here at this moment."""
        return replace(self._latest, troubles=self._troubles(), images=self._images())

    def set_backends(self, infos: Iterable[BackendInfo], default_backend: str) -> None:
        """Have the inventory say this of the backends from now on."""
        self._infos = tuple(infos)
        self._default_backend = default_backend
        self._outdate()

    async def inventory(self) -> Inventory:
        """Describe the machine as it is now.

        Raises:
            BadRequest: The configuration offers cores that this process may not use.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._thread,
            self._prober.inventory,
            self._infos,
            self._default_backend,
            kohaku_daemon.version(),
        )

    async def run(self) -> NoReturn:
        """Read until cancelled."""
        while True:
            await self.read()
            await asyncio.sleep(_PERIOD_S)

    async def read(self) -> None:
        """Read everything once."""
        records = self._live()[:_MOST_TASKS]
        found = await asyncio.gather(*map(self._read_launch, records))
        self._failed &= {record.key for record in records}
        tasks = tuple(reading for reading in found if reading is not None)
        loop = asyncio.get_running_loop()
        try:
            look = await loop.run_in_executor(self._thread, self._prober.read, tasks)
            self._latest = self._name_owners(look)
        except Exception as error:
            # Old figures are told as old; no reason to end a runner. Said once.
            if repr(error) != self._trouble:
                _log.warning("cannot read the machine", exc_info=error)
            self._trouble = repr(error)
        else:
            self._trouble = ""
            if look.has_new_gpu:
                self._outdate()

    def close(self) -> None:
        """Let go of the machine once the reading under way is done; does not wait for it."""
        self._thread.submit(self._prober.close)
        self._thread.shutdown(wait=False)

    def _outdate(self) -> None:
        """Let those who were told an inventory know that there is another one."""
        before, self.changed = self.changed, asyncio.Event()
        before.set()

    def _name_owners(self, look: Look) -> Readings:
        """Say of each process that uses a GPU which task it belongs to."""
        if not look.cgroups:
            return look.readings
        live = {record.launch.task for record in self._live()}
        owners = {pid: self._find_owner(pid, cgroup, live) for pid, cgroup in look.cgroups.items()}

        def own(process: GpuProcess) -> GpuProcess:
            return replace(process, task=owners[process.pid])

        gpus = (
            replace(gpu, processes=tuple(map(own, gpu.processes))) for gpu in look.readings.gpus
        )
        return replace(look.readings, gpus=tuple(gpus))

    def _find_owner(self, pid: int, cgroup: str, live: Collection[TaskId]) -> TaskId | None:
        """Ask the backends; what none of them knows, or what names no live task, is no task's.

        A process may say of itself what it likes where nothing but its environment tells.
        """
        for backend in self._backends.values():
            task = backend.owner(pid, cgroup)
            if task in live:
                return task
        return None

    async def _read_launch(self, record: LaunchRecord) -> TaskReading | None:
        handle = record.handle
        backend = self._backends.get(handle.backend) if handle is not None else None
        if handle is None or backend is None:
            return None
        try:
            async with self._at_once, asyncio.timeout(_LONGEST_S):
                return await backend.read(handle)
        except Exception as error:
            # A task without figures is a small loss, and every two seconds is often enough
            # to say so only once.
            if record.key not in self._failed:
                self._failed.add(record.key)
                _log.warning("cannot read a launch", exc_info=error, extra={"launch": record.key})
            return None
