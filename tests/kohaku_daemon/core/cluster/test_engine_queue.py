"""What waits for others, and what begins together or not at all."""

from typing import Any

import pytest

from kohaku_daemon.core.cluster.events import (
    RemoveAsked,
    RunnerBeat,
    RunnerGone,
    RunnerReported,
    Ticked,
)
from kohaku_daemon.core.cluster.views import explain_task
from protocol.errors import BadRequest, Conflict, NoFit, NotFound, Unavailable
from protocol.ids import NodeName
from protocol.messages.runner import AttemptState
from protocol.models.access import Role
from protocol.models.node import Readings
from protocol.models.task import Cause, Exit, TaskState
from tests.support.builders import a_cluster, a_node, a_spec, a_submission, a_user, an_inventory
from tests.support.playbook import Playbook

ENDED, RUNNING = AttemptState.ENDED, AttemptState.RUNNING
DONE, FAILED = Exit(Cause.EXITED, code=0), Exit(Cause.EXITED, code=3)
OPERATOR = a_user("op", Role.OPERATOR)


@pytest.fixture
def play() -> Playbook:
    return Playbook(a_cluster([a_node("n1")]))


def submit(play: Playbook, request_id: str, *, cores: int = 1, **more: Any) -> int:
    """Submit, and give the id of the batch."""
    play.tell(a_submission(a_spec(cores=cores), request_id=request_id, **more))
    if play.refusal is not None:
        raise play.refusal
    return int(play.answer.batch)


def why(play: Playbook, number: int) -> str:
    state = play.engine.state
    return explain_task(state, state.tasks[play.id(number)]).summary


# Waiting for others -------------------------------------------------------------------------


def test_a_task_begins_when_all_it_waits_for_has_completed(play: Playbook) -> None:
    submit(play, "request-1", array=2)
    submit(play, "request-2", after=(play.id(1), play.id(2)))
    assert play.place() == ["n1: start #1/1", "n1: start #2/1"]
    assert why(play, 3) == (
        f"waits for task {play.id(1)} (assigned), task {play.id(2)} (assigned) to complete"
    )
    play.hear(1, ENDED, exit_=DONE)
    assert play.place() == []
    play.hear(2, ENDED, exit_=DONE)
    assert play.place() == ["n1: start #3/1"]


def test_a_batch_can_be_waited_for_as_a_whole(play: Playbook) -> None:
    batch = submit(play, "request-1", array=2)
    submit(play, "request-2", after=(batch,))
    play.place()
    assert why(play, 3) == f"waits for batch {batch} (2 tasks left) to complete"
    for number in (1, 2):
        assert play.states()[2] == "queued"
        play.hear(number, ENDED, exit_=DONE)
    assert play.place() == ["n1: start #3/1"]


@pytest.mark.parametrize("end", [FAILED, Exit(Cause.OOM, signal=9)])
def test_what_waits_for_a_task_that_does_not_complete_fails_all_the_way_down(
    play: Playbook, end: Exit
) -> None:
    first = submit(play, "request-1", array=2)
    submit(play, "request-2", after=(play.id(1),))
    submit(play, "request-3", after=(first,))
    submit(play, "request-4", after=(play.id(3), play.id(4)), array=2)
    play.place()
    play.hear(1, ENDED, exit_=end)
    assert play.states()[2:] == ["failed"] * 4
    exit_ = play.task(3).exit
    assert exit_ is not None
    assert exit_.cause is Cause.DEPENDENCY
    assert exit_.status == 1
    assert play.task(3).reason.startswith(
        f"never began: task {play.id(1)}, which it had to wait for, "
    )
    assert str(play.id(1)) in play.task(5).reason
    assert play.engine.state.dependents == {}


def test_the_end_of_a_chain_of_a_thousand_is_a_few_steps(play: Playbook) -> None:
    submit(play, "request-1")
    for number in range(1, 1001):
        submit(play, f"request-{number + 1}", after=(play.id(number),))
    play.kill(1)
    assert 2 <= play.finish() <= 5
    assert set(play.states()[1:]) == {"failed"}


def test_killing_what_waits_frees_nothing_and_ends_its_waiting(play: Playbook) -> None:
    submit(play, "request-1")
    submit(play, "request-2", after=(play.id(1),))
    play.kill(2)
    assert play.states() == ["queued", "killed"]
    assert play.engine.state.dependents == {}
    play.place()
    play.hear(1, ENDED, exit_=DONE)


def test_waiting_for_what_has_completed_is_no_waiting(play: Playbook) -> None:
    batch = submit(play, "request-1")
    play.place()
    play.hear(1, ENDED, exit_=DONE)
    event = a_submission(request_id="request-2", after=(play.id(1), batch))
    known = {int(play.id(1)): TaskState.COMPLETED, batch: TaskState.COMPLETED}
    play.tell(type(event)(event.actor, event.request, event.digest, None, known))
    assert play.place() == ["n1: start #2/1"]


