"""What takes long is done in pieces: nobody waits long meanwhile, and no crash loses the rest."""

from collections.abc import Callable
from typing import Any

import pytest

from kohaku_daemon.core.cluster.ended import EndedTasks
from kohaku_daemon.core.cluster.events import (
    PlacementDue,
    RetryAsked,
    SteerAsked,
    Verb,
    WholeAsked,
    WorkDue,
)
from kohaku_daemon.core.cluster.long_work import PIECE
from kohaku_daemon.core.cluster.views import explain_task
from protocol.messages.runner import AttemptState
from protocol.messages.task import Retried, SteerResult, Submitted
from protocol.models.task import Cause, Exit
from tests.support.builders import OPERATOR, a_cluster, a_node, a_spec, a_submission
from tests.support.playbook import Playbook

MANY = 3 * PIECE
ENDED = AttemptState.ENDED
DONE, FAILED = Exit(Cause.EXITED, code=0), Exit(Cause.EXITED, code=3)


@pytest.fixture
def play() -> Playbook:
    """Give a host with one node of four cores, taken by the first task."""
    play = Playbook(a_cluster([a_node("n1")]))
    play.run(a_submission(a_spec(cores=4), request_id="the-first"))
    return play


def submit(play: Playbook, request_id: str = "the-many", **more: Any) -> None:
    play.tell(a_submission(request_id=request_id, array=MANY, **more))


def count(play: Playbook, state: str) -> int:
    return play.states().count(state)


def in_pieces(play: Playbook) -> list[int]:
    """Do what is under way, and give how many tasks each piece changed."""
    sizes = []
    while play.engine.has_work:
        before = [task.history for task in play.kept.tasks.values()]
        play.tell(WorkDue())
        after = [task.history for task in play.kept.tasks.values()]
        changed = sum(one != other for one, other in zip(before, after, strict=False))
        sizes.append(changed + len(after) - len(before))
    return sizes


def test_a_large_submission_is_made_in_pieces_and_answered_when_it_is_whole(
    play: Playbook,
) -> None:
    submit(play)
    assert play.answer is None
    assert len(play.kept.tasks) == 1 + 1 + PIECE
    play.tell(WorkDue())
    assert play.answer is None
    play.finish()
    assert isinstance(play.answer, Submitted)
    assert list(play.answer.ids()) == sorted(play.kept.tasks)[1:]
    assert [play.kept.tasks[one].index for one in play.answer.ids()] == list(range(MANY))
    assert not any(task.folded for task in play.kept.tasks.values())
    assert len(play.engine.state.backlog) == MANY


def test_the_same_request_again_is_answered_when_it_is_whole(play: Playbook) -> None:
    submit(play)
    assert "answer later" in play.tell(a_submission(request_id="the-many", array=MANY))
    play.tell(WholeAsked(max(play.engine.state.batches)))
    answers = []
    while play.engine.has_work:
        lines = play.tell(WorkDue())
        answers.append((lines.count("answer"), len(play.kept.tasks) - 1))
    assert {made for said, made in answers if said} == {MANY}
    submit(play)
    assert play.answer.repeated


def test_a_submission_that_a_crash_cut_short_is_whole_in_the_end(play: Playbook) -> None:
    submit(play)
    batch = max(play.kept.batches)
    while play.engine.has_work:
        play.tell(WorkDue())
        play.restart()
    assert list(play.kept.batches[batch].ids()) == sorted(play.kept.tasks)[1:]
    assert count(play, "queued") == MANY
    assert len(play.engine.state.backlog) == MANY
    assert len({task.history for task in list(play.kept.tasks.values())[1:]}) == 1
    submit(play)
    assert play.answer.batch == batch
    assert play.answer.repeated


@pytest.mark.parametrize("crash", [Playbook.restart, lambda _: None])
def test_what_is_killed_while_its_batch_is_made_ends(
    play: Playbook, crash: Callable[[Playbook], None]
) -> None:
    submit(play)
    last = max(play.kept.tasks)
    play.tell(SteerAsked(OPERATOR, Verb.KILL, (last,)))
    assert play.answer == SteerResult(1)
    crash(play)
    play.finish()
    assert play.kept.tasks[last].state == "killed"
    assert count(play, "queued") == MANY - 1


