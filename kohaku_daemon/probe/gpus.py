"""NVIDIA GPUs, from the driver's library NVML.

Knows: nvidia-ml-py and its errors; that GPUs fall off the bus while others go on.
Does not know: who holds which GPU, GPUs of other makers.

The library is started once and kept: without nvidia-persistenced its start takes seconds.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from kohaku_daemon.probe.numa import read_pci_numa
from protocol.models.node import Gpu, GpuReading

_log: Final = logging.getLogger(__name__)


class Gpus:
    """The GPUs of one machine. None, without complaint, where there is no driver.

    One thread at a time.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._nvml: Any = None
        #: NVML's handles of every GPU ever seen, by UUID; None for one to be asked for again.
        self._handles: dict[str, Any] = {}
        #: Why there is no library, as told last.
        self._absent = ""

    def inventory(self) -> tuple[Gpu, ...]:
        """Look which GPUs are there now. One that does not answer is left out."""
        if not self._start():
            return ()
        nvml = self._nvml
        self._handles = dict.fromkeys(self._handles)
        gpus = []
        for index in range(self._count()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                gpu = self._describe(index, handle)
            except nvml.NVMLError as error:
                _log.warning("GPU %d does not answer: %s", index, error)
                continue
            self._handles[gpu.uuid] = handle
            gpus.append(gpu)
        return tuple(gpus)

    def read(self) -> tuple[GpuReading, ...]:
        """Read every GPU that an inventory ever found; one that went missing has a fault."""
        return tuple(self._read_one(uuid) for uuid in self._handles)

    def close(self) -> None:
        """Let go of the library."""
        if self._nvml is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml = None
        self._handles = {}

    def _start(self) -> bool:
        if self._nvml is not None:
            return True
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return False
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            # The usual case on a machine without GPUs; worth a line, once, and no warning.
            if str(error) != self._absent:
                self._absent = str(error)
                _log.info("no NVIDIA GPUs: %s", error)
            return False
        self._nvml = nvml
        return True

    def _count(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError as error:
            _log.warning("the NVIDIA driver does not answer: %s", error)
            self._nvml = None  # it may have been reloaded: start anew next time
            return 0

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
        )

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


def _text(value: str | bytes) -> str:
    """NVML's wrapper decodes what functions return but not what lies in structures."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)
