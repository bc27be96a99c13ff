"""What the host's shell is told to do.

The shell first commits every ``Save...`` and document change that came together, and only
then carries out the rest: nothing is answered, ordered or announced that a crash could undo.
"""

from __future__ import annotations

from dataclasses import dataclass

from kohaku_daemon.core.cluster.records import (
    BatchRecord,
    DropDocument,
    EventRecord,
    PutDocument,
    TaskRecord,
)
from protocol.errors import KohakuError
from protocol.ids import NodeName
from protocol.messages.runner import Order


@dataclass(frozen=True, slots=True)
class SaveBatch:
    """Store a new batch."""

    batch: BatchRecord


@dataclass(frozen=True, slots=True)
class SaveTask:
    """Store a task as it is when the commit begins, and show it to those who watch."""

    task: TaskRecord
    #: The batch it belongs to, for showing it.
    batch: BatchRecord


@dataclass(frozen=True, slots=True)
class SaveEvent:
    """Store a line of the diary, and show it to those who watch."""

    event: EventRecord


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """Show a node to those who watch."""

    node: NodeName


@dataclass(frozen=True, slots=True)
class ReadingsChanged:
    """Show a node's readings to those who watch."""

    node: NodeName


@dataclass(frozen=True, slots=True)
class SendOrder:
    """Order something of a runner, if its link is open. Orders of one node keep their order."""

    node: NodeName
    order: Order


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Close a runner's link."""

    node: NodeName
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the request that was handled."""

    value: object


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the request that was handled with an error."""

    error: KohakuError


ClusterAction = (
    SaveBatch
    | SaveTask
    | SaveEvent
    | PutDocument
    | DropDocument
    | NodeChanged
    | ReadingsChanged
    | SendOrder
    | CloseLink
    | Answer
    | Refuse
)
