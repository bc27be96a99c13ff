"""The record of changes: whoever reads it in pieces, from any place, has what there is."""

from __future__ import annotations

import asyncio
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_daemon.host import subscriptions
from kohaku_daemon.host.subscriptions import ChangeLog, Hub
from protocol.ids import NodeName
from protocol.messages.cluster import Event, Topic
from protocol.models.node import Node, NodeState

N1 = NodeName("n1")


@pytest.fixture(autouse=True)
def short_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "_REMEMBERED", 5)


#: Things that change at once, or that a reader of so many rows has its turn.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.integers(0, 8), min_size=1, max_size=4)),
        st.tuples(st.just("read"), st.lists(st.integers(1, 4), min_size=1, max_size=1)),
        st.tuples(st.just("frame"), st.just([0])),
    ),
    max_size=60,
)


@given(STEPS, st.sets(st.integers(0, 8), max_size=3))
def test_a_reader_misses_nothing_or_knows_that_it_did(
    steps: list[tuple[str, list[int]]], names: set[int]
) -> None:
    log = ChangeLog[int, int]()
    truth: dict[int, int] = {}
    mirror: dict[int, int] = {}
    revision = place = frame = 0

    def read(limit: int) -> None:
        nonlocal place
        if place < log.floor:  # start over
            mirror.clear()
            mirror.update(truth)
            place = revision
            return
        found = log.since(place, limit, until=frame, names=names)
        for entry in found:
            assert place < entry.revision <= frame
            assert not names or entry.key in names
            mirror[entry.key] = entry.row
            place = entry.revision
        if len(found) < limit:
            place = max(place, frame)

    for what, numbers in steps:
        if what == "put":
            rows = {number: number * 1000 + revision for number in numbers}
            truth |= rows
            if len(rows) == 1:
                log.put_one(*next(iter(rows.items())), revision + 1, frame)
            else:
                log.put(rows, revision + 1)
            revision += len(rows)
        elif what == "frame":
            frame = revision
            log.drop_replaced()
        else:
            read(numbers[0])
    frame = revision
    log.drop_replaced()
    while place < revision:
        read(3)
    wanted = names or truth.keys()
    assert {key: mirror.get(key) for key in wanted} == {key: truth.get(key) for key in wanted}
    assert len(log) <= 7


def test_what_changes_all_the_time_is_told_all_the_same() -> None:
    log = ChangeLog[str, int]()
    log.put({"busy": 1, "calm": 1}, 1)
    log.put({"busy": 2}, 3)
    assert [(entry.key, entry.row) for entry in log.since(0, 9, until=2)] == [
        ("busy", 1),
        ("calm", 1),
    ]
    assert [(entry.key, entry.row) for entry in log.since(0, 9, until=3)] == [
        ("calm", 1),
        ("busy", 2),
    ]


async def test_readings_that_were_replaced_take_no_memory() -> None:
    hub = Hub("epoch")
    nodes = [Node(name=N1, state=NodeState.ONLINE) for _ in range(10)]
    mine = sys.getrefcount(nodes[0])

    def find_held() -> list[int]:
        return [number for number in range(10) if sys.getrefcount(nodes[number]) > mine]

    for node in nodes[:5]:
        hub.put_readings(node)
    del node
    assert find_held() == [4]
    with hub.reading((Topic.READINGS,)):
        await asyncio.wait_for(hub.changed(0), 1)
        for node in nodes[5:]:
            hub.put_readings(node)
        del node
        assert find_held() == [4, 9], "the earlier one is told until there is a later frame"
        await asyncio.wait_for(hub.changed(5), 1)
    assert find_held() == [9]


async def test_a_bell_rings_for_those_who_wait_and_not_for_what_they_had() -> None:
    hub = Hub("epoch")
    hub.put_node(N1, None)
    with hub.reading((Topic.NODES,)):
        await asyncio.wait_for(hub.changed(0), 1)
        place = hub.frame
        waits = [asyncio.create_task(hub.changed(place)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(wait.done() for wait in waits)
        hub.put_node(N1, None)
        await asyncio.wait_for(asyncio.gather(*waits), 1)


async def test_all_readers_are_told_in_the_same_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "_PACE_S", 0.02)
    hub = Hub("epoch")
    with hub.reading((Topic.EVENTS,)):
        frames = []
        for number in range(60):
            hub.put_event(an_event(number))
            frames.append(hub.frame)
            await asyncio.sleep(0.001)
        assert 2 < len(set(frames)) < 20
        await asyncio.wait_for(hub.changed(59), 1)
        assert hub.frame == 60


async def test_nodes_are_not_wanted_when_nobody_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = Hub("epoch")
    assert not hub.wants_nodes()
    hub.skip_nodes()
    assert hub.resumable(hub.render(0), (Topic.NODES,)) is None
    assert hub.resumable(hub.render(0), (Topic.TASKS,)) == 0
    with hub.reading((Topic.TASKS, Topic.READINGS)):
        assert hub.wants_nodes()
    assert hub.wants_nodes(), "whoever was cut off cannot go on"
    monkeypatch.setattr(subscriptions, "_LINGER_S", -1.0)
    assert not hub.wants_nodes()


async def test_each_topic_is_forgotten_by_itself() -> None:
    hub = Hub("epoch")
    for number in range(7):
        hub.put_readings(Node(name=NodeName(f"n{number}"), state=NodeState.ONLINE))
    assert hub.has_forgotten(1, (Topic.NODES, Topic.READINGS))
    assert not hub.has_forgotten(2, (Topic.NODES, Topic.READINGS))
    assert not hub.has_forgotten(0, (Topic.NODES, Topic.TASKS, Topic.EVENTS))
    assert hub.resumable(hub.render(1), (Topic.READINGS,)) is None
    assert hub.resumable(hub.render(1), (Topic.TASKS,)) == 1


async def test_a_node_that_is_gone_has_no_readings_left() -> None:
    hub = Hub("epoch")
    hub.put_readings(Node(name=N1, state=NodeState.ONLINE))
    hub.put_node(N1, None)
    assert [entry.row for entry in hub.readings.since(0, 10)] == [None]


def an_event(number: int) -> Event:
    return Event(id=number, at=0.0, kind="test", text="something happened")
