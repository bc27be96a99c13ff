"""Who watches what: snapshots, changes, and resuming where a reader left off.

Knows: the newest row of everything that changed lately and when it did, by topic. A watch is
a place in that record and nothing else, so a reader that is slow or away costs no memory: it
skips the steps in between and gets the newest rows. Changes are told in frames: all readers
that keep up are at the same place, so what is written for one is there for all.
Does not know: where rows come from, sockets, roles.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

from kohaku_daemon.core.cluster.records import BatchRecord
from kohaku_daemon.store.tasks import TaskRow
from protocol.ids import NodeName, TaskId
from protocol.messages.cluster import Event, Topic
from protocol.models.environment import Environment
from protocol.models.node import Node

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

#: Rows that are kept of each topic for readers who come back.
_REMEMBERED: Final = 20_000
#: At most 20 frames a second: a screen shows no more.
_PACE_S: Final = 0.05
#: Frames come less often with many readers: all together get some 2000 updates a second.
_PACE_EACH_S: Final = 0.0005
_SLOWEST_S: Final = 0.25
#: Seconds that nodes go on being recorded after the last reader left, who may come back.
_LINGER_S: Final = 60.0


#: A task as it was committed, still as it was written: it is read when somebody watches.
TaskChange = tuple[TaskRow, BatchRecord]


class Entry(NamedTuple, Generic[K, V]):
    """One change that is told."""

    revision: int
    key: K
    row: V


@dataclass(slots=True)
class _Group(Generic[K, V]):
    """Rows that changed at once, each with a revision of its own, from ``first`` on."""

    first: int
    #: Empty once nobody can be told of them any more.
    rows: Mapping[K, V]
    #: How many there were.
    size: int

    @property
    def last(self) -> int:
        return self.first + self.size - 1


@dataclass(slots=True)
class ChangeLog(Generic[K, V]):
    """The newest row of each thing that changed lately, in the order of their last change."""

    _groups: list[_Group[K, V]] = field(default_factory=list)
    #: Where the newest row of each thing is, by the first revision of its group.
    _newest: dict[K, int] = field(default_factory=dict)
    #: Groups of one row each that may be large and is often replaced.
    _single: dict[K, _Group[K, V]] = field(default_factory=dict)
    #: Those whose row was replaced since the last frame, which had told it.
    _replaced: list[_Group[K, V]] = field(default_factory=list)
    _rows: int = 0
    #: Changes up to this one may have been forgotten: older places cannot be resumed from.
    floor: int = 0

    def put(self, rows: Mapping[K, V], first: int) -> None:
        """Note changes, with the revisions from ``first`` on. The mapping is kept as it is."""
        self._add(_Group(first, rows, len(rows)))

    def put_one(self, key: K, row: V, revision: int, frame: int) -> None:
        """Note the change of what changes all the time, and let go of the row it replaces.

        That may still be told until there is a frame later than ``frame``, the last one.
        """
        before = self._single.get(key)
        if before is not None and before.first > frame:
            before.rows = {}
        elif before is not None:
            self._replaced.append(before)
        self._single[key] = group = _Group(revision, {key: row}, 1)
        self._add(group)

    def drop_replaced(self) -> None:
        """Let go of what was replaced before the frame that has just been made."""
        for group in self._replaced:
            group.rows = {}
        self._replaced.clear()

    def _add(self, group: _Group[K, V]) -> None:
        self._groups.append(group)
        self._newest.update(dict.fromkeys(group.rows, group.first))
        self._rows += group.size
        # In strides: taking the first off a list moves all the others.
        if self._rows > _REMEMBERED * 5 // 4:
            self._forget()

    def skip(self, revision: int) -> None:
        """Note that changes up to a revision are not recorded."""
        self.floor = revision
        self._groups.clear()
        self._newest.clear()
        self._single.clear()
        self._replaced.clear()
        self._rows = 0

    def since(
        self,
        place: int,
        limit: int,
        *,
        until: int | None = None,
        names: Collection[K] = (),
        wanted: Callable[[V], bool] | None = None,
    ) -> list[Entry[K, V]]:
        """Give what changed after a place, oldest first, at most ``limit`` rows.

        ``until`` is the last revision that is looked at; ``names`` and ``wanted`` leave out
        what a reader does not ask for. A thing that changed again is told where it did so.
        """
        found: list[Entry[K, V]] = []
        begin = bisect_right(self._groups, place, key=lambda group: group.first) - 1
        for group in islice(self._groups, max(begin, 0), None):
            if until is not None and group.first > until:
                break
            if names and group.rows.keys().isdisjoint(names):
                continue
            skipped = max(0, place + 1 - group.first)
            for entry in self._rows_of(group, skipped, until):
                if names and entry.key not in names:
                    continue
                if wanted is None or wanted(entry.row):
                    found.append(entry)
                    if len(found) == limit:
                        return found
        return found

    def _rows_of(
        self, group: _Group[K, V], skipped: int, until: int | None
    ) -> Iterator[Entry[K, V]]:
        """Give rows of a group, but for those that come again further on, up to ``until``."""
        most = None if until is None else max(skipped, until - group.first + 1)
        rows = islice(group.rows.items(), skipped, most)
        for revision, (key, row) in enumerate(rows, group.first + skipped):
            newest = self._newest.get(key, group.first)
            # What changes all the time would never be told if only its newest row were.
            if newest == group.first or (until is not None and newest > until):
                yield Entry(revision, key, row)

    def _forget(self) -> None:
        count = 0
        for group in self._groups:
            if self._rows <= _REMEMBERED:
                break
            count += 1
            self._rows -= group.size
            self.floor = group.last
            for key in group.rows:
                if self._newest.get(key) == group.first:
                    del self._newest[key]
                    self._single.pop(key, None)
        del self._groups[:count]

    def __len__(self) -> int:
        return len(self._newest)


class Hub:
    """The record of changes, and a bell for those who watch."""

    def __init__(self, epoch: str) -> None:
        #: Of this run of the host: a revision of another run cannot be resumed from.
        self.epoch = epoch
        self.revision = 0
        #: What has been told: readers are given changes up to here.
        self.frame = 0
        self.tasks = ChangeLog[TaskId, TaskChange]()
        self.nodes = ChangeLog[NodeName, Node | None]()
        self.readings = ChangeLog[NodeName, Node | None]()
        self.events = ChangeLog[int, Event]()
        self.environments = ChangeLog[str, Environment | None]()
        #: What readers of this frame were given, for others at the same place: of the watch.
        self.written: dict[Hashable, object] = {}
        self._bell = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._framed_at = 0.0
        self._readers: dict[Topic, int] = dict.fromkeys(Topic, 0)
        self._left_at: dict[Topic, float] = {}

    @contextmanager
    def reading(self, topics: Iterable[Topic]) -> Iterator[None]:
        """Note that somebody reads these topics, for as long as the block lasts."""
        for topic in topics:
            self._readers[topic] += 1
        if self.frame < self.revision:
            self._plan_frame()
        try:
            yield
        finally:
            for topic in topics:
                self._readers[topic] -= 1
                self._left_at[topic] = asyncio.get_running_loop().time()

    def wants_nodes(self) -> bool:
        """Say whether nodes are watched, or were lately. If not, they need not be shown."""
        # Asked at every heartbeat: no generator, and no clock unless somebody has left.
        readers = self._readers
        if readers[Topic.NODES] or readers[Topic.READINGS]:
            return True
        return bool(self._left_at) and (
            self._is_awaited(Topic.NODES) or self._is_awaited(Topic.READINGS)
        )

    def put_tasks(self, tasks: Mapping[TaskId, TaskChange]) -> None:
        """Note changed tasks."""
        if tasks:
            self.tasks.put(tasks, self._take(len(tasks)))

    def put_node(self, name: NodeName, node: Node | None) -> None:
        """Note a changed node, or that it is no more."""
        self.nodes.put_one(name, node, self._take(1), self.frame)
        if node is None:
            self.readings.put_one(name, None, self._take(1), self.frame)

    def put_readings(self, node: Node) -> None:
        """Note a node's new readings."""
        self.readings.put_one(node.name, node, self._take(1), self.frame)

    def skip_nodes(self) -> None:
        """Note that nodes or readings changed, which nobody reads."""
        self.revision += 1
        self.nodes.skip(self.revision)
        self.readings.skip(self.revision)

    def put_event(self, event: Event) -> None:
        """Note a line of the diary."""
        self.events.put({event.id: event}, self._take(1))

    def put_environment(self, name: str, environment: Environment | None) -> None:
        """Note a changed environment, or that it is no more."""
        self.environments.put_one(name, environment, self._take(1), self.frame)

    async def changed(self, after: int) -> None:
        """Wait until there is a frame with something newer than a place."""
        while self.frame <= after:
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
            Topic.ENVIRONMENTS: self.environments.floor,
        }
        return any(revision < floors[topic] for topic in topics)

    def _is_awaited(self, topic: Topic) -> bool:
        left_at = self._left_at.get(topic)
        if left_at is None:
            return False
        if asyncio.get_running_loop().time() - left_at <= _LINGER_S:
            return True
        del self._left_at[topic]
        return False

    def _take(self, count: int) -> int:
        """Give the first of so many new revisions, and see to it that a frame will have them."""
        first = self.revision + 1
        self.revision += count
        if any(self._readers.values()):
            self._plan_frame()
        return first

    def _plan_frame(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            wait_s = max(0.0, self._framed_at + self._pace_s() - loop.time())
            self._timer = loop.call_later(wait_s, self._close_frame)

    def _pace_s(self) -> float:
        readers = max(self._readers.values())
        return min(max(_PACE_S, readers * _PACE_EACH_S), _SLOWEST_S)

    def _close_frame(self) -> None:
        self._timer = None
        self._framed_at = asyncio.get_running_loop().time()
        self.frame = self.revision
        self.nodes.drop_replaced()
        self.readings.drop_replaced()
        self.environments.drop_replaced()
        self.written.clear()
        # Ring for those who wait now; who comes later looks at the frame first.
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()
