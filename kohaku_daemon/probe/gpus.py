"""NVIDIA GPUs, from the driver's library NVML.

Knows: nvidia-ml-py and its errors; that GPUs fall off the bus while others go on; that a GPU
may be divided into MIG instances, which are GPUs of their own to everyone else.
Does not know: who holds which GPU, whose its processes are, GPUs of other makers.

The library is started once and kept: without nvidia-persistenced its start takes seconds.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from msgspec.structs import replace

from kohaku_daemon.probe.files import read_text
from kohaku_daemon.probe.numa import read_pci_numa
from protocol.models.node import Gpu, GpuProcess, GpuReading, mig_index

_log: Final = logging.getLogger(__name__)

#: NVML, as the driver brings it and nvidia-ml-py opens it.
_LIBRARY: Final = "libnvidia-ml.so.1"
#: Processes told of one GPU, and of all together: some 50 bytes each, in a message of at most
#: 256 KiB.
_MOST_PROCESSES: Final = 32
_MOST_PROCESSES_IN_ALL: Final = 512


class Gpus:
    """The GPUs of one machine. None, without complaint, where there is no driver.

    One thread at a time.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._nvml: Any = None
        #: NVML's handles of every GPU ever seen, by UUID; None for one to be asked for again.
        self._handles: dict[str, Any] = {}
        #: What the last inventory found.
        self._listed: frozenset[str] = frozenset()
        #: What was there the last time, and not in it.
        self._unlisted: frozenset[str] = frozenset()
        #: Why there is no library, as told last.
        self._absent = ""

    def inventory(self) -> tuple[Gpu, ...]:
        """Look which GPUs are there now. One that does not answer is left out."""
        self._listed = frozenset()
        if not self._start():
            return ()
        self._handles = dict.fromkeys(self._handles)
        gpus = []
        for index in range(self._count()):
            for gpu, handle in self._look(index):
                self._handles[gpu.uuid] = handle
                gpus.append(gpu)
        self._listed = frozenset(gpu.uuid for gpu in gpus)
        return tuple(gpus)

    def has_new(self) -> bool:
        """Say, once, that a GPU or a MIG instance is there that the last inventory did not find.

        One that has gone is not asked about: it keeps its place, with a fault, for when it is
        back. One that inventories cannot describe is told once and not for ever.
        """
        unlisted = self._uuids() - self._listed
        has_come = not unlisted <= self._unlisted
        self._unlisted = unlisted
        return has_come

    def read(self) -> tuple[GpuReading, ...]:
        """Read every GPU that an inventory ever found; one that went missing has a fault.

        Whose its processes are nobody knows here.
        """
        if self._handles:
            self._start()  # the driver may be back
        return _bound(self._read_one(uuid) for uuid in self._handles)

    def close(self) -> None:
        """Let go of the library."""
        if self._nvml is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml = None
        self._handles = {}
        self._listed = frozenset()

    def _start(self) -> bool:
        if self._nvml is not None:
            return True
        try:
            # A machine without the driver is spared the 2 MB that the package takes.
            ctypes.CDLL(_LIBRARY)
        except OSError:
            return self._be_absent("there is no driver")
        import pynvml as nvml

        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            return self._be_absent(str(error))
        self._nvml = nvml
        # Those of an earlier start are void.
        self._handles = dict.fromkeys(self._handles)
        return True

    def _be_absent(self, why: str) -> Literal[False]:
        # The usual case on a machine without GPUs; worth a line, once, and no warning.
        if why != self._absent:
            self._absent = why
            _log.info("no NVIDIA GPUs: %s", why)
        return False

    def _count(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError as error:
            _log.warning("the NVIDIA driver does not answer: %s", error)
            self._nvml = None  # it may have been reloaded: start anew next time
            return 0

    def _uuids(self) -> frozenset[str]:
        nvml = self._nvml
        found = set[str]()
        for index in range(self._count() if nvml is not None else 0):
            with suppress(nvml.NVMLError):  # it does not answer, as its reading says
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                there = [handle, *(instance for _, instance in self._instances(handle))]
                found.update(_text(nvml.nvmlDeviceGetUUID(one)) for one in there)
        return frozenset(found)

    def _look(self, index: int) -> list[tuple[Gpu, Any]]:
        """Describe a GPU and its MIG instances, with their handles; none if it does not answer."""
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            whole = self._describe(index, handle)
            found = [(whole, handle)]
            for place, instance in self._instances(handle):
                gpu = self._describe(mig_index(index, place), instance)
                # It has no address of its own: it is where its parent is.
                gpu = replace(gpu, parent=whole.uuid, bus=whole.bus, numa=whole.numa)
                found.append((gpu, instance))
        except nvml.NVMLError as error:
            _log.warning("GPU %d does not answer: %s", index, error)
            return []
        return found

    def _describe(self, index: int, handle: Any) -> Gpu:
        nvml = self._nvml
        pci = self._maybe(nvml.nvmlDeviceGetPciInfo, handle)
        bus = "" if pci is None else _text(pci.busId)
        return Gpu(
            index=index,
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(self._maybe(nvml.nvmlDeviceGetName, handle) or ""),
            memory=self._memory(handle).total,
            bus=bus,
            numa=read_pci_numa(self._root, bus),
            divided=self._is_divided(handle),
        )

    def _is_divided(self, handle: Any) -> bool:
        nvml = self._nvml
        # The mode now, and the one after the next reset.
        modes = self._maybe(nvml.nvmlDeviceGetMigMode, handle)
        return modes is not None and modes[0] == nvml.NVML_DEVICE_MIG_ENABLE

    def _instances(self, handle: Any) -> list[tuple[int, Any]]:
        """Give the handles of a GPU's MIG instances with their places on it, in order."""
        nvml = self._nvml
        if not self._is_divided(handle):
            return []
        most = self._maybe(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        found = []
        for place in range(most):
            try:
                found.append((place, nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)))
            except nvml.NVMLError as error:
                # Places without an instance, also between others.
                if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
                    raise
        return found

    def _read_one(self, uuid: str) -> GpuReading:
        nvml = self._nvml
        if nvml is None:
            return GpuReading(uuid=uuid, fault="the driver does not answer")
        try:
            handle = self._handles[uuid]
            if handle is None:
                # It may be back after a reset, under another handle.
                handle = self._handles[uuid] = nvml.nvmlDeviceGetHandleByUUID(uuid)
            rates = self._maybe(nvml.nvmlDeviceGetUtilizationRates, handle)
            return GpuReading(
                uuid=uuid,
                used_percent=0.0 if rates is None else float(rates.gpu),
                memory_used=self._memory(handle).used,
                temperature=self._temperature(handle),
                power=_watts(self._maybe(nvml.nvmlDeviceGetPowerUsage, handle)),
                power_limit=_watts(self._maybe(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
                fan_percent=_float(self._maybe(nvml.nvmlDeviceGetFanSpeed, handle)),
                processes=self._processes(handle),
            )
        except nvml.NVMLError as error:
            self._handles[uuid] = None
            gone = (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_NOT_FOUND)
            return GpuReading(uuid=uuid, fault="lost" if error.value in gone else str(error))

    def _memory(self, handle: Any) -> _Memory:
        nvml = self._nvml
        # Version 2 does not count what the driver keeps for itself; drivers before 510 lack it.
        info = self._maybe(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        info = info or self._maybe(nvml.nvmlDeviceGetMemoryInfo, handle)
        return _Memory(0, 0) if info is None else _Memory(int(info.total), int(info.used))

    def _temperature(self, handle: Any) -> float | None:
        nvml = self._nvml
        # The second is the old one: it leaves the library with CUDA 14 (nvidia-ml-py 13).
        for function in (nvml.nvmlDeviceGetTemperatureV, nvml.nvmlDeviceGetTemperature):
            degrees = self._maybe(function, handle, nvml.NVML_TEMPERATURE_GPU)
            if degrees is not None:
                return float(degrees)
        return None

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...]:
        """List what computes or draws on a GPU, by the most memory first.

        A divided GPU lists none: each is its instance's.
        """
        if self._is_divided(handle):
            return ()
        memory: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics", "MPSCompute"):
            for one in self._list_processes(kind, handle):
                memory[one.pid] = max(memory.get(one.pid) or 0, one.usedGpuMemory or 0) or None
        found = [
            GpuProcess(pid, read_text(self._root / f"proc/{pid}/comm"), used)
            for pid, used in memory.items()
        ]
        return tuple(sorted(found, key=lambda one: (-(one.memory or 0), one.pid)))

    def _list_processes(self, kind: str, handle: Any) -> Any:
        # The versions by name: what has none raises an error that is not NVML's if the driver
        # is older. The second is of drivers before 510, with the same structure.
        for version in ("v3", "v2"):
            function = getattr(self._nvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}", None)
            found = None if function is None else self._maybe(function, handle)
            if found is not None:
                return found
        return ()

    def _maybe(self, function: Callable[..., Any], *args: object) -> Any:
        """Ask for what this GPU or this version of the driver may not know: then None.

        Whatever else goes wrong is about the GPU as a whole and is raised.
        """
        nvml = self._nvml
        try:
            return function(*args)
        except nvml.NVMLError as error:
            if error.value in (
                nvml.NVML_ERROR_NOT_SUPPORTED,
                nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
                nvml.NVML_ERROR_NO_PERMISSION,
                nvml.NVML_ERROR_INVALID_ARGUMENT,
                nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
                nvml.NVML_ERROR_NO_DATA,
                nvml.NVML_ERROR_DEPRECATED,
            ):
                return None
            raise


class _Memory(NamedTuple):
    """Bytes."""

    total: int
    used: int


def _bound(readings: Iterator[GpuReading]) -> tuple[GpuReading, ...]:
    """Leave out processes of GPUs that have many."""
    bounded = []
    left = _MOST_PROCESSES_IN_ALL
    for reading in readings:
        most = min(left, _MOST_PROCESSES)
        more = len(reading.processes) - most
        if more > 0:
            shown = reading.processes[:most]
            bounded.append(replace(reading, processes=shown, processes_left_out=more))
        else:
            bounded.append(reading)
        left -= len(bounded[-1].processes)
    return tuple(bounded)


def _text(value: str | bytes) -> str:
    """NVML's wrapper decodes what functions return but not what lies in structures."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)
