"""What a runner tells of itself: whose the processes are that use its GPUs, and what has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from kohaku_daemon.backends.base import Backend
from kohaku_daemon.backends.mock import MockBackend, MockWorld
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.probe.prober import Look, Prober
from kohaku_daemon.runner.readings import Instruments
from protocol.ids import BatchId, TaskId
from protocol.models.node import GpuProcess, GpuReading, Readings, TaskReading
from protocol.models.task import TaskSpec


class Owning(MockBackend):
    """Owns the processes of which it is told."""

    def __init__(self, owners: dict[str, int]) -> None:
        super().__init__(MockWorld())
        self._owners = owners

    def owner(self, pid: int, cgroup: str) -> TaskId | None:
        task = self._owners.get(cgroup)
        return None if task is None else TaskId(task)


@dataclass
class ScriptedProber:
    """Sees what a test says."""

    look: Look
    asked: list[tuple[TaskReading, ...]] = field(default_factory=list)

    def read(self, tasks: tuple[TaskReading, ...] = ()) -> Look:
        self.asked.append(tasks)
        return self.look

    def close(self) -> None:
        return


def a_look(*gpus: GpuReading, has_new_gpu: bool = False, **cgroups: str) -> Look:
    return Look(
        Readings(gpus=gpus), {int(pid[1:]): text for pid, text in cgroups.items()}, has_new_gpu
    )


def instruments_of(prober: ScriptedProber, *backends: Backend, live: int) -> Instruments:
    launch = Launch(
        task=TaskId(live), attempt=1, batch=BatchId(live), spec=TaskSpec(command=("x",))
    )
    return Instruments(
        cast("Prober", prober),
        {str(number): backend for number, backend in enumerate(backends)},
        (),
        "0",
        lambda: [LaunchRecord(launch=launch)],
        lambda: (),
    )


async def test_processes_of_gpus_are_told_with_the_task_that_a_backend_names() -> None:
    gpus = (
        GpuReading("GPU-a", processes=(GpuProcess(1), GpuProcess(2), GpuProcess(3))),
        GpuReading("GPU-b", processes=(GpuProcess(2),), processes_left_out=4),
    )
    prober = ScriptedProber(a_look(*gpus, p1="/docker/x", p2="/kohaku/7", p3="/user.slice"))
    backends = Owning({"/docker/x": 7}), Owning({"/kohaku/7": 7})
    instruments = instruments_of(prober, *backends, live=7)
    await instruments.read()
    first, second = instruments.latest.gpus
    assert first.processes == (
        GpuProcess(1, task=TaskId(7)), GpuProcess(2, task=TaskId(7)), GpuProcess(3),
    )  # fmt: skip
    assert (second.processes, second.processes_left_out) == ((GpuProcess(2, task=TaskId(7)),), 4)
    instruments.close()


async def test_a_process_that_names_a_task_which_is_not_here_is_no_tasks() -> None:
    prober = ScriptedProber(a_look(GpuReading("a", processes=(GpuProcess(1),)), p1="liar"))
    instruments = instruments_of(prober, Owning({"liar": 8}), Owning({"liar": 7}), live=7)
    await instruments.read()
    assert instruments.latest.gpus[0].processes == (GpuProcess(1, task=TaskId(7)),)
    other = instruments_of(prober, Owning({"liar": 8}), live=7)
    await other.read()
    assert other.latest.gpus[0].processes == (GpuProcess(1),)
    instruments.close()
    other.close()


async def test_an_inventory_is_out_of_date_when_a_gpu_has_come() -> None:
    prober = ScriptedProber(a_look())
    instruments = instruments_of(prober, live=1)
    told = instruments.changed
    await instruments.read()
    assert not told.is_set()
    prober.look = a_look(has_new_gpu=True)
    await instruments.read()
    assert told.is_set()
    assert not instruments.changed.is_set(), "the next change is told anew"
    instruments.close()