def test_nothing_can_wait_for_what_is_unknown_or_did_not_complete(play: Playbook) -> None:
    with pytest.raises(NotFound, match="no task or batch 5"):
        submit(play, "request-1", after=(5,))
    batch = submit(play, "request-2", array=2)
    play.place()
    play.hear(1, ENDED, exit_=FAILED)
    with pytest.raises(Conflict, match=f"after: {batch} did not complete"):
        submit(play, "request-3", after=(batch,))
    with pytest.raises(BadRequest, match="at most 100"):
        submit(play, "request-4", after=tuple(range(1, 200)))


def test_waiting_goes_on_over_a_restart_of_the_host(play: Playbook) -> None:
    batch = submit(play, "request-1", array=2)
    submit(play, "request-2", after=(play.id(1),))
    submit(play, "request-3", after=(batch,))
    play.place()
    play.hear(1, RUNNING)
    play.restart()
    assert play.engine.state.dependents.keys() == {int(play.id(1)), batch}
    play.hear(1, ENDED, exit_=DONE)
    play.restart()
    assert play.engine.state.dependents.keys() == {batch}
    assert play.states()[2:] == ["queued", "queued"]


# Gangs --------------------------------------------------------------------------------------


@pytest.fixture
def two() -> Playbook:
    return Playbook(a_cluster([a_node("n1", an_inventory(4)), a_node("n2", an_inventory(4))]))


def test_a_gang_begins_when_all_of_it_fits(two: Playbook) -> None:
    submit(two, "request-1", cores=1)
    two.place()
    submit(two, "request-2", cores=4, array=2, gang=True)
    submit(two, "request-3", cores=2)
    assert two.place() == [], "both nodes are kept free for the gang"
    assert "its gang of 2 begins together" in why(two, 2)
    assert "kept free for task" in str(
        explain_task(two.engine.state, two.engine.state.tasks[two.id(4)]).nodes
    )
    two.hear(1, ENDED, exit_=DONE)
    assert two.place() == ["n1: start #2/1", "n2: start #3/1"]


def test_a_gang_says_that_the_nodes_that_are_left_have_no_room_for_it(two: Playbook) -> None:
    two.tell(RunnerGone(NodeName("n2"), "cut off"))
    submit(two, "request-1", cores=3, array=2, gang=True)
    assert why(two, 1) == (
        "waits: the nodes in service have no room for all of it, even idle;"
        " its gang of 2 begins together or not at all"
    )
    submit(two, "request-2", cores=3)
    assert (
        why(two, 3) == "waits for room: 1 of 2 nodes could hold it when idle; n2 is out of service"
    )


def test_two_gangs_that_want_all_take_turns(two: Playbook) -> None:
    submit(two, "request-1", cores=4, array=2, gang=True)
    submit(two, "request-2", cores=4, array=2, gang=True)
    assert two.place() == ["n1: start #1/1", "n2: start #2/1"]
    two.hear(1, ENDED, exit_=DONE)
    assert two.place() == []
    two.hear(2, ENDED, exit_=DONE, node="n2")
    assert two.place() == ["n1: start #3/1", "n2: start #4/1"]


def test_a_gang_that_could_never_fit_is_refused_if_all_nodes_are_there(two: Playbook) -> None:
    with pytest.raises(NoFit, match="3 tasks of this gang do not fit together"):
        submit(two, "request-1", cores=4, array=3, gang=True)
    assert submit(two, "request-2", cores=4, array=3)


def test_members_of_a_gang_are_not_tried_again_one_by_one(two: Playbook) -> None:
    spec = a_spec(retries=1)
    two.tell(a_submission(spec, array=2, gang=True))
    assert "together" in str(two.refusal)


def test_a_gang_of_which_one_cannot_start_ends(two: Playbook) -> None:
    submit(two, "request-1", array=3, gang=True)
    two.place()
    two.hear(2, RUNNING, node=two.task(2).node)
    no = Exit(Cause.START_FAILED, message="no such file")
    lines = two.hear(1, ENDED, exit_=no, node=two.task(1).node)
    kills = sorted(line.split(": ")[1] for line in lines if "kill" in line and ": " in line)
    assert kills == ["kill #2/1", "kill #3/1"]
    assert two.task(2).history[-1].cause == f"task {two.id(1)} of its gang did not begin"
    for number in (2, 3):
        killed = Exit(Cause.SIGNALLED, signal=15)
        two.hear(number, ENDED, exit_=killed, node=two.task(number).node)
    assert two.states() == ["failed", "killed", "killed"]


