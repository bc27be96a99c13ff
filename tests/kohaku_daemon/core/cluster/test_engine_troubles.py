"""What the host does about disks that take nothing: a node's, and its own."""

from __future__ import annotations

import pytest

from kohaku_daemon.core.cluster.events import RunnerBeat, RunnerGone, StoreFailing, StoreWell
from kohaku_daemon.core.cluster.views import view_status
from protocol.ids import NodeName
from protocol.models.node import Readings
from tests.support.builders import a_cluster, a_node, a_spec, a_submission
from tests.support.playbook import Playbook

N1 = NodeName("n1")
FULL = Readings(troubles=("the disk of /var is full",))
WELL = Readings()


@pytest.fixture
def play() -> Playbook:
    return Playbook(a_cluster([a_node("n1")]))


def problems(play: Playbook) -> tuple[str, ...]:
    return view_status(play.engine.state, "1", 0.0, {}).problems


def test_a_node_in_trouble_keeps_what_it_has_and_gets_nothing_new(play: Playbook) -> None:
    play.run(a_submission(a_spec(cores=1)))
    told = play.tell(RunnerBeat(N1, FULL))
    assert told == ["diary node.trouble", "show n1", "show readings of n1"]
    assert problems(play) == ("node n1: the disk of /var is full",)
    assert play.tell(RunnerBeat(N1, FULL)) == ["show readings of n1"]
    play.tell(a_submission(a_spec(cores=1), request_id="request-2"))
    assert play.place() == []
    told = play.tell(RunnerBeat(N1, WELL))
    assert told[:3] == ["diary node.well", "show n1", "show readings of n1"]
    (order,) = play.place()
    assert order.startswith("n1: start #2")
    assert problems(play) == ()


def test_a_node_in_trouble_that_goes_away_is_only_away(play: Playbook) -> None:
    play.tell(RunnerBeat(N1, FULL))
    play.tell(RunnerGone(N1, "the link broke"))
    assert problems(play) == ("node n1 is offline",)


def test_a_host_that_cannot_store_leaves_that_in_the_diary(play: Playbook) -> None:
    assert play.tell(StoreFailing("the disk is full")) == ["diary host.failing"]
    assert play.tell(StoreWell()) == ["diary host.well"]
    assert play.kept.events[-2].text == "the host cannot store anything: the disk is full"
