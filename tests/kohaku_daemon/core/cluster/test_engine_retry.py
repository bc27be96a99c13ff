"""Another attempt: only if asked for, with its own number, and never beside one that may live."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from kohaku_daemon.core.cluster.ended import EndedTasks
from kohaku_daemon.core.cluster.events import (
    PlacementDue,
    RemoveAsked,
    RetryAsked,
    RunnerBeat,
    RunnerGone,
    Ticked,
)
from kohaku_daemon.core.cluster.records import PutDocument
from kohaku_daemon.core.cluster.views import explain_task
from protocol.errors import Conflict, Forbidden
from protocol.ids import NodeName
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.messages.task import Retried
from protocol.models.node import Readings
from protocol.models.task import Cause, Exit
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

ENDED, RUNNING = AttemptState.ENDED, AttemptState.RUNNING
DONE, FAILED = Exit(Cause.EXITED, code=0), Exit(Cause.EXITED, code=3)
N1, N2 = NodeName("n1"), NodeName("n2")


@pytest.fixture
def play() -> Playbook:
    return Playbook(a_cluster([a_node("n1"), a_node("n2")]))


def lose(play: Playbook, node: NodeName) -> list[str]:
    """Let a node be away until its tasks are given up, and the others be there."""
    play.tell(RunnerGone(node, "the link broke"))
    play.now += 121.0
    for other in {N1, N2} - {node}:
        play.tell(RunnerBeat(other, Readings()))
    return play.tell(Ticked())


def later(play: Playbook, seconds: float) -> list[str]:
    """Let time pass, and place what waits."""
    play.tell(Ticked(), after_s=seconds)
    return play.place()


# Retries ------------------------------------------------------------------------------------


def test_a_failed_attempt_is_followed_by_others_as_often_as_asked(play: Playbook) -> None:
    play.run(a_submission(a_spec(retries=2)))
    play.hear(1, ENDED, exit_=FAILED)
    assert play.states() == ["queued"]
    assert play.place() == []
    state = play.engine.state
    assert explain_task(state, state.tasks[play.id(1)]).summary == (
        "waits to be tried again: attempt 1 exited with 3; tries again in 1 s, 1 of 2 retries left"
    )
    assert later(play, 1.0) == ["n1: start #1/2"]
    play.hear(1, RUNNING, attempt=2)
    play.hear(1, ENDED, attempt=2, exit_=Exit(Cause.OOM, signal=9))
    assert later(play, 1.0) == []
    assert later(play, 1.0) == ["n1: start #1/3"]
    play.hear(1, ENDED, attempt=3, exit_=FAILED)
    assert play.states() == ["failed"]
    assert [change.attempt for change in play.task(1).history if change.state == "assigned"] == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("exit_", [DONE, Exit(Cause.KILLED, signal=15)])
def test_what_completed_or_was_killed_is_not_tried_again(play: Playbook, exit_: Exit) -> None:
    play.run(a_submission(a_spec(retries=5)))
    play.hear(1, ENDED, exit_=exit_)
    assert play.task(1).state.is_final


def test_a_kill_ends_all_trying(play: Playbook) -> None:
    play.run(a_submission(a_spec(retries=5)))
    play.kill(1)
    play.hear(1, ENDED, exit_=FAILED)
    assert play.states() == ["killed"]
    play.run(a_submission(a_spec(retries=5), request_id="request-2"))
    play.hear(2, ENDED, exit_=FAILED)
    play.kill(2)
    assert play.states()[1] == "killed"
    assert later(play, 100) == []


def test_late_words_of_an_earlier_attempt_change_nothing(play: Playbook) -> None:
    play.run(a_submission(a_spec(retries=1)))
    play.hear(1, ENDED, exit_=FAILED)
    for state in AttemptState:
        assert play.hear(1, state, exit_=DONE) == ["answer"]
    later(play, 1.0)
    for state in AttemptState:
        assert play.hear(1, state, exit_=DONE) == ["answer"]
    assert play.states() == ["assigned"]


def test_the_pause_before_another_attempt_outlives_the_host(play: Playbook) -> None:
    play.run(a_submission(a_spec(retries=1)))
    play.hear(1, ENDED, exit_=FAILED)
    play.restart()
    play.tell(registered("n1", an_inventory()))
    assert play.place() == []
    assert later(play, 1.0) == ["n1: start #1/2"]


# Lost ones ----------------------------------------------------------------------------------


@pytest.fixture
def again(play: Playbook) -> Playbook:
    """A task on n1 that is to be tried again when its node is lost; n1 is."""
    play.run(a_submission(a_spec(cores=4, requeue_on_lost=True)))
    lose(play, N1)
    return play


def test_a_lost_task_is_tried_elsewhere_if_asked(again: Playbook) -> None:
    assert again.states() == ["queued"]
    assert again.place() == ["n2: start #1/2"]
    assert again.kept.events[-1].kind == "task.lost"


def test_what_may_still_run_on_a_lost_node_is_ended_and_holds_its_claim_till_then(
    again: Playbook,
) -> None:
    again.tell(RunnerGone(N2, "the link broke"))
    alive = again.report(again.id(1), RUNNING)
    lines = again.tell(registered("n1", an_inventory(), attempts=(alive,)))
    assert "n1: kill #1/1" in lines
    assert again.place() == [], "the cores of n1 may still be in use"
    assert again.states() == ["queued"]
    again.hear(1, ENDED, exit_=Exit(Cause.KILLED, signal=15))
    assert again.place() == ["n1: start #1/2"]


def test_the_end_of_a_given_up_attempt_does_not_end_the_task(again: Playbook) -> None:
    again.place()
    done = again.report(again.id(1), ENDED, exit_=DONE)
    again.tell(registered("n1", an_inventory(), attempts=(done,)))
    assert again.states() == ["assigned"]
    assert again.engine.state.fleet.nodes[N1].site.books.remnants == {}


def test_a_remnant_outlives_the_host_and_the_end_of_its_task(again: Playbook) -> None:
    again.place()
    again.hear(1, ENDED, node="n2", attempt=2, exit_=DONE)
    assert again.states() == ["completed"]
    again.restart()
    node = again.engine.state.fleet.nodes[N1]
    assert node.site.books.free_cores == set()
    assert "n1: kill #1/1" in again.tell(registered("n1", an_inventory()))
    never = AttemptReport(task=again.id(1), attempt=1, state=ENDED, exit=Exit(Cause.KILLED))
    again.tell(registered("n1", an_inventory(), attempts=(never,)))
    assert len(node.site.books.free_cores) == 4
    assert node.record.remnants == ()


def test_a_crash_between_nodes_and_tasks_leaves_no_remnant_beside_its_task(
    play: Playbook,
) -> None:
    play.run(a_submission(a_spec(cores=4, requeue_on_lost=True)))
    play.tell(RunnerGone(N1, "the link broke"))
    actions = play.engine.handle(Ticked(), play.now + 121.0)
    play.kept.commit([action for action in actions if isinstance(action, PutDocument)])
    play.restart()
    assert play.engine.state.fleet.nodes[N1].site.books.remnants == {}
    assert play.engine.state.tasks[play.id(1)].node == N1


def test_removing_a_node_lets_its_tasks_be_tried_elsewhere(play: Playbook) -> None:
    play.run(a_submission(a_spec(requeue_on_lost=True)))
    play.tell(RemoveAsked(OPERATOR, "n1", force=True))
    assert play.place() == ["n2: start #1/2"]


def test_a_task_that_is_to_end_is_not_tried_again_when_lost(play: Playbook) -> None:
    play.run(a_submission(a_spec(requeue_on_lost=True)))
    play.kill(1)
    lose(play, N1)
    assert play.states() == ["lost"]


def test_an_attempt_before_the_present_one_that_still_runs_somewhere_is_ended(
    play: Playbook,
) -> None:
    play.run(a_submission(a_spec(requeue_on_lost=True)))
    play.tell(RemoveAsked(OPERATOR, "n1", force=True))
    play.place()
    play.tell(PlacementDue())
    alive = play.report(play.id(1), RUNNING)
    assert "n2: kill #1/1" in play.tell(registered("n2", an_inventory(), attempts=(alive,)))


# By hand ------------------------------------------------------------------------------------


def ask(play: Playbook, *numbers: int, request_id: str = "retry-001", user: str = "ada") -> None:
    """Ask for tasks of one batch to be tried again, as the host's shell does."""
    ids = [play.id(number) for number in numbers]
    source = play.kept.batches[play.kept.tasks[ids[0]].batch]
    kept = [play.kept.tasks[task] for task in ids]
    ended = EndedTasks(request_id)
    ended.take(task for task in kept if task.state.is_final)
    one = ids[0] if len(ids) == 1 else None
    earlier = [batch for batch in play.kept.batches.values() if batch.request_id == request_id]
    play.tell(
        RetryAsked(
            a_user(user), request_id, b"digest", source, one, ended, earlier[0] if earlier else None
        )
    )


