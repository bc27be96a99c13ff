"""Watching: a snapshot in pages, then changes at a pace a person can follow.

Knows: which rows a watch is about and who may see what of them.
Does not know: how changes are remembered (``host.subscriptions``), credit (``wire``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn, assert_never, cast

import msgspec
from msgspec.structs import replace

from kohaku_daemon.core.access.permissions import Actor, may_see_contents, sees_all
from kohaku_daemon.core.cluster.records import TaskRecord
from kohaku_daemon.core.cluster.views import brief_task, hide_contents, view_task
from kohaku_daemon.host.handlers.environment import list_rows
from kohaku_daemon.host.handlers.rows import PAGE_BYTES, brief_rows, fit
from kohaku_daemon.host.parts import Call, Parts
from kohaku_daemon.host.subscriptions import Entry, Hub, TaskChange
from kohaku_daemon.store.tasks import LIVE_STATES, read_task
from kohaku_daemon.wire import ItemSink
from protocol.errors import BadRequest
from protocol.ids import BatchId, TaskId, UserName
from protocol.messages.cluster import Topic, Update, Watch, WatchEnded
from protocol.models.node import Node
from protocol.models.task import Task

#: Seconds between updates of a reader that has much to catch up on.
_PACE_S: Final = 0.05
_PAGE: Final = 100
_MOST_NAMES: Final = 1000

#: A thing by the field of an update that its row stands in, and its name.
_Thing = tuple[str, Any]
_KIND: Final = {
    Topic.TASKS: "tasks",
    Topic.NODES: "nodes",
    Topic.READINGS: "nodes",
    Topic.EVENTS: "events",
    Topic.ENVIRONMENTS: "environments",
}
#: Where the names of things stand that are no more.
_GONE: Final = {"nodes": "gone_nodes", "environments": "gone_environments"}

_encode: Final = msgspec.msgpack.Encoder().encode


class _Written(msgspec.Struct, omit_defaults=True):
    """An ``Update`` whose rows are written already."""

    revision: str
    tasks: list[msgspec.Raw] = msgspec.field(default_factory=list)
    nodes: list[msgspec.Raw] = msgspec.field(default_factory=list)
    events: list[msgspec.Raw] = msgspec.field(default_factory=list)
    gone_nodes: list[str] = msgspec.field(default_factory=list)
    environments: list[msgspec.Raw] = msgspec.field(default_factory=list)
    gone_environments: list[str] = msgspec.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Interest:
    """What a watch is about. Equal ones are told the same."""

    topics: tuple[Topic, ...]
    batch: BatchId | None
    tasks: frozenset[TaskId]
    #: Who sees all, or whose own tasks are seen; others see what everybody does.
    sees_all: bool
    user: UserName

    def has(self, task: TaskRecord) -> bool:
        if self.tasks and task.id not in self.tasks:
            return False
        return self.batch is None or task.batch == self.batch

    def wants(self, change: TaskChange) -> bool:
        return self.batch is None or change[1].id == self.batch

    def may_see(self, owner: UserName) -> bool:
        return self.sees_all or owner == self.user


def _interest(actor: Actor, params: Watch) -> _Interest:
    own = may_see_contents(actor, actor.user) and not sees_all(actor)
    return _Interest(
        tuple(dict.fromkeys(params.topics)),
        params.batch,
        frozenset(params.tasks),
        sees_all(actor),
        actor.user if own else UserName(""),
    )


async def watch(call: Call, params: Watch, sink: ItemSink) -> WatchEnded:
    """Stream what is there and what changes, until the reader goes."""
    if not params.topics:
        raise BadRequest("no topic to watch", hint=f"choose of: {', '.join(Topic)}")
    if len(params.tasks) > _MOST_NAMES:
        raise BadRequest(f"at most {_MOST_NAMES} tasks can be watched by name")
    with call.parts.hub.reading(params.topics):
        await _tell(call, _interest(call.actor, params), params.since, sink)
    raise AssertionError("a watch ends with its reader")


async def _tell(call: Call, interest: _Interest, since: str, sink: ItemSink) -> NoReturn:
    hub, topics = call.parts.hub, interest.topics
    place = hub.resumable(since, topics)
    if place is not None:
        await sink.send(Update(revision=hub.render(place), ready=True))
    while True:
        if place is None or hub.has_forgotten(place, topics):
            place = await _start_over(call, interest, sink)
        await hub.changed(place)
        await sink.ready()
        if hub.has_forgotten(place, topics):
            continue  # while it waited for a reader that is slower than the record is long
        place, update = _next_update(hub, interest, place)
        if update is not None:
            await sink.send(update)
        if place < hub.frame:
            await asyncio.sleep(_PACE_S)


async def _start_over(call: Call, interest: _Interest, sink: ItemSink) -> int:
    """Send what is there; give the place from where changes follow."""
    parts = call.parts
    place = parts.hub.revision
    await sink.send(Update(start=True))
    for page in _task_pages(call, interest):
        await sink.send(page)
    for page in await _node_pages(parts, interest):
        await sink.send(page)
    for page in await _environment_pages(parts, interest):
        await sink.send(page)
    await sink.send(Update(revision=parts.hub.render(place), ready=True))
    return place


def _task_pages(call: Call, interest: _Interest) -> Iterator[Update]:
    """Give the tasks there are, a page at a time; each page is read when it is its turn."""
    if Topic.TASKS not in interest.topics:
        return
    for records in _snapshot_tasks(call.parts, interest):
        rows = brief_rows(call.parts, call.actor, records)
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


async def _environment_pages(parts: Parts, interest: _Interest) -> list[Update]:
    """Give the environments there are, in pages."""
    if Topic.ENVIRONMENTS not in interest.topics:
        return []
    rows = await list_rows(parts)
    pages = []
    while rows:
        count = fit(rows)
        pages.append(Update(environments=tuple(rows[:count])))
        rows = rows[count:]
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


def _next_update(hub: Hub, interest: _Interest, place: int) -> tuple[int, msgspec.Raw | None]:
    """Give the newest rows of what changed after a place, and the place after them.

    Written once for all readers who are at the same place and see the same.
    """
    key = (place, interest)
    known = hub.written.get(key)
    if known is None:
        known = hub.written[key] = _write_update(hub, interest, place)
    return cast("tuple[int, msgspec.Raw | None]", known)


def _write_update(hub: Hub, interest: _Interest, place: int) -> tuple[int, msgspec.Raw | None]:
    newer = sorted(_newer(hub, interest, place), key=lambda entry: entry[1].revision)
    rows: dict[_Thing, msgspec.Raw | None] = {}
    after, left = max(place, hub.frame), PAGE_BYTES
    for number, (topic, entry) in enumerate(newer):
        row = _write_row(hub, interest, topic, entry)
        left -= len(bytes(row)) if row is not None else len(entry.key)
        if number == _PAGE or (left < 0 and rows):
            # What is left out, by the page or by the topics' own limits, comes next.
            after = newer[number - 1][1].revision
            break
        rows[(_KIND[topic], entry.key)] = row
    else:
        if len(newer) >= _PAGE:
            after = newer[-1][1].revision
    return after, _assemble(rows, hub.render(after)) if rows else None


def _newer(hub: Hub, interest: _Interest, place: int) -> Iterator[tuple[Topic, Entry[Any, Any]]]:
    for topic in interest.topics:
        found: list[Entry[Any, Any]]
        match topic:
            case Topic.TASKS:
                found = hub.tasks.since(
                    place, _PAGE, until=hub.frame, names=interest.tasks, wanted=interest.wants
                )
            case Topic.NODES:
                found = hub.nodes.since(place, _PAGE, until=hub.frame)
            case Topic.READINGS:
                found = hub.readings.since(place, _PAGE, until=hub.frame)
            case Topic.EVENTS:
                found = hub.events.since(place, _PAGE, until=hub.frame)
            case Topic.ENVIRONMENTS:
                found = hub.environments.since(place, _PAGE, until=hub.frame)
            case _:
                assert_never(topic)
        for entry in found:
            yield topic, entry


def _write_row(
    hub: Hub, interest: _Interest, topic: Topic, entry: Entry[Any, Any]
) -> msgspec.Raw | None:
    """Write what one reader may see of a row; None if it is of what is no more."""
    if entry.row is None:
        return None
    if topic is Topic.TASKS:
        wide = interest.may_see(entry.row[1].owner)
    else:
        wide = Topic.READINGS in interest.topics
    key = (topic, entry.revision, wide)
    row = hub.written.get(key)
    if row is None:
        shown = entry.row
        if topic is Topic.TASKS:
            shown = _show_task(entry.row, wide=wide)
        elif topic in {Topic.NODES, Topic.READINGS}:
            shown = _show(entry.row, interest)
        row = hub.written[key] = msgspec.Raw(_encode(shown))
    return cast("msgspec.Raw", row)


def _show_task(change: TaskChange, *, wide: bool) -> Task:
    row, batch = change
    task = brief_task(view_task(read_task(row), batch))
    return task if wide else hide_contents(task)


def _assemble(rows: dict[_Thing, msgspec.Raw | None], revision: str) -> msgspec.Raw:
    update = _Written(revision=revision)
    for (kind, key), row in rows.items():
        if row is None:
            getattr(update, _GONE[kind]).append(key)
        else:
            getattr(update, kind).append(row)
    return msgspec.Raw(_encode(update))


def _show(node: Node, interest: _Interest) -> Node:
    return node if Topic.READINGS in interest.topics else replace(node, readings=None)
