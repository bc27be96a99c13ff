"""THE TABLE of methods: the single source of what may be said on a connection.

Dispatch, permission checks, the typed client, ``kohaku call``, the list in SPEC.md and the
permission tests are derived from it. To add a method: one entry here, one handler in
``kohaku_daemon/host/handlers``, one test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

import msgspec

from protocol.messages import cluster, environment, hello, node, runner, stream, task
from protocol.models.access import Role
from protocol.models.node import Readings

P = TypeVar("P", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)
I = TypeVar("I", bound=msgspec.Struct)  # noqa: E741  the item type, beside params and result


class Door(StrEnum):
    """Where a method may be called: by clients on /v1/ws, or by runners on /v1/runner."""

    CLIENT = "client"
    RUNNER = "runner"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Method(Generic[P, R]):
    """One entry: what it takes, what it answers, who may call it."""

    name: str
    params: type[P]
    result: type[R]
    summary: str
    #: Least role of a client. Runners are let in by their credential.
    least: Role = Role.VIEWER
    door: Door = Door.CLIENT
    #: Changes something: leaves a line in the audit log with its actor.
    audited: bool = False


@dataclass(frozen=True, slots=True)
class StreamingMethod(Method[P, R], Generic[P, R, I]):
    """An entry that answers with items, as many as the caller gave credit for, then a result."""

    item: type[I] = field(kw_only=True)


HELLO: Final = Method(
    "hello", hello.Hello, hello.Welcome, "First call: versions and who is calling.",
    least=Role.ANONY, door=Door.BOTH,
)  # fmt: skip
WHOAMI: Final = Method("whoami", hello.WhoAmI, hello.Identity, "Who the token in use belongs to.")
STATUS: Final = Method(
    "cluster.status", cluster.GetStatus, cluster.Status, "The cluster at a glance, problems first."
)
WATCH: Final = StreamingMethod(
    "watch", cluster.Watch, cluster.WatchEnded, "A snapshot, then changes, resumable.",
    item=cluster.Update,
)  # fmt: skip
EVENT_LIST: Final = Method(
    "event.list", cluster.ListEvents, cluster.EventPage, "A page of the cluster's diary."
)
TASK_SUBMIT: Final = Method(
    "task.submit", task.SubmitTask, task.Submitted, "Make a task or a batch of them.",
    least=Role.USER, audited=True,
)  # fmt: skip
TASK_LIST: Final = Method("task.list", task.ListTasks, task.TaskPage, "A page of tasks.")
TASK_SHOW: Final = Method("task.show", task.OneTask, task.TaskResult, "One task with its history.")
TASK_EXPLAIN: Final = Method(
    "task.explain", task.OneTask, task.ExplainResult, "Why a task is where it is, node by node."
)
TASK_WAIT: Final = Method(
    "task.wait", task.WaitTasks, task.WaitResult, "Answered when tasks are over."
)
TASK_KILL: Final = Method(
    "task.kill", task.SteerTasks, task.SteerResult, "End tasks.", least=Role.USER, audited=True
)
TASK_PAUSE: Final = Method(
    "task.pause", task.SteerTasks, task.SteerResult, "Hold running tasks still.",
    least=Role.USER, audited=True,
)  # fmt: skip
TASK_RESUME: Final = Method(
    "task.resume", task.SteerTasks, task.SteerResult, "Let paused tasks go on.",
    least=Role.USER, audited=True,
)  # fmt: skip
TASK_RETRY: Final = Method(
    "task.retry", task.RetryTask, task.Retried, "Try again what was lost or did not complete.",
    least=Role.USER, audited=True,
)  # fmt: skip
TASK_LOGS: Final = Method(
    "task.logs", stream.OpenLogs, stream.Ticket, "A ticket to read a task's output.",
    least=Role.USER,
)  # fmt: skip
BATCH_LIST: Final = Method("batch.list", task.ListBatches, task.BatchPage, "A page of batches.")
BATCH_SHOW: Final = Method(
    "batch.show", task.OneBatch, task.BatchResult, "One batch with its tasks counted by state."
)
NODE_LIST: Final = Method("node.list", node.ListNodes, node.NodeList, "All nodes.")
NODE_SHOW: Final = Method("node.show", node.OneNode, node.NodeResult, "One node with readings.")
NODE_DRAIN: Final = Method(
    "node.drain", node.OneNode, node.NodeResult, "Let a node finish and give it nothing new.",
    least=Role.OPERATOR, audited=True,
)  # fmt: skip
NODE_UNDRAIN: Final = Method(
    "node.undrain", node.OneNode, node.NodeResult, "Give a node work again.",
    least=Role.OPERATOR, audited=True,
)  # fmt: skip
NODE_LABEL: Final = Method(
    "node.label", node.LabelNode, node.NodeResult, "Set and unset a node's labels.",
    least=Role.OPERATOR, audited=True,
)  # fmt: skip
NODE_REMOVE: Final = Method(
    "node.remove", node.RemoveNode, node.NodeResult, "Take a node out and revoke its credential.",
    least=Role.ADMIN, audited=True,
)  # fmt: skip
NODE_JOIN_TOKEN: Final = Method(
    "node.join_token", node.MakeJoinToken, node.JoinToken, "A token that lets a runner join.",
    least=Role.ADMIN, audited=True,
)  # fmt: skip

ENVIRONMENT_LIST: Final = Method(
    "environment.list", environment.ListEnvironments, environment.EnvironmentList,
    "A page of environments.",
)  # fmt: skip
ENVIRONMENT_SHOW: Final = Method(
    "environment.show", environment.OneEnvironment, environment.EnvironmentResult,
    "One environment: its versions, and the nodes that have the newest.",
)  # fmt: skip
ENVIRONMENT_CREATE: Final = Method(
    "environment.create", environment.CreateEnvironment, environment.EnvironmentResult,
    "Begin to make an environment on the host machine.", least=Role.OPERATOR, audited=True,
)  # fmt: skip
ENVIRONMENT_PACK: Final = Method(
    "environment.pack", environment.OneEnvironment, environment.EnvironmentResult,
    "Begin to pack an environment as it is now, as a new version.",
    least=Role.OPERATOR, audited=True,
)  # fmt: skip
ENVIRONMENT_PULL: Final = Method(
    "environment.pull", environment.PullEnvironment, environment.Pulling,
    "Bring the newest version to nodes ahead of tasks.", least=Role.OPERATOR, audited=True,
)  # fmt: skip
ENVIRONMENT_SHELL: Final = Method(
    "environment.shell", environment.OpenShell, stream.Ticket,
    "A ticket to run a command in an environment.", least=Role.OPERATOR, audited=True,
)  # fmt: skip
ENVIRONMENT_DELETE: Final = Method(
    "environment.delete", environment.OneEnvironment, environment.EnvironmentResult,
    "Remove an environment and all its versions.", least=Role.OPERATOR, audited=True,
)  # fmt: skip
REGISTRY_LIST: Final = Method(
    "registry.list", environment.ListRegistries, environment.RegistryList,
    "The registries the cluster has a name at.", least=Role.OPERATOR,
)  # fmt: skip
REGISTRY_SET: Final = Method(
    "registry.set", environment.SetRegistry, environment.RegistryList,
    "Have nodes pull from a registry under a name.", least=Role.OPERATOR, audited=True,
)  # fmt: skip
REGISTRY_REMOVE: Final = Method(
    "registry.remove", environment.OneRegistry, environment.RegistryList,
    "Have nodes pull from a registry as strangers again.", least=Role.OPERATOR, audited=True,
)  # fmt: skip

RUNNER_JOIN: Final = Method(
    "runner.join", runner.Join, runner.Joined, "Become a node, with a join token.",
    least=Role.ANONY, door=Door.RUNNER, audited=True,
)  # fmt: skip
RUNNER_REGISTER: Final = Method(
    "runner.register", runner.Register, runner.Registered,
    "What the node has, and every launch its runner knows.", door=Door.RUNNER,
)  # fmt: skip
RUNNER_ORDERS: Final = StreamingMethod(
    "runner.orders", runner.TakeOrders, runner.OrdersEnded, "Orders to the runner, in groups.",
    door=Door.RUNNER, item=runner.Orders,
)  # fmt: skip
RUNNER_REPORT: Final = Method(
    "runner.report", runner.Report, runner.Reported,
    "Launches that changed; answered once committed.", door=Door.RUNNER,
)  # fmt: skip
RUNNER_HEARTBEAT: Final = Method(
    "runner.heartbeat", Readings, runner.HeartbeatTaken, "The node's readings.", door=Door.RUNNER
)
RUNNER_PIN_IMAGE: Final = Method(
    "runner.pin_image", runner.PinImage, runner.PinnedImage,
    "Which image a batch runs, and whom to pull it as.", door=Door.RUNNER,
)  # fmt: skip

_ALL: Final = tuple(entry for entry in list(globals().values()) if isinstance(entry, Method))

#: Every method by its name on the wire.
METHODS: Final[Mapping[str, Method[Any, Any]]] = MappingProxyType(
    {entry.name: entry for entry in _ALL}
)