def test_the_end_of_a_batch_is_asked_for_in_pieces_from_behind(play: Playbook) -> None:
    submit(play)
    play.finish()
    batch = max(play.kept.batches)
    play.tell(SteerAsked(OPERATOR, Verb.KILL, batch=batch))
    assert play.answer is None
    assert play.kept.tasks[max(play.kept.tasks)].state == "killed"
    assert play.kept.tasks[min(play.kept.batches[batch].ids())].state == "queued"
    assert in_pieces(play)[:2] == [PIECE, PIECE]
    assert play.answer == SteerResult(MANY)
    assert count(play, "killed") == MANY


def test_a_batch_is_ended_whole_while_it_is_made(play: Playbook) -> None:
    submit(play)
    play.tell(SteerAsked(OPERATOR, Verb.KILL, batch=max(play.kept.batches)))
    play.finish()
    assert play.answer == SteerResult(MANY)
    assert count(play, "killed") == MANY


def test_a_kill_that_was_cut_short_does_the_rest_when_it_is_repeated(play: Playbook) -> None:
    submit(play)
    play.finish()
    kill = SteerAsked(OPERATOR, Verb.KILL, batch=max(play.kept.batches))
    play.tell(kill)
    play.restart()
    assert not play.engine.has_work
    assert count(play, "killed") == PIECE
    play.tell(kill)
    play.finish()
    assert play.answer == SteerResult(MANY - PIECE)
    assert count(play, "killed") == MANY


def test_others_have_their_turn_between_two_pieces(play: Playbook) -> None:
    submit(play, "the-others")
    submit(play)
    play.tell(a_submission(request_id="a-small-one"))
    assert isinstance(play.answer, Submitted)
    assert in_pieces(play)[:2] == [PIECE, PIECE]


def test_what_waited_in_vain_falls_in_pieces_and_over_restarts(play: Playbook) -> None:
    submit(play, after=(play.id(1),))
    play.finish()
    play.hear(1, ENDED, exit_=FAILED)
    assert count(play, "failed") < MANY
    waiting = next(iter(play.engine.state.tasks.values()))
    assert explain_task(play.engine.state, waiting).summary.startswith("is about to end: task")
    while play.engine.has_work:
        play.restart()
        play.tell(PlacementDue())
        assert play.orders == []
        play.tell(WorkDue())
    assert count(play, "failed") == MANY + 1
    assert {task.exit.cause for task in list(play.kept.tasks.values())[1:] if task.exit} == {
        Cause.DEPENDENCY
    }


def test_what_falls_while_it_is_made_is_made_and_falls(play: Playbook) -> None:
    submit(play, after=(play.id(1),))
    play.hear(1, ENDED, exit_=FAILED)
    play.finish()
    assert count(play, "failed") == MANY + 1


def test_what_was_waited_for_lets_many_into_the_queue_in_pieces(play: Playbook) -> None:
    submit(play, after=(play.id(1),))
    play.finish()
    play.hear(1, ENDED, exit_=DONE)
    assert len(play.engine.state.backlog) <= PIECE
    last = play.engine.state.tasks[max(play.kept.tasks)]
    assert "is about to enter the queue" in explain_task(play.engine.state, last).summary
    assert len(play.place()) == 4
    play.finish()
    assert len(play.engine.state.backlog) == MANY - 4


def test_many_are_tried_again_in_pieces_also_over_a_restart(play: Playbook) -> None:
    submit(play)
    play.finish()
    source = play.kept.batches[max(play.kept.batches)]
    play.tell(SteerAsked(OPERATOR, Verb.KILL, batch=source.id))
    play.finish()
    ended = EndedTasks("retry-0001")
    ended.take(play.kept.tasks[name] for name in source.ids())
    play.tell(RetryAsked(OPERATOR, "retry-0001", b"digest", source, None, ended))
    assert play.answer is None
    play.restart()
    play.finish()
    made = max(play.kept.batches)
    tasks = [play.kept.tasks[name] for name in play.kept.batches[made].ids()]
    assert [task.retry_of for task in tasks] == list(source.ids())
    assert {task.history[0].actor for task in tasks} == {OPERATOR.user}
    earlier = play.kept.batches[made]
    play.tell(RetryAsked(OPERATOR, "retry-0001", b"digest", source, None, ended, earlier))
    assert play.answer == Retried(Submitted(earlier.id, earlier.runs, repeated=True))
