"""All readers together: what a runner tells of its machine.

Knows: which reader fills which field.
Does not know: when to read, and whom to tell.

Reading takes well under a millisecond without GPUs. It may still block, on a disk that
hangs or a driver that resets, and so belongs into a thread; one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from msgspec.structs import replace

from kohaku_daemon.clock import Clock, SystemClock
from kohaku_daemon.probe import load
from kohaku_daemon.probe.files import read_text
from kohaku_daemon.probe.gpus import Gpus
from kohaku_daemon.probe.machine import Machine, read_machine
from kohaku_daemon.probe.numa import read_numa
from kohaku_daemon.probe.temperatures import Thermometers
from protocol.errors import BadRequest
from protocol.models.node import BackendInfo, GpuReading, Inventory, Readings, TaskReading

#: What the machine and the runner need for themselves, unless the configuration says how much.
_KEPT_BACK: Final = 0.05


class Look(NamedTuple):
    """What is seen of the machine at one moment."""

    readings: Readings
    #: The text of /proc/PID/cgroup of each process that uses a GPU: whose it is, backends know.
    cgroups: dict[int, str]
    #: The last inventory lacks a GPU that is there now.
    has_new_gpu: bool


class Prober:
    """Reads one machine."""

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        disks: Iterable[Path] = (),
        max_tasks: int = 256,
        cores: Sequence[int] | None = None,
        memory: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Get ready to read the machine under ``root``.

        ``disks`` are any paths on the file systems to report. ``cores`` and ``memory`` (bytes)
        are what tasks may claim; None for all the cores and the memory less 5 %.
        """
        self._root = root
        self._disks = tuple(disks)
        self._max_tasks = max_tasks
        self._cores = cores
        self._memory = memory
        self._clock = clock or SystemClock()
        self._cpu = load.CpuMeter(root)
        self._thermometers = Thermometers(root)
        self._gpus = Gpus(root)

    def inventory(
        self, backends: Iterable[BackendInfo] = (), default_backend: str = "", version: str = ""
    ) -> Inventory:
        """Describe the machine. What was plugged in since the last time is found.

        Raises:
            BadRequest: The configuration offers cores that this process may not use.
        """
        machine = read_machine(self._root)
        cores = self._offered(machine)
        self._thermometers = Thermometers(self._root)
        return Inventory(
            hostname=machine.hostname,
            system=machine.system,
            kernel=machine.kernel,
            architecture=machine.architecture,
            boot_id=machine.boot_id,
            version=version,
            cores=cores,
            memory=int(machine.memory * (1 - _KEPT_BACK)) if self._memory is None else self._memory,
            numa=read_numa(self._root, cores, machine.memory),
            gpus=self._gpus.inventory(),
            backends=tuple(backends),
            default_backend=default_backend,
            max_tasks=self._max_tasks,
        )

    def read(self, tasks: tuple[TaskReading, ...] = ()) -> Look:
        """Read what changes. CPU per cent is since the last call; GPUs are the inventory's."""
        memory = load.read_memory(self._root)
        gpus, cgroups = self._read_gpus()
        readings = Readings(
            at=self._clock.now(),
            cpu_percent=self._cpu.percent(),
            load_1m=load.read_load(self._root),
            memory_total=memory.total,
            memory_available=memory.available,
            swap_used=memory.swap_used,
            disks=load.read_disks(self._disks),
            temperatures=self._thermometers.read(),
            gpus=gpus,
            tasks=tasks,
        )
        return Look(readings, cgroups, self._gpus.has_new())

    def close(self) -> None:
        """Let go of the GPU driver."""
        self._gpus.close()

    def _read_gpus(self) -> tuple[tuple[GpuReading, ...], dict[int, str]]:
        """Read the GPUs, and the cgroups of what uses them; what is over by then is left out.

        The cgroups come right after the pids: later a pid may be another process's.
        """
        gpus = self._gpus.read()
        pids = {process.pid for gpu in gpus for process in gpu.processes}
        texts = {pid: read_text(self._root / f"proc/{pid}/cgroup") for pid in pids}
        cgroups = {pid: text for pid, text in texts.items() if text}
        there = (
            replace(gpu, processes=tuple(one for one in gpu.processes if one.pid in cgroups))
            for gpu in gpus
        )
        return tuple(there), cgroups

    def _offered(self, machine: Machine) -> tuple[int, ...]:
        if self._cores is None:
            return machine.cores
        missing = sorted(set(self._cores) - set(machine.cores))
        if missing:
            raise BadRequest(
                f"cores {', '.join(map(str, missing))} are not among those this runner may use",
                hint=f"set cores to some of {', '.join(map(str, machine.cores))}",
            )
        return tuple(sorted(set(self._cores)))
