"""What the host remembers of things, as it is stored.

Knows: the fields of every stored record. Field names and meanings are the schema: add
fields with defaults, never rename; what changes more goes through ``store.migrations``.
Does not know: files, SQL, who may read what.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import cast

import msgspec

from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.models.access import Role
from protocol.models.environment import EnvironmentState, Version, WantedImage
from protocol.models.node import Inventory
from protocol.models.target import Target
from protocol.models.task import Change, Claim, Exit, TaskSpec, TaskState


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One submission: written once, with all its tasks, before it is answered."""

    id: BatchId
    owner: UserName
    #: Of the client; unique per owner.
    request_id: str
    #: SHA3-256 of the request, so that a request id used twice for different things is noticed.
    digest: bytes
    spec: TaskSpec
    targets: tuple[Target, ...] = ()
    rows: tuple[dict[str, str], ...] = ()
    size: int = 1
    #: Task ids as runs of consecutive numbers, (first, count).
    runs: tuple[tuple[int, int], ...] = ()
    created_at: float = 0.0
    #: Tasks and batches that must complete first. If one ended otherwise, these tasks end
    #: without having begun.
    after: tuple[TaskId, ...] = ()
    gang: bool = False
    #: What its tasks run in, chosen when it was submitted; None for what each node itself is.
    image: WantedImage | None = None
    #: Digest of the image that ``image`` names by reference, from the first node that asked.
    pinned: str = ""
    #: Who submitted it is an operator, or more.
    trusted: bool = False
    #: Of a batch made by a retry: the place of each task in the batch it was made from, whose
    #: ``size`` it keeps, in order; ``targets`` and ``rows`` are those of these tasks. Empty for
    #: all places.
    places: tuple[int, ...] = ()
    #: Of a batch made by a retry: the batch it was made from, and the tasks that its own stand
    #: for, in order, as runs.
    source: BatchId | None = None
    replaces: tuple[tuple[int, int], ...] = ()
    #: Who asked for it; empty for its owner.
    by: UserName = UserName("")

    def ids(self) -> Iterator[TaskId]:
        """Give the id of every task, in order."""
        return _each(self.runs)

    def replaced(self) -> Iterator[TaskId]:
        """Give the id of the task that each of its own stands for, in order."""
        return _each(self.replaces)

    def position(self, index: int) -> int:
        """Give where the target and the row of the task at a place are."""
        return bisect_left(self.places, index) if self.places else index

    def row(self, index: int) -> dict[str, str]:
        """Give the variables that the task at a place has of its own."""
        return self.rows[self.position(index)] if self.rows else {}

    @property
    def count(self) -> int:
        """How many tasks it has: fewer than ``size`` if it retries some of another's."""
        return len(self.places) or self.size


def _each(runs: tuple[tuple[int, int], ...]) -> Iterator[TaskId]:
    spans = (range(first, first + count) for first, count in runs)
    return cast("Iterator[TaskId]", chain.from_iterable(spans))


class TaskRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One task. Only the engine changes it; its spec is its batch's."""

    id: TaskId
    batch: BatchId
    index: int = 0
    owner: UserName
    state: TaskState = TaskState.QUEUED
    node: NodeName = NodeName("")
    claim: Claim | None = None
    attempt: int = 0
    reason: str = ""
    exit: Exit | None = None
    created_at: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    #: Who asked for its end, while or after it was carried out; empty for nobody.
    kill_asked_by: str = ""
    history: tuple[Change, ...] = ()
    #: Attempts that failed and were followed by another because ``retries`` asked for it.
    retried: int = 0
    #: While it waits to be tried again: when it may be placed, UTC seconds.
    not_before: float = 0.0
    retry_of: TaskId | None = None
    #: After a restore: attempts up to this one may have been made since the backup, by a host
    #: that knew more. None of these numbers is given again.
    doubted: int = 0
    #: Of the last task of a batch that is being made, which is stored first: how many before it
    #: are not made yet. It waits outside the queue until none is.
    folded: int = 0
    #: Request ids of the retries that gave it another attempt, the latest last.
    retries_asked: tuple[str, ...] = ()


class EventRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the diary."""

    id: int
    at: float
    kind: str
    text: str
    node: str = ""
    task: TaskId | None = None
    actor: str = ""


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One state-changing call: who, from where, what, and whether it was done."""

    at: float
    actor: str
    role: str
    address: str
    method: str
    #: The parameters without secrets, variables and command lines.
    subject: str = ""
    #: ``ok`` or the code of the error.
    outcome: str = "ok"


class Remnant(msgspec.Struct, frozen=True, omit_defaults=True):
    """An attempt that was given up while its node was away, and that may still run there."""

    task: TaskId
    attempt: int
    #: Held until the node says that the attempt has ended.
    claim: Claim
    #: Seconds it is given to end.
    grace_s: float = 10.0


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node, in cluster.json."""

    name: NodeName
    #: SHA3-512 of the runner's credential, hexadecimal.
    credential: str
    joined_at: float = 0.0
    draining: bool = False
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    #: As last registered.
    inventory: Inventory = Inventory()
    remnants: tuple[Remnant, ...] = ()


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One API token, in cluster.json."""

    #: SHA3-512 of the token, hexadecimal.
    digest: str
    #: First characters, to tell tokens apart.
    prefix: str
    user: UserName
    role: Role
    created_at: float = 0.0
    #: UTC seconds; 0.0 for never.
    expires_at: float = 0.0


class JoinTokenRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One join token, in cluster.json."""

    digest: str
    prefix: str
    uses_left: int
    expires_at: float
    #: Only this node may join with it; empty for any.
    node: str = ""
    created_by: str = ""


class EnvironmentRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One environment, in cluster.json. Its container is found by its name and the cluster's id."""

    name: str
    #: The image it is made from.
    source: str
    state: EnvironmentState = EnvironmentState.CREATING
    #: What went wrong with the last work; empty if nothing did.
    trouble: str = ""
    created_at: float = 0.0
    created_by: UserName = UserName("")
    #: The newest first.
    versions: tuple[Version, ...] = ()
    #: Who asked for the version that is being packed.
    packed_by: UserName = UserName("")
    #: Digests of versions that are dropped, as long as their files may be there.
    dropped: tuple[str, ...] = ()
    #: It was deleted: only what is left of it on the host machine is still to be removed.
    deleted: bool = False


class RegistryRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whom the cluster is to one registry, in cluster.json."""

    #: Host name and port, in lower case.
    registry: str
    username: str
    #: In plain text, as registries want to be told it.
    password: str
    changed_at: float = 0.0
    changed_by: UserName = UserName("")

    def __repr__(self) -> str:
        return f"RegistryRecord({self.registry!r}, {self.username!r})"


#: What is kept in cluster.json: small, and an admin may want to read it.
Document = NodeRecord | TokenRecord | JoinTokenRecord | EnvironmentRecord | RegistryRecord


@dataclass(frozen=True, slots=True)
class PutDocument:
    """Keep this record in place of the one of the same kind and key, if there is one."""

    record: Document


@dataclass(frozen=True, slots=True)
class DropDocument:
    """Forget the record of this kind and key: a name, or a token's digest."""

    kind: type[Document]
    key: str


DocumentChange = PutDocument | DropDocument
