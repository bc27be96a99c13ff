"""Who watches what: snapshots, changes, and resuming where a reader left off.

Knows: the newest row of everything that changed lately and when it did, by topic. A watch is
a place in that record and nothing else, so a reader that is slow or away costs no memory: it
skips the steps in between and gets the newest rows.
Does not know: where rows come from, sockets, roles.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from protocol.ids import NodeName, TaskId
from protocol.messages.cluster import Event, Topic
from protocol.models.node import Node
from protocol.models.task import Task

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

#: Rows that are kept of each topic for readers who come back.
_REMEMBERED: Final = 20_000


@dataclass(slots=True)
class ChangeLog(Generic[K, V]):
    """The newest row of each thing, in the order of their last change."""

    _rows: OrderedDict[K, tuple[int, V]] = field(default_factory=OrderedDict)
    #: Changes up to this one may have been forgotten: older places cannot be resumed from.
    floor: int = 0

    def put(self, key: K, row: V, revision: int) -> None:
        """Note that a thing has changed."""
        self._rows[key] = (revision, row)
        self._rows.move_to_end(key)
        if len(self._rows) > _REMEMBERED:
            _, (self.floor, _) = self._rows.popitem(last=False)

    def since(self, revision: int, limit: int) -> list[tuple[int, V]]:
        """Give what changed after a revision, oldest first, at most ``limit`` rows."""
        newer = []
        for entry in reversed(self._rows.values()):
            if entry[0] <= revision:
                break
            newer.append(entry)
        newer.reverse()
        return newer[:limit]

    def __iter__(self) -> Iterator[V]:
        return (row for _, row in self._rows.values())


class Hub:
    """The record of changes, and a bell for those who watch."""

    def __init__(self, epoch: str) -> None:
        #: Of this run of the host: a revision of another run cannot be resumed from.
        self.epoch = epoch
        self.revision = 0
        self.tasks = ChangeLog[TaskId, Task]()
        self.nodes = ChangeLog[NodeName, Node | NodeName]()
        self.readings = ChangeLog[NodeName, Node | NodeName]()
        self.events = ChangeLog[int, Event]()
        self._bell = asyncio.Event()

    def put_task(self, task: Task) -> None:
        """Note a changed task."""
        self.tasks.put(task.id, task, self._next())

    def put_node(self, name: NodeName, node: Node | None) -> None:
        """Note a changed node, or that it is no more."""
        self.nodes.put(name, name if node is None else node, self._next())
        if node is None:
            self.readings.put(name, name, self.revision)

    def put_readings(self, node: Node) -> None:
        """Note a node's new readings."""
        self.readings.put(node.name, node, self._next())

    def put_event(self, event: Event) -> None:
        """Note a line of the diary."""
        self.events.put(event.id, event, self._next())

    async def changed(self, after: int) -> None:
        """Wait until there is something newer than a revision."""
        while self.revision <= after:
            await self._bell.wait()

    def render(self, revision: int) -> str:
        """Write a revision for a client."""
        return f"{self.epoch}.{revision}"

    def resumable(self, since: str, topics: tuple[Topic, ...]) -> int | None:
        """Read a client's revision; None if it has to start over."""
        epoch, _, number = since.partition(".")
        if epoch != self.epoch or not (number.isascii() and number.isdigit()):
            return None
        revision = int(number)
        if revision > self.revision or self.has_forgotten(revision, topics):
            return None
        return revision

    def has_forgotten(self, revision: int, topics: tuple[Topic, ...]) -> bool:
        """Say whether changes after a revision may have been forgotten."""
        floors = {
            Topic.TASKS: self.tasks.floor,
            Topic.NODES: self.nodes.floor,
            Topic.READINGS: self.readings.floor,
            Topic.EVENTS: self.events.floor,
        }
        return any(revision < floors[topic] for topic in topics)

    def _next(self) -> int:
        self.revision += 1
        # Ring for those who wait now; who comes later looks at the revision first.
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()
        return self.revision
