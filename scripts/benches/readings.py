"""What a simulated node says of itself: a machine as labs have it, and its readings.

Knows: plausible figures; with 8 GPUs and 10 tasks a heartbeat has some 2.1 kB on the wire.
Does not know: who sends them.
"""

from __future__ import annotations

import random
import time

from protocol.ids import TaskId
from protocol.models.node import (
    BackendInfo,
    DiskReading,
    Gpu,
    GpuReading,
    Inventory,
    NumaNode,
    Readings,
    TaskReading,
)

_GIB = 2**30
#: Of two sockets.
_CORES = 64


def inventory(name: str, *, max_tasks: int, gpus: int) -> Inventory:
    """Make a two-socket machine."""
    half = _CORES // 2
    return Inventory(
        hostname=name,
        system="Debian GNU/Linux 12",
        kernel="6.1.0",
        architecture="x86_64",
        boot_id="00000000-0000-4000-8000-000000000000",
        version="bench",
        cores=tuple(range(_CORES)),
        memory=512 * _GIB,
        numa=tuple(
            NumaNode(number, tuple(range(number * half, (number + 1) * half)), 256 * _GIB)
            for number in range(2)
        ),
        gpus=tuple(
            Gpu(index, _uuid(index), "Simulated GPU", 80 * _GIB, numa=index * 2 // gpus)
            for index in range(gpus)
        ),
        backends=(BackendInfo("process", isolation="none: tasks end at once"),),
        default_backend="process",
        max_tasks=max_tasks,
    )


def readings(*, gpus: int, tasks: int) -> Readings:
    """Make a heartbeat; the figures change as real ones do."""
    some = random.random()
    return Readings(
        at=time.time(),
        cpu_percent=100 * some,
        load_1m=_CORES * some,
        memory_total=512 * _GIB,
        memory_available=int(400 * _GIB * some),
        disks=(DiskReading("/", 2000 * _GIB, int(900 * _GIB * some)),),
        temperatures={"package 0": 40 + 30 * some, "package 1": 41 + 30 * some},
        gpus=tuple(
            GpuReading(_uuid(index), 100 * some, int(70 * _GIB * some), 60.0, 300 * some, 400.0)
            for index in range(gpus)
        ),
        tasks=tuple(
            TaskReading(TaskId(250627900548579329 + task), 3600 * some, 800 * some, _GIB, 12)
            for task in range(tasks)
        ),
    )


def _uuid(index: int) -> str:
    return f"GPU-{index:08x}-0000-4000-8000-000000000000"
