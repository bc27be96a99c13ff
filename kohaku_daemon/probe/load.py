"""How busy the machine is: CPU, memory, disks.

Knows: /proc/stat, /proc/loadavg, /proc/meminfo, statvfs.
Does not know: which task is to blame; that is read from cgroups by the backend.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kohaku_daemon.probe.files import parse_fields, read_text
from protocol.models.node import DiskReading


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """What all cores together did since the machine started, in the kernel's ticks."""

    busy: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    total: int
    #: What programs could still get without swapping.
    available: int
    swap_used: int


class CpuMeter:
    """Says how busy the cores were between two readings."""

    def __init__(self, root: Path) -> None:
        self._path = root / "proc/stat"
        self._last = CpuTimes()
        self.percent()  # so that the first answer is about now, not about weeks

    def percent(self) -> float:
        """Give 0 to 100 over all cores since the last call; 0.0 if no tick has passed."""
        last, self._last = self._last, parse_stat(read_text(self._path))
        total = self._last.total - last.total
        # Ticks of steal and iowait can run backwards (man 5 proc).
        busy = min(max(self._last.busy - last.busy, 0), total)
        return 100.0 * busy / total if total > 0 else 0.0


def parse_stat(text: str) -> CpuTimes:
    """Read the first line of /proc/stat.

    user nice system idle iowait irq softirq steal, then guest and guest_nice, which are
    counted in user and nice already. Waiting for a disk is idle.
    """
    name, *ticks = (text.splitlines() or [""])[0].split() or [""]
    if name != "cpu":
        return CpuTimes()
    numbers = [int(tick) for tick in ticks[:8]]
    return CpuTimes(busy=sum(numbers) - sum(numbers[3:5]), total=sum(numbers))


def read_load(root: Path) -> float:
    """Give the average over the last minute of processes that ran or wanted to."""
    first, *_ = read_text(root / "proc/loadavg").split() or ["0"]
    return float(first)


def read_memory(root: Path) -> Memory:
    """Read how much memory there is and how much is left, of the whole machine."""
    fields = parse_fields(read_text(root / "proc/meminfo"))
    return Memory(
        total=fields.get("MemTotal", 0),
        available=fields.get("MemAvailable", 0),
        swap_used=fields.get("SwapTotal", 0) - fields.get("SwapFree", 0),
    )


def read_disks(paths: Iterable[Path]) -> tuple[DiskReading, ...]:
    """Read the file systems that these paths are on; one that does not answer is left out."""
    readings = []
    for path in paths:
        try:
            stat = os.statvfs(path)
        except OSError:
            continue
        readings.append(
            DiskReading(
                path=str(path),
                total=stat.f_blocks * stat.f_frsize,
                # What is left for ordinary users: root's reserve is not for tasks.
                free=stat.f_bavail * stat.f_frsize,
            )
        )
    return tuple(readings)
