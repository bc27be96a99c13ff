"""Killing, pausing and resuming: in every state, with the node there, away, or forgetful."""

import pytest

from kohaku_daemon.core.cluster.events import RunnerGone, SteerAsked, Verb
from protocol.ids import NodeName, TaskId
from protocol.messages.runner import AttemptState, OrderKill
from protocol.messages.task import SteerResult
from protocol.models.task import Cause, Exit, TaskState
from tests.support.builders import (
    OPERATOR,
    a_cluster,
    a_node,
    a_spec,
    a_submission,
    a_user,
    an_inventory,
    registered,
)
from tests.support.playbook import Playbook

ACCEPTED, RUNNING = AttemptState.ACCEPTED, AttemptState.RUNNING
PAUSED, ENDED = AttemptState.PAUSED, AttemptState.ENDED
BY_SIGNAL = Exit(Cause.SIGNALLED, signal=15)


@pytest.fixture
def play() -> Playbook:
    return Playbook(a_cluster([a_node("n1")]))


def test_a_waiting_task_is_killed_at_once_and_never_ordered(play: Playbook) -> None:
    play.tell(a_submission())
    assert play.kill(1) == ["save #1 killed", "answer"]
    assert play.answer == SteerResult(1)
    assert play.task(1).reason == "killed by ada: it was still waiting"
    assert play.place() == []


@pytest.mark.parametrize("states", [[], [ACCEPTED], [RUNNING], [RUNNING, PAUSED]])
def test_a_task_on_a_node_is_killed_when_its_runner_says_so(
    play: Playbook, states: list[AttemptState]
) -> None:
    play.tell(a_submission(a_spec(grace_s=3.0)))
    play.place()
    for state in states:
        play.hear(1, state)
    before = play.states()
    assert play.kill(1) == [f"save #1 {before[0]}", "n1: kill #1/1", "answer"]
    assert play.orders == [OrderKill(task=play.id(1), attempt=1, grace_s=3.0)]
    assert play.hear(1, ENDED, exit_=BY_SIGNAL) == ["save #1 killed", "show n1", "answer"]
    assert play.task(1).exit == Exit(Cause.KILLED, signal=15)
    assert play.task(1).reason == "killed by ada with signal 15"
    assert play.task(1).history[-1].actor == "ada"


def test_asking_again_gives_the_order_again_and_writes_nothing_new(play: Playbook) -> None:
    play.run(a_submission())
    play.kill(1)
    assert play.steer(Verb.KILL, 1, user="ada") == ["n1: kill #1/1", "answer"]


def test_a_task_that_returned_by_itself_while_it_was_being_killed_has_completed(
    play: Playbook,
) -> None:
    play.run(a_submission())
    play.kill(1)
    play.hear(1, ENDED, exit_=Exit(Cause.EXITED, code=0))
    assert play.states() == ["completed"]


def test_a_kill_while_the_node_is_away_is_carried_out_when_it_is_back(play: Playbook) -> None:
    play.run(a_submission())
    play.tell(RunnerGone(NodeName("n1"), "the link broke"))
    play.kill(1)
    assert play.states() == ["running"]
    running = play.report(play.id(1), RUNNING)
    back = play.tell(registered("n1", an_inventory(), attempts=(running,)))
    assert "n1: kill #1/1" in back


def test_a_kill_before_the_order_arrived_makes_the_runner_refuse_it(play: Playbook) -> None:
    play.tell(a_submission())
    play.place()
    play.tell(RunnerGone(NodeName("n1"), "the link broke"))
    play.kill(1)
    back = play.tell(registered("n1", an_inventory()))
    assert [line for line in back if ": " in line] == ["n1: kill #1/1"]
    never = Exit(Cause.KILLED, message="it never began")
    play.hear(1, ENDED, exit_=never)
    assert play.states() == ["killed"]


def test_a_kill_is_not_forgotten_by_a_host_that_restarts(play: Playbook) -> None:
    play.run(a_submission())
    play.kill(1)
    play.restart()
    running = play.report(play.id(1), RUNNING)
    assert "n1: kill #1/1" in play.tell(registered("n1", an_inventory(), attempts=(running,)))


