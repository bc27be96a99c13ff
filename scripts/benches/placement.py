"""A placement decision of the host's core, in this process: no wire, no store, no other load."""

from __future__ import annotations

import random
import statistics
import time
from typing import Final

from frame import Row, begin_rounds, percentile
from readings import inventory

from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.core.cluster.actions import SendOrder
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import (
    PlacementDue,
    RunnerRegistered,
    RunnerReported,
    SubmitAsked,
)
from kohaku_daemon.core.cluster.records import NodeRecord
from kohaku_daemon.core.cluster.state import ClusterState
from protocol.ids import NodeName, TaskId, UserName
from protocol.messages.runner import AttemptReport, AttemptState, OrderStart
from protocol.messages.task import SubmitTask
from protocol.models.access import Role
from protocol.models.task import Cause, Exit, TaskSpec
from protocol.snowflake import SnowflakeSource

_NODES: Final = 1000
_GPUS: Final = 8
#: Of a node's 64: what runs fills all of its cores and GPUs.
_CORES_EACH: Final = 8
_WAITING: Final = 10_000
_OWNERS: Final = 10
#: In each round.
_ENDS: Final = 200
_NOW: Final = 1_800_000_000.0
#: What people wait for: most want a slice, some half a node, some a label that few nodes have.
_WANTED: Final = (
    TaskSpec(command=("train",), cores=_CORES_EACH, gpus=1, memory=32 * 2**30),
    TaskSpec(command=("train",), cores=_CORES_EACH, gpus=1, labels={"rack": "3"}),
    TaskSpec(command=("train",), cores=32, gpus=4, memory=200 * 2**30),
    TaskSpec(command=("prepare",), cores=4, memory=16 * 2**30),
)


def placement(rounds: int) -> list[Row]:
    """One task ends on a full cluster of 1,000 nodes with 10,000 waiting: the decisions."""
    chance = random.Random(1)
    engine = _full_cluster(chance)
    medians, tails = [], []
    placed = 0
    for number in begin_rounds(rounds, warm_up=True):
        times, found = _end_some(engine, chance)
        placed += found
        if number:
            medians.append(statistics.median(times))
            tails.append(percentile(times, 0.99))
        _submit(engine, chance, _ENDS)
    if not placed:
        raise RuntimeError("tasks ended and nothing that waits was placed")
    what = f"CPU of the decisions when a task ends, {_NODES:,} nodes, {_WAITING:,} waiting"
    note = f"{placed} tasks placed after {_ENDS * (rounds + 1)} ends"
    return [
        Row("placement.decision", f"{what}, p50", "ms", medians, goal="<= 5 ms", note=note),
        Row("placement.decision_p99", f"{what}, p99", "ms", tails, goal="<= 5 ms"),
    ]


def _full_cluster(chance: random.Random) -> ClusterEngine:
    engine = ClusterEngine(ClusterState("bench"), SnowflakeSource(1))
    engine.state.fleet.load(
        [
            NodeRecord(
                name=NodeName(f"node{number}"),
                credential=f"digest-{number}",
                joined_at=_NOW,
                labels={"rack": str(number // 40)},
            )
            for number in range(_NODES)
        ],
        _NOW,
    )
    for name in list(engine.state.fleet.nodes):
        there = inventory(name, max_tasks=256, gpus=_GPUS)
        engine.handle(RunnerRegistered(name, "10.0.0.1", there, ()), _NOW)
    filler = TaskSpec(command=("train",), cores=_CORES_EACH, gpus=1)
    _ask(engine, "filler", filler, _NODES * _GPUS)
    _place(engine)
    _submit(engine, chance, _WAITING)
    return engine


def _submit(engine: ClusterEngine, chance: random.Random, count: int) -> None:
    """Have so many wait: half of them in arrays, of several owners."""
    left = count
    while left:
        size = min(left, chance.choice((1, 1, 1, 50)))
        owner = f"user{chance.randrange(_OWNERS)}"
        _ask(engine, owner, chance.choice(_WANTED), size)
        left -= size
    _place(engine)


def _place(engine: ClusterEngine) -> None:
    """Place all that fits: one pass places a part of it."""
    engine.handle(PlacementDue(), _NOW)
    while not engine.state.backlog.is_settled:
        engine.handle(PlacementDue(), _NOW)


def _ask(engine: ClusterEngine, owner: str, spec: TaskSpec, size: int) -> None:
    request_id = f"bench-{random.getrandbits(64):016x}"
    request = SubmitTask(request_id=request_id, spec=spec, array=size if size > 1 else 0)
    actor = Actor(UserName(owner), Role.USER)
    engine.handle(SubmitAsked(actor, request, request_id.encode()), _NOW)


def _end_some(engine: ClusterEngine, chance: random.Random) -> tuple[list[float], int]:
    """End tasks one by one; give the ms each took to be decided on, and how many were placed."""
    running = [task for task in engine.state.tasks.values() if task.node]
    times, placed = [], 0
    for task in chance.sample(running, _ENDS):
        report = AttemptReport(
            task=TaskId(task.id),
            attempt=task.attempt,
            state=AttemptState.ENDED,
            at=_NOW,
            started_at=_NOW,
            exit=Exit(Cause.EXITED, code=0),
        )
        began = time.thread_time()
        engine.handle(RunnerReported(NodeName(task.node), (report,)), _NOW)
        actions = engine.handle(PlacementDue(), _NOW)
        times.append((time.thread_time() - began) * 1e3)
        placed += sum(
            isinstance(action, SendOrder) and isinstance(action.order, OrderStart)
            for action in actions
        )
    return times, placed
