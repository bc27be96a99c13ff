"""The record of changes: whoever reads it in pieces, from any place, has what there is."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_daemon.host import subscriptions
from kohaku_daemon.host.subscriptions import ChangeLog, Hub
from protocol.ids import NodeName
from protocol.messages.cluster import Topic
from protocol.models.node import Node, NodeState

N1 = NodeName("n1")


@pytest.fixture(autouse=True)
def short_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "_REMEMBERED", 5)


#: A change of a thing, or that a reader of so many rows has its turn.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 8)),
        st.tuples(st.just("read"), st.integers(1, 4)),
    ),
    max_size=60,
)


@given(STEPS)
def test_a_reader_misses_nothing_or_knows_that_it_did(steps: list[tuple[str, int]]) -> None:
    log = ChangeLog[int, int]()
    truth: dict[int, int] = {}
    mirror: dict[int, int] = {}
    revision = place = 0

    def read(limit: int) -> None:
        nonlocal place
        if place < log.floor:  # start over
            mirror.clear()
            mirror.update(truth)
            place = revision
            return
        for at, row in log.since(place, limit):
            assert place < at <= revision
            mirror[row // 1000] = row
            place = at

    for what, number in steps:
        if what == "put":
            revision += 1
            truth[number] = number * 1000 + revision
            log.put(number, truth[number], revision)
        else:
            read(number)
            assert mirror.items() <= truth.items() or place < revision
    while place < revision:
        read(3)
    assert mirror == truth
    assert len(list(log)) <= 5


async def test_a_bell_rings_for_those_who_wait_and_not_for_what_they_had() -> None:
    hub = Hub("epoch")
    hub.put_node(N1, None)
    await asyncio.wait_for(hub.changed(0), 1)
    waits = [asyncio.create_task(hub.changed(1)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in waits)
    hub.put_node(N1, None)
    await asyncio.wait_for(asyncio.gather(*waits), 1)


def test_each_topic_is_forgotten_by_itself() -> None:
    hub = Hub("epoch")
    for number in range(7):
        hub.put_readings(Node(name=NodeName(f"n{number}"), state=NodeState.ONLINE))
    assert hub.has_forgotten(1, (Topic.NODES, Topic.READINGS))
    assert not hub.has_forgotten(2, (Topic.NODES, Topic.READINGS))
    assert not hub.has_forgotten(0, (Topic.NODES, Topic.TASKS, Topic.EVENTS))
    assert hub.resumable(hub.render(1), (Topic.READINGS,)) is None
    assert hub.resumable(hub.render(1), (Topic.TASKS,)) == 1


def test_a_node_that_is_gone_has_no_readings_left() -> None:
    hub = Hub("epoch")
    hub.put_readings(Node(name=N1, state=NodeState.ONLINE))
    hub.put_node(N1, None)
    assert [row for _, row in hub.readings.since(0, 10)] == ["n1"]