def test_killing_one_of_a_gang_that_waits_ends_it_and_one_that_runs_does_not(
    two: Playbook,
) -> None:
    submit(two, "request-1", cores=4)
    two.place()
    submit(two, "request-2", cores=4, array=2, gang=True)
    two.kill(2)
    assert two.states() == ["assigned", "killed", "killed"]
    assert two.task(3).exit == Exit(
        Cause.GANG, message=f"task {two.id(2)} of its gang did not begin"
    )
    submit(two, "request-3", cores=1, array=2, gang=True)
    two.place()
    for number in (4, 5):
        two.hear(number, RUNNING, node=two.task(number).node)
    two.hear(4, ENDED, exit_=FAILED, node=two.task(4).node)
    assert two.states()[3:] == ["failed", "running"]


def test_a_gang_waits_as_one_over_a_restart_of_the_host(two: Playbook) -> None:
    submit(two, "request-1", cores=4)
    two.place()
    submit(two, "request-2", cores=4, array=2, gang=True)
    two.restart()
    state = two.engine.state
    assert all(two.id(number) in state.backlog for number in (2, 3))
    for node in ("n1", "n2"):
        assert state.fleet.nodes[node].site.closed  # type: ignore[index]


def test_a_gang_that_waits_for_others_and_for_nothing_ends_as_one(two: Playbook) -> None:
    submit(two, "request-1")
    submit(two, "request-2", array=2, gang=True, after=(two.id(1),))
    two.kill(1)
    assert two.states() == ["killed", "failed", "failed"]


def test_removing_a_node_ends_a_gang_that_had_not_begun_there(two: Playbook) -> None:
    submit(two, "request-1", cores=4, array=2, gang=True)
    two.place()
    two.tell(RemoveAsked(OPERATOR, "n1", force=True))
    assert two.states()[0] == "killed"
    assert two.task(2).kill_asked_by == "the cluster"
    two.tell(Ticked())


def test_the_first_of_a_chain_says_why_the_last_never_began(play: Playbook) -> None:
    submit(play, "request-1")
    for number in range(1, 50):
        submit(play, f"request-{number + 1}", after=(play.id(number),))
    play.kill(1)
    assert play.task(50).reason == (
        f"never began: task {play.id(1)}, which it had to wait for, "
        "killed by ada: it was still waiting"
    )


def test_what_has_just_ended_is_not_called_unknown(play: Playbook) -> None:
    event = a_submission(request_id="request-2", after=(9,))
    known = {9: TaskState.RUNNING}
    play.tell(type(event)(event.actor, event.request, event.digest, None, known))
    assert isinstance(play.refusal, Unavailable)


def test_a_short_task_goes_past_a_hold_once_the_end_of_what_is_in_its_way_is_known() -> None:
    play = Playbook(a_cluster([a_node("n1", an_inventory(4))]))
    play.tell(a_submission(a_spec(cores=3, time_limit_s=3600), request_id="request-1"))
    play.place()
    play.tell(a_submission(a_spec(cores=4), request_id="request-2"))
    play.tell(a_submission(a_spec(cores=1, time_limit_s=60), request_id="request-3"))
    assert play.place() == []
    play.hear(1, RUNNING)
    assert play.place() == ["n1: start #3/1"]


def test_named_gpus_and_numa_nodes_of_a_gang_are_seated_first() -> None:
    play = Playbook(a_cluster([a_node("n1", an_inventory(4, gpus=2))]))
    spec = a_spec(gpus=1)
    play.tell(a_submission(spec, targets=["n1", "n1::0"], gang=True))
    assert len(play.place()) == 2


def test_a_gang_waits_for_what_is_only_out_of_service(two: Playbook) -> None:
    fault = Readings(gpus=())
    two.tell(RunnerBeat(NodeName("n1"), fault))
    two.tell(RunnerGone(NodeName("n2"), "the link broke"))
    submit(two, "request-1", cores=4, array=2, gang=True)
    assert two.place() == []


def test_after_some_time_more_nodes_are_kept_for_what_still_fits_nowhere(two: Playbook) -> None:
    """What runs on the one kept node never ends; others on the other node end all the time."""
    for node in ("n1", "n2"):
        play_at(two, node, f"endless-{node}")
    two.tell(a_submission(a_spec(cores=4), request_id="request-big"))
    two.place()
    big = max(two.kept.tasks)
    for step in range(200):
        running = [t for t in two.kept.tasks.values() if t.node == "n2" and not t.state.is_final]
        play_at(two, "n2", f"small-{step:05}")
        for task in running:
            done = two.report(task.id, ENDED, exit_=DONE)
            two.now += 60.0
            two.tell(RunnerReported(NodeName("n2"), (done,)))
        two.place()
        if two.kept.tasks[big].state is not TaskState.QUEUED:
            return
    raise AssertionError("it was passed over for more than three hours")


def play_at(play: Playbook, node: str, request_id: str) -> None:
    play.tell(a_submission(a_spec(cores=1), request_id=request_id, targets=[node]))
    play.place()
