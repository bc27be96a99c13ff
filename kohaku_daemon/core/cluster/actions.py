"""What the host's shell is told to do.

The shell first commits every ``Save...`` and document change that came together, and only
then carries out the rest: nothing is answered, ordered or announced that a crash could undo.

There are several for each task, so they are structs: five times as quick to make as frozen
dataclasses, and nothing for the garbage collector to walk, as they are never part of a cycle.
But for ``Refuse``: an error holds the frames that it passes, and these hold what they refused.
"""

from __future__ import annotations

import msgspec

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


class SaveBatch(msgspec.Struct, frozen=True, gc=False):
    """Store a new batch, or what has become known of one: its id stays, and all that is
    looked for in the store.
    """

    batch: BatchRecord


class SaveTask(msgspec.Struct, frozen=True, gc=False):
    """Store a task as it is when the commit begins, and show it to those who watch."""

    task: TaskRecord
    #: The batch it belongs to, for showing it.
    batch: BatchRecord


class SaveEvent(msgspec.Struct, frozen=True, gc=False):
    """Store a line of the diary, and show it to those who watch."""

    event: EventRecord


class NodeChanged(msgspec.Struct, frozen=True, gc=False):
    """Show a node to those who watch."""

    node: NodeName


class ReadingsChanged(msgspec.Struct, frozen=True, gc=False):
    """Show a node's readings to those who watch."""

    node: NodeName


class EnvironmentChanged(msgspec.Struct, frozen=True, gc=False):
    """Show an environment to those who watch, and see what is to be done about it."""

    name: str


class SendOrder(msgspec.Struct, frozen=True, gc=False):
    """Order something of a runner, if its link is open. Orders of one node keep their order."""

    node: NodeName
    order: Order


class CloseLink(msgspec.Struct, frozen=True, gc=False):
    """Close a runner's link."""

    node: NodeName
    reason: str


class Answer(msgspec.Struct, frozen=True, gc=False):
    """Answer the request that was handled, or an earlier one."""

    value: object
    #: That of the ``AnswerLater`` whose request this answers; 0 for the one at hand.
    number: int = 0


class AnswerLater(msgspec.Struct, frozen=True, gc=False):
    """The request that was handled is answered by a later ``Answer`` of this number."""

    number: int


class Refuse(msgspec.Struct, frozen=True):
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
    | EnvironmentChanged
    | SendOrder
    | CloseLink
    | Answer
    | AnswerLater
    | Refuse
)
