"""The cluster as a whole: its state, its events, and watching it change."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from protocol.ids import NamedBatch, NamedTask, TaskId
from protocol.messages.page import PageLimit
from protocol.models.environment import Environment
from protocol.models.node import Claimed, Node
from protocol.models.task import Task


class GetStatus(msgspec.Struct, frozen=True):
    """Ask how the cluster is."""


class Status(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the cluster is."""

    cluster: str
    version: str
    started_at: float
    nodes: dict[str, int]
    draining: int = 0
    #: Live tasks by state, and those that ended in the last hour.
    tasks: dict[str, int] = msgspec.field(default_factory=dict)
    capacity: Claimed = Claimed()
    claimed: Claimed = Claimed()
    #: What is wrong, worst first, one sentence each.
    problems: tuple[str, ...] = ()


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the cluster's diary."""

    id: int
    at: float
    #: Such as ``node.online`` or ``task.lost``.
    kind: str
    text: str
    node: str = ""
    task: TaskId | None = None
    actor: str = ""


class ListEvents(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A page of events, newest first."""

    before: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    #: 1 to 500.
    limit: PageLimit = 100


class EventPage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A page of events."""

    events: tuple[Event, ...]
    more: bool = False


class Topic(StrEnum):
    """What can be watched."""

    TASKS = "tasks"
    #: Standing and claims of nodes, without readings.
    NODES = "nodes"
    #: Readings of nodes, as often as their runners send them; a slow reader gets the newest.
    READINGS = "readings"
    EVENTS = "events"
    #: What is made, packed and removed, and how far that is.
    ENVIRONMENTS = "environments"


class Watch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Stream a snapshot of the topics, then what changes.

    A reader that falls behind is not sent every step: it gets the newest row of each
    thing that changed since what it saw last. Rows of tasks are as in ``task.list``; the
    snapshot has those that have not ended.
    """

    topics: tuple[Topic, ...]
    #: Only this batch's tasks.
    batch: NamedBatch | None = None
    #: Only these tasks, at most 1000.
    tasks: tuple[NamedTask, ...] = ()
    #: Revision of the last update seen; empty to begin with a snapshot.
    since: str = ""


class Update(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item of a watch.

    The first has ``start`` set if all that follows up to ``ready`` is a snapshot that
    replaces what the reader had; a resumed watch begins without it.
    """

    #: Give it as ``since`` to go on from here. Only set on updates that are safe to resume from.
    revision: str = ""
    start: bool = False
    #: All that was there when the watch began has been sent.
    ready: bool = False
    tasks: tuple[Task, ...] = ()
    nodes: tuple[Node, ...] = ()
    events: tuple[Event, ...] = ()
    #: Names of nodes that are no more.
    gone_nodes: tuple[str, ...] = ()
    environments: tuple[Environment, ...] = ()
    #: Names of environments that are no more.
    gone_environments: tuple[str, ...] = ()


class WatchEnded(msgspec.Struct, frozen=True):
    """The host ended the watch, as when it stops."""