def test_what_ended_is_made_anew_with_its_place_and_variables(play: Playbook) -> None:
    rows = ({"X": "a"}, {"X": "b"}, {"X": "c"})
    play.run(a_submission(rows=rows))
    play.hear(1, ENDED, node=play.task(1).node, exit_=DONE)
    for number in (2, 3):
        play.hear(number, ENDED, node=play.task(number).node, exit_=FAILED)
    ask(play, 1, 2, 3)
    assert isinstance(play.answer, Retried)
    assert play.answer.submitted is not None
    assert len(list(play.answer.submitted.ids())) == 2
    play.place()
    assert [(o.index, o.size, o.spec.env["X"]) for o in play.orders] == [  # type: ignore[union-attr]
        (1, 3, "b"),
        (2, 3, "c"),
    ]
    assert play.states() == ["completed", "failed", "failed", "assigned", "assigned"]
    assert play.task(4).retry_of == play.id(2)
    first = play.answer.submitted
    ask(play, 1, 2, 3)
    assert play.answer == Retried(replace(first, repeated=True))


def test_a_lost_task_gets_another_attempt(play: Playbook) -> None:
    play.run(a_submission())
    lose(play, N1)
    ask(play, 1)
    assert play.answer == Retried(None, (play.id(1),))
    assert play.place() == ["n2: start #1/2"]
    assert play.task(1).history[-2].actor == "ada"