def test_a_lost_task_is_killed_when_its_node_is_back(play: Playbook) -> None:
    play.run(a_submission())
    play.tell(registered("n1", an_inventory()))
    assert play.states() == ["lost"]
    assert play.kill(1) == ["save #1 lost", "n1: kill #1/1", "answer"]
    play.hear(1, ENDED, exit_=Exit(Cause.KILLED, message="it never began"))
    assert play.states() == ["killed"]


def test_pause_and_resume_are_orders_and_their_effect_is_reported(play: Playbook) -> None:
    play.run(a_submission())
    assert play.steer(Verb.PAUSE, 1) == ["n1: pause #1/1", "answer"]
    assert play.states() == ["running"]
    assert play.hear(1, PAUSED) == ["save #1 paused", "answer"]
    assert play.steer(Verb.RESUME, 1) == ["n1: resume #1/1", "answer"]
    assert play.hear(1, RUNNING) == ["save #1 running", "answer"]


def test_why_a_pause_could_not_be_is_kept_for_people_once(play: Playbook) -> None:
    play.run(a_submission())
    play.steer(Verb.PAUSE, 1)
    assert play.hear(1, RUNNING, note="no freezer here") == ["save #1 running", "answer"]
    assert play.task(1).history[-1].cause == "no freezer here"
    assert play.hear(1, RUNNING, note="no freezer here") == ["answer"]


@pytest.mark.parametrize(
    ("verb", "reports", "why"),
    [
        (Verb.PAUSE, None, "it is queued, not running"),
        (Verb.PAUSE, [], "it is assigned, not running"),
        (Verb.PAUSE, [RUNNING, PAUSED], "it is paused, not running"),
        (Verb.RESUME, [RUNNING], "it is running, not paused"),
        (Verb.RESUME, [RUNNING, ENDED], "it is failed already"),
        (Verb.KILL, [RUNNING, ENDED], "it is failed already"),
    ],
)
def test_what_makes_no_sense_in_a_state_is_refused_with_that_state(
    play: Playbook, verb: Verb, reports: list[AttemptState] | None, why: str
) -> None:
    play.tell(a_submission())
    if reports is not None:
        play.place()
    for state in reports or []:
        play.hear(1, state)
    assert play.steer(verb, 1) == ["answer"]
    assert play.answer == SteerResult(0, ((play.id(1), why),))


def test_a_pause_needs_its_node(play: Playbook) -> None:
    play.run(a_submission())
    play.tell(RunnerGone(NodeName("n1"), "the link broke"))
    play.steer(Verb.PAUSE, 1)
    why = "its node n1 is away; try again when it is back"
    assert play.answer == SteerResult(0, ((play.id(1), why),))


def test_only_its_owner_and_operators_may_steer_a_task(play: Playbook) -> None:
    play.tell(a_submission(array=2))
    assert play.steer(Verb.KILL, 1, user="bob") == ["answer"]
    assert play.answer == SteerResult(0, ((play.id(1), "it belongs to somebody else"),))
    play.tell(SteerAsked(OPERATOR, Verb.KILL, (play.id(1),)))
    assert play.states() == ["killed", "queued"]
    assert play.task(1).kill_asked_by == "olga"


def test_many_are_answered_together_and_a_name_said_twice_counts_once(play: Playbook) -> None:
    play.tell(a_submission(array=2))
    tasks = (play.id(1), TaskId(5), play.id(2), play.id(1))
    play.tell(SteerAsked(a_user(), Verb.KILL, tasks))
    assert play.answer == SteerResult(2, ((TaskId(5), "there is no such task"),))


def test_at_most_a_hundred_refusals_are_named(play: Playbook) -> None:
    play.tell(SteerAsked(a_user(), Verb.KILL, tuple(map(TaskId, range(1, 1000)))))
    play.finish()
    assert len(play.answer.refused) == 100


def test_killing_the_first_in_line_lets_those_behind_it_go() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.run(a_submission(a_spec(cores=2)))
    play.tell(a_submission(a_spec(cores=4), request_id="the-big-one"))
    play.tell(a_submission(a_spec(cores=2), request_id="the-small-one"))
    assert play.place() == []
    play.kill(2)
    assert play.place() == ["n1: start #3/1"]
    assert play.states() == [TaskState.RUNNING, TaskState.KILLED, TaskState.ASSIGNED]
