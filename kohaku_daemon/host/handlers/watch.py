"""Watching: a snapshot in pages, then changes at a pace a person can follow.

Knows: which rows a watch is about and who may see what of them.
Does not know: how changes are remembered (``host.subscriptions``), credit (``wire``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.core.cluster.records import TaskRecord
from kohaku_daemon.core.cluster.views import redact_task
from kohaku_daemon.host.handlers.rows import brief_rows, fit
from kohaku_daemon.host.parts import Call, Parts
from kohaku_daemon.host.subscriptions import Hub
from kohaku_daemon.store.tasks import LIVE_STATES
from kohaku_daemon.wire import ItemSink
from protocol.errors import BadRequest
from protocol.ids import BatchId, TaskId
from protocol.messages.cluster import Event, Topic, Update, Watch, WatchEnded
from protocol.models.node import Node
from protocol.models.task import Task

#: At most 20 updates a second for one reader: a screen shows no more, and 200 readers of a
#: busy topic stay cheap.
_PACE_S: Final = 0.05
_PAGE: Final = 100
_MOST_NAMES: Final = 1000

_Row = Task | Node | Event | str


@dataclass(frozen=True, slots=True)
class _Interest:
    """What a watch is about."""

    topics: tuple[Topic, ...]
    batch: BatchId | None
    tasks: frozenset[TaskId]
    actor: Actor

    def has(self, task: Task | TaskRecord) -> bool:
        if self.tasks and task.id not in self.tasks:
            return False
        return self.batch is None or task.batch == self.batch


async def watch(call: Call, params: Watch, sink: ItemSink) -> WatchEnded:
    """Stream what is there and what changes, until the reader goes."""
    if not params.topics:
        raise BadRequest("no topic to watch", hint=f"choose of: {', '.join(Topic)}")
    if len(params.tasks) > _MOST_NAMES:
        raise BadRequest(f"at most {_MOST_NAMES} tasks can be watched by name")
    topics = tuple(dict.fromkeys(params.topics))
    interest = _Interest(topics, params.batch, frozenset(params.tasks), call.actor)
    hub = call.parts.hub
    place = hub.resumable(params.since, topics)
    if place is not None:
        await sink.send(Update(revision=hub.render(place), ready=True))
    while True:
        if place is None or hub.has_forgotten(place, topics):
            place = await _start_over(call.parts, interest, sink)
        await hub.changed(place)
        await sink.ready()
        if hub.has_forgotten(place, topics):
            continue  # while it waited for a reader that is slower than the record is long
        place, update = _changes(hub, interest, place)
        if update is not None:
            await sink.send(update)
        await asyncio.sleep(_PACE_S)


async def _start_over(parts: Parts, interest: _Interest, sink: ItemSink) -> int:
    """Send what is there; give the place from where changes follow."""
    place = parts.hub.revision
    await sink.send(Update(start=True))
    for page in _task_pages(parts, interest):
        await sink.send(page)
    for page in await _node_pages(parts, interest):
        await sink.send(page)
    await sink.send(Update(revision=parts.hub.render(place), ready=True))
    return place


def _task_pages(parts: Parts, interest: _Interest) -> Iterator[Update]:
    """Give the tasks there are, a page at a time; each page is read when it is its turn."""
    if Topic.TASKS not in interest.topics:
        return
    for records in _snapshot_tasks(parts, interest):
        rows = brief_rows(parts, interest.actor, records)
        while rows:
            count = fit(rows)
            yield Update(tasks=tuple(rows[:count]))
            rows = rows[count:]


async def _node_pages(parts: Parts, interest: _Interest) -> list[Update]:
    """Give the nodes there are, in pages."""
    if not {Topic.NODES, Topic.READINGS} & set(interest.topics):
        return []
    fleet = parts.state.fleet
    nodes = await parts.loop.read(
        lambda: [_show(node.view(), interest) for node in fleet.nodes.values()]
    )
    pages = []
    while nodes:
        count = fit(nodes)
        pages.append(Update(nodes=tuple(nodes[:count])))
        nodes = nodes[count:]
    return pages


def _snapshot_tasks(parts: Parts, interest: _Interest) -> Iterator[list[TaskRecord]]:
    """Give live tasks; and ended ones too where the reader named what it wants.

    From the store: memory is ahead of it, and nothing is shown that a crash could undo.
    """
    if interest.tasks:
        named = sorted(interest.tasks)
        for start in range(0, len(named), _PAGE):
            found = map(parts.store.task, named[start : start + _PAGE])
            yield [record for record in found if record is not None and interest.has(record)]
        return
    states = LIVE_STATES if interest.batch is None else ()
    before = None
    while page := parts.store.page(states=states, batch=interest.batch, before=before, limit=_PAGE):
        yield page
        before = page[-1].id


def _changes(hub: Hub, interest: _Interest, place: int) -> tuple[int, Update | None]:
    """Give the newest rows of what changed after a place, and the place after them."""
    newer = sorted(_newer(hub, interest.topics, place), key=lambda entry: entry[0])
    rows = [row for _, row in newer[:_PAGE]]
    count = fit(rows)
    # What was left out, by the page or by the topics' own limits, comes with the next update.
    after = newer[count - 1][0] if count < len(newer) or len(newer) >= _PAGE else hub.revision
    update = _update(rows[:count], interest, hub.render(after))
    return after, update


def _newer(hub: Hub, topics: Sequence[Topic], place: int) -> Iterator[tuple[int, _Row]]:
    for topic in topics:
        match topic:
            case Topic.TASKS:
                yield from hub.tasks.since(place, _PAGE)
            case Topic.NODES:
                yield from hub.nodes.since(place, _PAGE)
            case Topic.READINGS:
                yield from hub.readings.since(place, _PAGE)
            case Topic.EVENTS:
                yield from hub.events.since(place, _PAGE)


def _update(rows: Iterable[_Row], interest: _Interest, revision: str) -> Update | None:
    tasks: list[Task] = []
    nodes: list[Node] = []
    events: list[Event] = []
    gone: list[str] = []
    for row in rows:
        match row:
            case Task():
                if interest.has(row):
                    tasks.append(redact_task(row, interest.actor))
            case Node():
                nodes.append(_show(row, interest))
            case Event():
                events.append(row)
            case str():
                gone.append(row)
    if not (tasks or nodes or events or gone):
        return None
    return Update(
        revision=revision,
        tasks=tuple(tasks),
        nodes=tuple(nodes),
        events=tuple(events),
        gone_nodes=tuple(dict.fromkeys(gone)),
    )


def _show(node: Node, interest: _Interest) -> Node:
    return node if Topic.READINGS in interest.topics else replace(node, readings=None)