@pytest.mark.parametrize("crash", [Playbook.restart, lambda _: None])
def test_the_same_request_again_names_the_lost_ones_again_and_changes_nothing(
    play: Playbook, crash: Callable[[Playbook], None]
) -> None:
    play.run(a_submission(array=3))
    assert {play.task(number).node for number in (1, 2, 3)} == {"n1", "n2"}
    play.hear(3, ENDED, node=play.task(3).node, exit_=FAILED)
    lose(play, N1)
    lost = tuple(play.id(number) for number in (1, 2) if play.states()[number - 1] == "lost")
    ask(play, 1, 2, 3)
    first = play.answer
    assert first.requeued == lost
    crash(play)
    ask(play, 1, 2, 3)
    assert play.answer == Retried(replace(first.submitted, repeated=True), lost)
    assert len(play.states()) == 4


@pytest.mark.parametrize("crash", [Playbook.restart, lambda _: None])
def test_a_lost_task_is_requeued_once_by_one_request(
    play: Playbook, crash: Callable[[Playbook], None]
) -> None:
    play.run(a_submission())
    lose(play, N1)
    ask(play, 1)
    first = play.answer
    crash(play)
    ask(play, 1)
    assert play.answer == first == Retried(None, (play.id(1),))
    assert play.task(1).attempt == 1


def test_what_a_repeated_request_gave_another_attempt_is_not_made_anew_once_it_ends(
    play: Playbook,
) -> None:
    play.run(a_submission())
    lose(play, N1)
    ask(play, 1)
    first = play.answer
    assert play.place() == ["n2: start #1/2"]
    play.hear(1, ENDED, node="n2", attempt=2, exit_=FAILED)
    ask(play, 1)
    assert play.answer == first
    play.restart()
    ask(play, 1)
    assert play.answer == first
    assert play.states() == ["failed"]


