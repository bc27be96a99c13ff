"""NUMA nodes: which cores and how much memory lie together, and how far apart.

Knows: /sys/devices/system/node and the NUMA node of a PCI device.
Does not know: what is placed where.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from kohaku_daemon.probe.files import parse_fields, parse_list, read_number, read_text
from protocol.models.node import NumaNode

_FOLDER: Final = re.compile(r"node(\d+)")
_PCI: Final = re.compile(r"(?:[0-9a-f]{4})?([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")


def read_numa(root: Path, cores: Collection[int], memory: int) -> tuple[NumaNode, ...]:
    """Give the NUMA nodes by number, each with those of ``cores`` that lie on it.

    A machine with one or none is one node that has all ``cores`` and all ``memory`` bytes: what
    was plugged into a running virtual machine may be missing in the node's own count (seen
    with Linux 6.18: MemTotal 24.6 GB, node 0's 4.2 GB).
    """
    nodes = [
        _read_node(folder, int(match[1]), cores)
        for folder in (root / "sys/devices/system/node").glob("node*")
        if (match := _FOLDER.fullmatch(folder.name))
    ]
    if len(nodes) < 2:
        return (NumaNode(0, tuple(sorted(cores)), memory, (10,)),)
    return tuple(sorted(nodes, key=lambda node: node.number))


def read_pci_numa(root: Path, bus: str) -> int | None:
    """Give the NUMA node that a PCI device is attached to, if the kernel knows.

    ``bus`` is an address as NVML writes it, ``00000000:3B:00.0``; the kernel's has four
    digits of domain and small letters.
    """
    match = _PCI.fullmatch(bus.lower())
    if match is None:
        return None
    number = read_number(root / "sys/bus/pci/devices" / match[1] / "numa_node")
    return None if number is None or number < 0 else number  # -1: firmware did not say


def parse_node_memory(meminfo: str) -> int:
    """Give the bytes of memory of ``nodeN/meminfo``: lines of ``Node 0 MemTotal:  123 kB``."""
    lines = (line.split(maxsplit=2)[-1] for line in meminfo.splitlines())
    return parse_fields("\n".join(lines)).get("MemTotal", 0)


def _read_node(folder: Path, number: int, cores: Collection[int]) -> NumaNode:
    here = parse_list(read_text(folder / "cpulist"))
    return NumaNode(
        number=number,
        cores=tuple(core for core in here if core in cores),
        memory=parse_node_memory(read_text(folder / "meminfo")),
        distances=tuple(map(int, read_text(folder / "distance").split())),
    )
