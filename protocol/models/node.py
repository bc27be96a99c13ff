"""Nodes as both ends see them: hardware, readings, standing in the cluster."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from protocol.ids import NodeName, TaskId
from protocol.models.environment import ImageReading


class NodeState(StrEnum):
    """Whether the node's runner is there."""

    ONLINE = "online"
    #: The link is down; its tasks go on and are expected back.
    OFFLINE = "offline"
    #: Down for longer than the grace; its tasks are ``lost``.
    LOST = "lost"


class NumaNode(msgspec.Struct, frozen=True, omit_defaults=True):
    """One NUMA node, from /sys/devices/system/node."""

    number: int
    cores: tuple[int, ...] = ()
    #: Bytes.
    memory: int = 0
    #: Relative distance to each NUMA node, itself included (10 is local; ACPI SLIT).
    distances: tuple[int, ...] = ()


class Gpu(msgspec.Struct, frozen=True, omit_defaults=True):
    """One GPU, from NVML."""

    #: As the driver counts now. May change at a reboot; the UUID does not.
    index: int
    uuid: str
    name: str = ""
    #: Bytes.
    memory: int = 0
    #: PCI address, such as ``00000000:3B:00.0``.
    bus: str = ""
    #: NUMA node it is attached to, if the kernel knows.
    numa: int | None = None
    #: Divided into MIG instances, which are claimed in its place and listed like GPUs.
    divided: bool = False
    #: UUID of the GPU that this is a MIG instance of; empty for a whole GPU. Then ``index`` is
    #: ``mig_index`` of the instance's place on that GPU.
    parent: str = ""


def mig_index(parent: int, place: int) -> int:
    """Give the index of a MIG instance: 100 for the first of GPU 0, 203 for the fourth of GPU 1.

    It follows from the GPU's own, so that dividing one GPU anew renumbers no other's instances.
    """
    return 100 * (parent + 1) + place


def mig_place(gpu: Gpu) -> str:
    """Write where a MIG instance is as NVIDIA's tools do, such as ``0:3``; empty for whole GPUs."""
    return f"{gpu.index // 100 - 1}:{gpu.index % 100}" if gpu.parent else ""


class BackendInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one backend of a runner can do."""

    name: str
    #: False if it cannot start tasks now; ``message`` says why.
    healthy: bool = True
    message: str = ""
    #: What keeps a task apart from the machine, such as ``namespaces, cgroup v2``.
    isolation: str = ""
    #: Names out of: cores, memory, pause, adopt, gpus, numa.
    enforces: tuple[str, ...] = ()
    #: Folders of the node below which tasks may mount; more of them only for operators.
    mount_roots: tuple[str, ...] = ()
    #: What operators may have of it, out of: privileged, any-mount.
    allows: tuple[str, ...] = ()


class Inventory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a machine has. Changes rarely; sent when a runner registers."""

    hostname: str = ""
    system: str = ""
    kernel: str = ""
    architecture: str = ""
    #: Of this boot of the machine (/proc/sys/kernel/random/boot_id).
    boot_id: str = ""
    #: Of the runner's software.
    version: str = ""
    #: Numbers of the cores the runner may use.
    cores: tuple[int, ...] = ()
    #: Bytes a task may claim of this node.
    memory: int = 0
    numa: tuple[NumaNode, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    backends: tuple[BackendInfo, ...] = ()
    default_backend: str = ""
    #: How many tasks may be on the node at once, whatever they claim.
    max_tasks: int = 256

    @property
    def claimable_gpus(self) -> tuple[Gpu, ...]:
        """Whole GPUs that are not divided, and MIG instances."""
        return tuple(gpu for gpu in self.gpus if not gpu.divided)


class DiskReading(msgspec.Struct, frozen=True):
    """One file system the runner writes to. Bytes."""

    path: str
    total: int
    free: int


class GpuProcess(msgspec.Struct, frozen=True, omit_defaults=True):
    """A process that uses a GPU."""

    pid: int
    #: Name of its program, as the kernel has it: 15 bytes at most.
    name: str = ""
    #: Bytes of the GPU's memory; None where the driver does not say.
    memory: int | None = None
    #: The task it belongs to; None for a process of the machine that is no task's.
    task: TaskId | None = None


class GpuReading(msgspec.Struct, frozen=True, omit_defaults=True):
    """One GPU at one moment."""

    uuid: str
    #: Per cent of time that a kernel ran.
    used_percent: float = 0.0
    #: Bytes.
    memory_used: int = 0
    #: Degrees Celsius.
    temperature: float | None = None
    #: Watts.
    power: float | None = None
    power_limit: float | None = None
    fan_percent: float | None = None
    #: Why it is out of service, such as ``lost``; empty if it answers.
    fault: str = ""
    #: Those that use it, by the most memory first.
    processes: tuple[GpuProcess, ...] = ()
    #: How many more there are.
    processes_left_out: int = 0


class TaskReading(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one task uses."""

    task: TaskId
    #: Seconds of CPU since its start.
    cpu_s: float = 0.0
    #: Cores' worth of CPU since the last reading, times 100.
    cpu_percent: float = 0.0
    #: Bytes.
    memory: int = 0
    processes: int = 0


class Readings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node at one moment: a heartbeat. Never stored."""

    #: UTC seconds by the node's clock.
    at: float = 0.0
    #: 0 to 100 over all cores since the last reading.
    cpu_percent: float = 0.0
    load_1m: float = 0.0
    #: Bytes.
    memory_total: int = 0
    memory_available: int = 0
    swap_used: int = 0
    disks: tuple[DiskReading, ...] = ()
    #: Degrees Celsius by sensor.
    temperatures: dict[str, float] = msgspec.field(default_factory=dict)
    gpus: tuple[GpuReading, ...] = ()
    tasks: tuple[TaskReading, ...] = ()
    #: Why the node can take nothing new, such as a full disk, one sentence each.
    troubles: tuple[str, ...] = ()
    #: Environments that are here or on their way; those used last if there are many.
    images: tuple[ImageReading, ...] = ()


class Claimed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What tasks hold of a node together."""

    tasks: int = 0
    cores: int = 0
    memory: int = 0
    gpus: int = 0


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node as people see it."""

    name: NodeName
    state: NodeState
    #: Finishes what it has and gets nothing new.
    draining: bool = False
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    inventory: Inventory = Inventory()
    claimed: Claimed = Claimed()
    #: None while offline or before the first heartbeat.
    readings: Readings | None = None
    #: UTC seconds; 0.0 for never since the host started.
    seen_at: float = 0.0
    joined_at: float = 0.0