def test_what_is_under_way_or_completed_is_not_tried_again(play: Playbook) -> None:
    play.run(a_submission())
    ask(play, 1)
    assert isinstance(play.refusal, Conflict)
    assert str(play.refusal) == (
        f"task {play.id(1)} is running; only what is lost or ended is tried again"
    )
    play.hear(1, ENDED, exit_=DONE)
    ask(play, 1)
    assert str(play.refusal) == "nothing to try again: all of it completed"


def test_only_the_owner_and_operators_try_again_and_the_owner_stays_the_owner(
    play: Playbook,
) -> None:
    play.run(a_submission())
    play.hear(1, ENDED, exit_=FAILED)
    ask(play, 1, user="bob")
    assert isinstance(play.refusal, Forbidden)
    source = play.kept.batches[play.task(1).batch]
    ended = EndedTasks("retry-001")
    ended.take([play.task(1)])
    play.tell(RetryAsked(OPERATOR, "retry-001", b"", source, None, ended))
    play.place()
    assert play.task(2).owner == "ada"
    assert play.task(2).history[0].actor == OPERATOR.user


def test_a_gang_is_tried_again_as_a_whole(play: Playbook) -> None:
    play.run(a_submission(array=2, gang=True))
    for number, exit_ in ((1, FAILED), (2, FAILED)):
        play.hear(number, ENDED, node=play.task(number).node, exit_=exit_)
    ask(play, 1)
    assert isinstance(play.refusal, Conflict)
    assert "as a whole" in str(play.refusal)
    ask(play, 1, 2)
    assert len(play.place()) == 2


def test_a_retry_of_some_targets_goes_where_those_were_sent(play: Playbook) -> None:
    play.run(a_submission(targets=["n1", "n2"]))
    play.hear(2, ENDED, node="n2", exit_=FAILED)
    ask(play, 2)
    assert play.place() == ["n2: start #3/1"]


def test_a_retry_keeps_only_the_rows_and_targets_it_needs_and_can_be_retried(
    play: Playbook,
) -> None:
    play.run(a_submission(rows=tuple({"X": str(number)} for number in range(5))))
    for number in (2, 4):
        play.hear(number, ENDED, node=play.task(number).node, exit_=FAILED)
    ask(play, 2, 4)
    play.place()
    assert play.kept.batches[play.task(6).batch].rows == ({"X": "1"}, {"X": "3"})
    for number in (6, 7):
        play.hear(number, ENDED, node=play.task(number).node, exit_=FAILED)
    ask(play, 7, request_id="retry-002")
    play.place()
    assert play.kept.batches[play.task(8).batch].rows == ({"X": "3"},)
    assert [(o.index, o.spec.env["X"]) for o in play.orders] == [(3, "3")]  # type: ignore[union-attr]


def test_a_gang_of_which_some_completed_is_tried_again_as_a_whole(play: Playbook) -> None:
    play.run(a_submission(array=2, gang=True))
    for number, exit_ in ((1, DONE), (2, FAILED)):
        play.hear(number, ENDED, node=play.task(number).node, exit_=exit_)
    ask(play, 1, 2)
    assert len(play.place()) == 2


def test_what_never_began_because_of_another_is_not_tried_again_without_it(
    play: Playbook,
) -> None:
    play.run(a_submission())
    play.tell(a_submission(request_id="request-2", after=(play.id(1),)))
    play.hear(1, ENDED, exit_=FAILED)
    ask(play, 2)
    assert isinstance(play.refusal, Conflict)
    assert "never began" in str(play.refusal)


def test_a_retry_for_a_node_that_was_removed_is_refused(play: Playbook) -> None:
    play.run(a_submission(targets=["n1"]))
    play.hear(1, ENDED, exit_=FAILED)
    play.tell(RemoveAsked(OPERATOR, "n1", force=True))
    ask(play, 1)
    assert "no node is called 'n1'" in str(play.refusal)
