"""Somebody sets the host's clock: nodes are judged by the time that has passed."""

from __future__ import annotations

import pytest

from kohaku_daemon.core.cluster.events import RunnerBeat, RunnerGone, Ticked
from protocol.ids import NodeName
from protocol.models.node import NodeState, Readings
from tests.support.builders import a_cluster, a_node, a_spec, a_submission
from tests.support.playbook import Playbook

N1 = NodeName("n1")
HOURS_S = 5 * 3600.0


@pytest.fixture
def play() -> Playbook:
    play = Playbook(a_cluster([a_node("n1")]))
    play.run(a_submission(a_spec(cores=1)))
    play.tell(RunnerBeat(N1, Readings()))
    play.tell(Ticked(1.0))
    return play


def state(play: Playbook) -> NodeState:
    return play.engine.state.fleet.nodes[N1].state


@pytest.mark.parametrize("by_s", [HOURS_S, -HOURS_S])
def test_a_node_that_was_just_heard_stays_online(play: Playbook, by_s: float) -> None:
    assert play.tell(Ticked(2.0), after_s=by_s + 1) == ["diary host.clock_set"]
    assert state(play) is NodeState.ONLINE
    # And falls silent as soon as it would have.
    assert play.tell(Ticked(11.5), after_s=9.5) == ["show n1", "diary node.offline"]


@pytest.mark.parametrize("by_s", [HOURS_S, -HOURS_S])
def test_a_heartbeat_between_the_step_and_the_tick_counts(play: Playbook, by_s: float) -> None:
    play.tell(RunnerBeat(N1, Readings()), after_s=by_s + 0.5)
    assert play.tell(Ticked(2.0), after_s=0.5) == ["diary host.clock_set"]
    assert play.tell(Ticked(11.0), after_s=9.0) == []
    assert play.tell(Ticked(13.0), after_s=2.0) == ["show n1", "diary node.offline"]


@pytest.mark.parametrize("by_s", [HOURS_S, -HOURS_S])
def test_a_node_that_is_away_is_lost_after_its_grace_and_no_sooner(
    play: Playbook, by_s: float
) -> None:
    play.tell(RunnerGone(N1, "the link broke"))
    assert play.tell(Ticked(61.0), after_s=by_s + 60) == ["diary host.clock_set"]
    assert play.tell(Ticked(119.0), after_s=58.0) == []
    assert play.states() == ["running"]
    play.tell(Ticked(123.0), after_s=4.0)
    assert play.states() == ["lost"]


def test_a_clock_that_is_corrected_was_not_set(play: Playbook) -> None:
    assert play.tell(Ticked(2.0), after_s=1.9) == []
