"""What runners say: numbers that cannot be are refused, words are cut."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from kohaku_daemon.host.reported import (
    LONGEST_REMARK,
    check_inventory,
    check_readings,
    tidy,
)
from protocol.errors import BadRequest
from protocol.ids import TaskId
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.models.node import (
    DiskReading,
    Gpu,
    GpuProcess,
    GpuReading,
    NumaNode,
    Readings,
    TaskReading,
)
from protocol.models.task import Cause, Exit
from tests.support.builders import an_inventory

NAN, INF = float("nan"), float("inf")
REPORT = AttemptReport(task=TaskId(7), attempt=1, state=AttemptState.ENDED)


def test_what_a_machine_has_passes() -> None:
    check_inventory(an_inventory())
    numa = (NumaNode(0, (0, 1), 2**33), NumaNode(1, (2, 3), 2**33))
    gpus = (Gpu(0, "GPU-a", memory=2**34), Gpu(1, "GPU-b", memory=2**34))
    check_inventory(replace(an_inventory(), cores=tuple(range(256)), numa=numa, gpus=gpus))
    check_inventory(replace(an_inventory(), cores=(), memory=0, max_tasks=0))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"cores": (0, 1, 1)}, "1 twice among its cores"),
        ({"cores": (-1,)}, "-1 among its cores"),
        ({"cores": (9000,)}, "9000 among its cores"),
        ({"memory": -1}, "-1 is no size"),
        ({"memory": 2**63}, "is no size"),
        ({"max_tasks": -1}, "max_tasks"),
        ({"numa": (NumaNode(0), NumaNode(0))}, "0 twice among its NUMA nodes"),
        ({"numa": (NumaNode(0, memory=-5),)}, "-5 is no size"),
        ({"gpus": (Gpu(0, "a"), Gpu(1, "a"))}, "two GPUs with one UUID"),
        ({"gpus": (Gpu(0, "a"), Gpu(0, "b"))}, "0 twice among its indices of GPUs"),
    ],
)
def test_an_inventory_no_machine_has_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        check_inventory(replace(an_inventory(), **wrong))


def test_readings_that_are_numbers_pass() -> None:
    check_readings(Readings())
    check_readings(
        Readings(
            at=1.8e9,
            cpu_percent=12.5,
            temperatures={"core": -3.0},
            disks=(DiskReading("/", 2**40, 2**39),),
            gpus=(GpuReading("a", 99.0, 2**34, temperature=80.0, power=None),),
            tasks=(TaskReading(TaskId(1), 2.0, 150.0, 2**30, 4),),
        )
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"at": NAN},
        {"cpu_percent": INF},
        {"load_1m": -INF},
        {"temperatures": {"a": 1.0, "b": NAN}},
        {"memory_total": -1},
        {"memory_available": 2**63},
        {"swap_used": -1},
        {"disks": (DiskReading("/", 1, -1),)},
        {"gpus": (GpuReading("a", NAN),)},
        {"gpus": (GpuReading("a", power=INF),)},
        {"gpus": (GpuReading("a", memory_used=-1),)},
        {"gpus": (GpuReading("a", processes_left_out=-1),)},
        {"gpus": (GpuReading("a", processes=(GpuProcess(-1),)),)},
        {"gpus": (GpuReading("a", processes=(GpuProcess(1, memory=2**64),)),)},
        {"tasks": (TaskReading(TaskId(1), cpu_s=NAN),)},
        {"tasks": (TaskReading(TaskId(1), memory=2**64 - 1),)},
        {"tasks": (TaskReading(TaskId(-1)),)},
    ],
)
def test_readings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="the readings"):
        check_readings(Readings(**wrong))


def test_a_report_that_may_be_kept_is_kept_as_it_is() -> None:
    report = replace(REPORT, at=5.0, exit=Exit(Cause.EXITED, 255, message="m"), note="n")
    assert tidy(report) is report
    assert tidy(REPORT) is REPORT


def test_long_words_are_cut_and_times_that_are_none_are_left_out() -> None:
    long = "w" * (LONGEST_REMARK + 1)
    exit_ = Exit(Cause.START_FAILED, message=long)
    tidied = tidy(replace(REPORT, at=NAN, started_at=INF, note=long, exit=exit_))
    assert (tidied.at, tidied.started_at) == (0.0, 0.0)
    assert tidied.note == "w" * (LONGEST_REMARK - 3) + "..."
    assert tidied.exit is not None
    assert len(tidied.exit.message) == LONGEST_REMARK
    exactly = "w" * LONGEST_REMARK
    assert tidy(replace(REPORT, note=exactly)).note == exactly


@pytest.mark.parametrize(
    "wrong",
    [
        Exit(Cause.EXITED, 256),
        Exit(Cause.EXITED, -1),
        Exit(Cause.SIGNALLED, signal=0),
        Exit(Cause.SIGNALLED, signal=65),
        Exit(Cause.OOM, oom_kills=-1),
        Exit(Cause.OOM, oom_kills=2**63),
    ],
)
def test_an_end_that_cannot_be_is_refused_with_its_task(wrong: Exit) -> None:
    with pytest.raises(BadRequest, match="task 7"):
        tidy(replace(REPORT, exit=wrong))
