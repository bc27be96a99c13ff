"""What can happen to the host, as data. Requests of people are events too, and are answered.

Time is not in them: ``handle`` is given it. Randomness is: digests and ids of secrets are
made by the shell and arrive as values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.core.cluster.ended import EndedTasks
from kohaku_daemon.core.cluster.records import BatchRecord
from protocol.ids import BatchId, NodeName, TaskId
from protocol.messages.runner import AttemptReport
from protocol.messages.task import SubmitTask
from protocol.models.environment import Version
from protocol.models.node import Inventory, Readings
from protocol.models.task import TaskState


@dataclass(frozen=True, slots=True)
class SubmitAsked:
    """Answered with ``Submitted``."""

    actor: Actor
    request: SubmitTask
    #: Of the request, its id left out.
    digest: bytes
    #: What the store has under this owner and request id.
    earlier: BatchRecord | None = None
    #: What the store has of those in ``after`` that are not live: a task's state; of a batch
    #: a state in which it did not complete if one of its tasks is in such, else COMPLETED.
    known: Mapping[int, TaskState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RetryAsked:
    """Tasks of one batch are to be tried again. Answered with ``Retried``."""

    actor: Actor
    request_id: str
    digest: bytes
    source: BatchRecord
    #: The one that is named; None for all.
    task: TaskId | None
    #: Those of them that the store has as ended.
    ended: EndedTasks
    #: What the store has under the owner of the tasks and this request id.
    earlier: BatchRecord | None = None


class Verb(StrEnum):
    """What can be asked of a task that exists."""

    KILL = "kill"
    PAUSE = "pause"
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class SteerAsked:
    """Answered with ``SteerResult``."""

    actor: Actor
    verb: Verb
    tasks: tuple[TaskId, ...] = ()
    #: Those of them that the store has as ended.
    ended: Mapping[TaskId, TaskState] = field(default_factory=dict)
    #: All of this batch that have not ended, in place of ``tasks``.
    batch: BatchId | None = None


@dataclass(frozen=True, slots=True)
class WholeAsked:
    """Somebody needs all tasks of a batch. Answered with None once they are made."""

    batch: BatchId


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """Answered with the node."""

    actor: Actor
    node: str
    draining: bool


@dataclass(frozen=True, slots=True)
class LabelAsked:
    """Answered with the node."""

    actor: Actor
    node: str
    set: Mapping[str, str]
    unset: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RemoveAsked:
    """Answered with the node as it was."""

    actor: Actor
    node: str
    force: bool


@dataclass(frozen=True, slots=True)
class JoinTokenAsked:
    """Answered with the time it expires, UTC seconds."""

    actor: Actor
    digest: str
    prefix: str
    uses: int
    lasts_s: float
    node: str


@dataclass(frozen=True, slots=True)
class JoinAsked:
    """A runner wants to become a node. Answered with its name."""

    token_digest: str
    node: str
    credential_digest: str
    labels: Mapping[str, str]
    address: str


@dataclass(frozen=True, slots=True)
class RunnerRegistered:
    """A runner's link is open and it has said all it knows. Answered with its name."""

    node: NodeName
    address: str
    inventory: Inventory
    attempts: tuple[AttemptReport, ...]
    #: Tasks among them that the store has as ended.
    ended: frozenset[TaskId] = frozenset()
    #: Those of them that ended after the attempt that is told of had begun.
    begun: frozenset[TaskId] = frozenset()


@dataclass(frozen=True, slots=True)
class RunnerReported:
    """Launches changed. Answered with None once committed."""

    node: NodeName
    reports: tuple[AttemptReport, ...]


@dataclass(frozen=True, slots=True)
class RunnerBeat:
    """A heartbeat came."""

    node: NodeName
    readings: Readings


@dataclass(frozen=True, slots=True)
class RunnerGone:
    """A runner's link is closed."""

    node: NodeName
    reason: str


@dataclass(frozen=True, slots=True)
class CreateAsked:
    """An environment is to be made. Answered with it."""

    actor: Actor
    name: str
    image: str


@dataclass(frozen=True, slots=True)
class PackAsked:
    """An environment is to be packed as it is now. Answered with it."""

    actor: Actor
    name: str


@dataclass(frozen=True, slots=True)
class DeleteAsked:
    """An environment and all its versions are to go. Answered with it as it was."""

    actor: Actor
    name: str


@dataclass(frozen=True, slots=True)
class PullAsked:
    """The newest version is to be brought to nodes. Answered with their names."""

    actor: Actor
    name: str
    #: Empty for all that can run containers.
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EnvironmentMade:
    """The container of an environment is there, or could not be made."""

    name: str
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class EnvironmentPacked:
    """A version of an environment was packed, or could not be."""

    name: str
    #: Without who asked for it; None if there is none.
    version: Version | None = None
    trouble: str = ""
    #: There is no container any more that could be packed.
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class FilesRemoved:
    """Files of versions that were dropped are gone, and what else was to go."""

    name: str
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RegistrySetAsked:
    """The cluster has a name at a registry. Answered with all of them."""

    actor: Actor
    registry: str
    username: str
    #: Of which only the registry and those who pull from it are told.
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RegistryRemoveAsked:
    """The cluster has no name at a registry any more. Answered with those that are left."""

    actor: Actor
    registry: str


@dataclass(frozen=True, slots=True)
class PinAsked:
    """A node wants to know which image a batch runs. Answered with that, once it is kept."""

    node: NodeName
    batch: BatchId
    reference: str
    #: What the node found; empty if it has not looked.
    digest: str = ""


@dataclass(frozen=True, slots=True)
class StoreFailing:
    """Nothing can be stored at present. Told once until it is well again."""

    #: In words for everybody; may be empty.
    reason: str


@dataclass(frozen=True, slots=True)
class StoreWell:
    """Everything that waited was stored."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed: look for what is overdue."""

    #: Seconds of a clock that nobody sets, which tells time that has passed from a clock that
    #: was set; None where that cannot happen.
    steady: float | None = None


@dataclass(frozen=True, slots=True)
class WorkDue:
    """Others have had their turn: do the next piece of what takes long."""


@dataclass(frozen=True, slots=True)
class PlacementDue:
    """All events at hand are handled: place what waits."""


ClusterEvent = (
    SubmitAsked
    | RetryAsked
    | SteerAsked
    | WholeAsked
    | DrainAsked
    | LabelAsked
    | RemoveAsked
    | JoinTokenAsked
    | JoinAsked
    | RunnerRegistered
    | RunnerReported
    | RunnerBeat
    | RunnerGone
    | CreateAsked
    | PackAsked
    | DeleteAsked
    | PullAsked
    | EnvironmentMade
    | EnvironmentPacked
    | FilesRemoved
    | RegistrySetAsked
    | RegistryRemoveAsked
    | PinAsked
    | StoreFailing
    | StoreWell
    | Ticked
    | WorkDue
    | PlacementDue
)
