"""Small makers of the values that tests of the core speak about, with defaults that fit.

Knows: what a plausible spec, node or cluster looks like.
Does not know: what any test wants to find out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import RunnerRegistered, SubmitAsked
from kohaku_daemon.core.cluster.records import BatchRecord, NodeRecord
from kohaku_daemon.core.cluster.state import ClusterState
from protocol.ids import NodeName, UserName
from protocol.messages.task import SubmitTask
from protocol.models.access import Role
from protocol.models.node import BackendInfo, Gpu, Inventory, NumaNode
from protocol.models.target import parse_target
from protocol.models.task import TaskSpec
from protocol.snowflake import SnowflakeSource

#: UTC seconds at which tests begin.
NOW: Final = 1_800_000_000.0
GIB: Final = 2**30
PROCESS: Final = BackendInfo("process")


def a_user(name: str = "ada", role: Role = Role.USER) -> Actor:
    """Make somebody at the door."""
    return Actor(UserName(name), role)


OPERATOR: Final = a_user("olga", Role.OPERATOR)


def a_spec(**changes: Any) -> TaskSpec:
    """Make a spec that asks for one core."""
    return replace(TaskSpec(command=("true",)), **changes)


def an_inventory(
    cores: int = 4,
    memory: int = 8 * GIB,
    gpus: int = 0,
    numa: int = 1,
    backends: Iterable[BackendInfo] = (PROCESS,),
    max_tasks: int = 256,
) -> Inventory:
    """Make a machine whose cores, memory and GPUs are spread evenly over its NUMA nodes."""
    backends = tuple(backends)
    share = cores // numa
    return Inventory(
        cores=tuple(range(cores)),
        memory=memory,
        numa=tuple(
            NumaNode(number, tuple(range(number * share, (number + 1) * share)), memory // numa)
            for number in range(numa)
        ),
        gpus=tuple(Gpu(index, f"GPU-{index}", numa=index * numa // gpus) for index in range(gpus)),
        backends=backends,
        default_backend=backends[0].name if backends else "",
        max_tasks=max_tasks,
    )


def a_node(
    name: str = "n1",
    inventory: Inventory | None = None,
    *,
    labels: dict[str, str] | None = None,
    draining: bool = False,
) -> NodeRecord:
    """Make a node that has registered before."""
    return NodeRecord(
        name=NodeName(name),
        credential=f"digest-of-{name}",
        joined_at=NOW - 1000,
        draining=draining,
        labels=labels or {},
        inventory=inventory or an_inventory(),
    )


def a_cluster(nodes: Iterable[NodeRecord] = (), *, online: bool = True) -> ClusterEngine:
    """Make a host that knows these nodes, with their runners there unless told otherwise."""
    engine = ClusterEngine(ClusterState("test"), SnowflakeSource(1))
    nodes = list(nodes)
    engine.state.fleet.load(nodes, NOW)
    for node in nodes if online else ():
        engine.handle(registered(node.name, node.inventory), NOW)
    return engine


def registered(name: str, inventory: Inventory, **more: Any) -> RunnerRegistered:
    """Make the event of a runner whose link is open."""
    attempts = more.pop("attempts", ())
    return RunnerRegistered(NodeName(name), "10.0.0.1", inventory, attempts, **more)


def a_submission(
    spec: TaskSpec | None = None,
    *,
    request_id: str = "request-1",
    targets: Iterable[str] = (),
    actor: Actor | None = None,
    earlier: BatchRecord | None = None,
    **more: Any,
) -> SubmitAsked:
    """Make a submission, with its targets as people write them."""
    request = SubmitTask(
        request_id=request_id,
        spec=spec or a_spec(),
        targets=tuple(map(parse_target, targets)),
        **more,
    )
    content = msgspec.msgpack.encode(replace(request, request_id=""))
    return SubmitAsked(
        actor or a_user(), request, hashlib.sha3_256(content).digest(), earlier=earlier
    )
