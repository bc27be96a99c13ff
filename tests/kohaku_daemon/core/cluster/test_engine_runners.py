"""Runners come, report, fall silent, come back and forget; the books follow, and no further."""

import pytest
from msgspec.structs import replace

from kohaku_daemon.core.cluster.events import RunnerBeat, RunnerGone, RunnerReported, Ticked
from protocol.ids import BatchId, NodeName, TaskId
from protocol.messages.runner import AttemptReport, AttemptState, OrderStart
from protocol.models.node import GpuReading, NodeState, Readings
from protocol.models.task import Cause, Exit
from tests.support.builders import a_cluster, a_node, a_spec, a_submission, an_inventory, registered
from tests.support.playbook import Playbook

ACCEPTED, RUNNING = AttemptState.ACCEPTED, AttemptState.RUNNING
PAUSED, ENDED = AttemptState.PAUSED, AttemptState.ENDED
DONE = Exit(Cause.EXITED, code=0)
N1 = NodeName("n1")


@pytest.fixture
def play() -> Playbook:
    return Playbook(a_cluster([a_node("n1")]))


def back(play: Playbook, *reports: AttemptReport) -> list[str]:
    """Let n1 register again; give the orders and what became of tasks."""
    lines = play.tell(registered("n1", an_inventory(), attempts=reports))
    return [line for line in lines if ": " in line or line.startswith("save #")]


def long_silence(play: Playbook) -> list[str]:
    """Let n1 be away until its tasks are given up."""
    play.tell(RunnerGone(N1, "the link broke"))
    return play.tell(Ticked(), after_s=121.0)


# Reports ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exit_", "state", "reason"),
    [
        (DONE, "completed", "exited with 0"),
        (Exit(Cause.EXITED, code=3), "failed", "exited with 3"),
        (Exit(Cause.SIGNALLED, signal=9), "failed", "ended by signal 9"),
        (Exit(Cause.OOM, signal=9), "oom_killed", "ran out of memory"),
        (Exit(Cause.START_FAILED, message="no such file"), "failed", "could not be started: no"),
        (None, "failed", "its node failed: the runner gave no reason"),
    ],
)
def test_an_end_is_kept_with_its_reason_and_frees_the_claim(
    play: Playbook, exit_: Exit | None, state: str, reason: str
) -> None:
    play.run(a_submission(a_spec(cores=4)))
    play.now += 10
    assert play.hear(1, ENDED, exit_=exit_) == [f"save #1 {state}", "show n1", "answer"]
    task = play.task(1)
    assert task.reason.startswith(reason)
    assert (task.started_at, task.ended_at) == (play.now, play.now)
    assert play.engine.state.fleet.nodes[N1].site.books.claims == {}


def test_a_report_that_is_repeated_changes_nothing(play: Playbook) -> None:
    play.tell(a_submission())
    play.place()
    for state in (ACCEPTED, RUNNING, PAUSED, ENDED):
        assert len(play.hear(1, state, note="a note")) > 1
        assert play.hear(1, state, note="a note") == ["answer"]


def test_a_report_that_is_older_than_what_is_known_changes_nothing(play: Playbook) -> None:
    play.run(a_submission())
    assert play.hear(1, ACCEPTED) == ["answer"]
    play.hear(1, ENDED, exit_=DONE)
    for state in AttemptState:
        assert play.hear(1, state) == ["answer"]
    assert play.states() == ["completed"]


def test_steps_that_were_missed_are_skipped(play: Playbook) -> None:
    play.tell(a_submission())
    play.place()
    assert play.hear(1, PAUSED)[0] == "save #1 paused"


def test_only_the_node_and_the_attempt_of_the_books_are_believed() -> None:
    play = Playbook(a_cluster([a_node("n1"), a_node("n2")]))
    play.run(a_submission(targets=["n1"]))
    assert play.hear(1, ENDED, node="n2") == ["answer"]
    assert play.hear(1, ENDED, attempt=2) == ["answer"]
    assert play.hear(1, ENDED, attempt=0) == ["answer"]
    assert play.hear(1, ENDED, node="unheard-of") == ["answer"]
    assert play.states() == ["running"]


def test_what_never_existed_is_acknowledged_so_that_its_runner_may_forget_it(
    play: Playbook,
) -> None:
    report = AttemptReport(task=TaskId(99), attempt=1, state=ENDED)
    assert play.tell(RunnerReported(N1, (report,))) == ["answer"]


def test_a_runner_whose_clock_is_ahead_ends_nothing_in_the_future(play: Playbook) -> None:
    play.run(a_submission())
    report = replace(play.report(play.id(1), ENDED, exit_=DONE), at=play.now + 3600)
    play.tell(RunnerReported(N1, (report,)))
    assert play.task(1).ended_at == play.now


# Away and back ------------------------------------------------------------------------------


def test_a_link_that_breaks_changes_no_task(play: Playbook) -> None:
    play.run(a_submission())
    assert play.tell(RunnerGone(N1, "the link broke")) == ["show n1", "diary node.offline"]
    assert play.states() == ["running"]
    assert play.tell(RunnerGone(N1, "again")) == []
    assert play.tell(Ticked(), after_s=119.0) == []
    assert back(play, play.report(play.id(1), RUNNING)) == []
    assert play.states() == ["running"]


def test_a_node_that_is_away_gets_nothing_new(play: Playbook) -> None:
    play.tell(RunnerGone(N1, "the link broke"))
    play.tell(a_submission())
    assert play.place() == []
    back(play)
    assert play.place() == ["n1: start #1/1"]


def test_lost_and_back_alive(play: Playbook) -> None:
    play.run(a_submission())
    assert long_silence(play) == ["show n1", "diary node.lost", "save #1 lost", "diary task.lost"]
    assert play.task(1).reason == "n1 has been away too long"
    assert play.tell(Ticked(), after_s=999.0) == []
    assert back(play, play.report(play.id(1), RUNNING)) == ["save #1 running"]


def test_lost_and_back_with_the_news_of_its_end(play: Playbook) -> None:
    play.run(a_submission())
    long_silence(play)
    assert back(play, play.report(play.id(1), ENDED, exit_=DONE)) == ["save #1 completed"]


def test_a_lost_task_keeps_its_claim(play: Playbook) -> None:
    play.run(a_submission(a_spec(cores=4)))
    long_silence(play)
    play.tell(a_submission(request_id="the-next"))
    back(play, play.report(play.id(1), RUNNING))
    assert play.place() == []


def test_an_order_that_was_lost_on_the_way_is_given_again(play: Playbook) -> None:
    play.tell(a_submission())
    play.place()
    (ordered,) = play.orders
    play.tell(RunnerGone(N1, "the link broke"))
    assert back(play) == ["n1: start #1/1"]
    assert play.orders == [ordered]


def test_also_if_its_task_was_given_up_meanwhile(play: Playbook) -> None:
    play.tell(a_submission())
    play.place()
    long_silence(play)
    assert back(play) == ["n1: start #1/1"]
    assert play.hear(1, ACCEPTED)[0] == "save #1 preparing"


def test_an_order_that_arrived_is_not_given_again(play: Playbook) -> None:
    play.tell(a_submission())
    play.place()
    play.tell(RunnerGone(N1, "the link broke"))
    assert back(play, play.report(play.id(1), ACCEPTED)) == ["save #1 preparing"]


@pytest.mark.parametrize("seen", [ACCEPTED, RUNNING, PAUSED])
def test_a_runner_that_forgot_an_attempt_does_not_get_it_again(
    play: Playbook, seen: AttemptState
) -> None:
    play.tell(a_submission())
    play.place()
    play.hear(1, seen)
    assert back(play) == ["save #1 lost"]
    assert play.task(1).reason == "n1 no longer knows it"
    assert back(play) == []


def test_a_runner_that_remembers_after_all_is_believed(play: Playbook) -> None:
    play.run(a_submission())
    back(play)
    assert back(play, play.report(play.id(1), RUNNING)) == ["save #1 running"]


def test_a_task_the_store_has_as_ended_is_ended_on_its_node_too(play: Playbook) -> None:
    report = AttemptReport(task=TaskId(99), attempt=2, state=RUNNING)
    event = registered("n1", an_inventory(), attempts=(report,), ended=frozenset({TaskId(99)}))
    assert "n1: kill #1/2" in play.tell(event)


def test_a_task_this_host_never_heard_of_is_left_alone(play: Playbook) -> None:
    report = AttemptReport(task=TaskId(99), attempt=1, state=RUNNING)
    lines = play.tell(registered("n1", an_inventory(), attempts=(report,)))
    assert lines == ["keep node n1", "show n1", "diary task.unknown", "answer"]


# Heartbeats ---------------------------------------------------------------------------------


def test_a_link_that_is_open_and_silent_counts_as_down_until_it_speaks(play: Playbook) -> None:
    assert play.tell(Ticked(), after_s=9.0) == []
    assert play.tell(RunnerBeat(N1, Readings())) == ["show readings of n1"]
    assert play.tell(Ticked(), after_s=11.0) == ["show n1", "diary node.offline"]
    assert play.tell(RunnerBeat(N1, Readings())) == [
        "show readings of n1",
        "show n1",
        "diary node.online",
    ]


def test_after_a_long_silence_it_has_to_say_what_became_of_its_tasks(play: Playbook) -> None:
    play.run(a_submission())
    play.tell(Ticked(), after_s=11.0)
    play.tell(Ticked(), after_s=121.0)
    assert play.states() == ["lost"]
    assert play.tell(RunnerBeat(N1, Readings())) == ["close the link of n1"]
    assert play.engine.state.fleet.nodes[N1].state is NodeState.LOST
    assert back(play, play.report(play.id(1), RUNNING)) == ["save #1 running"]


def test_a_heartbeat_of_a_node_that_was_removed_is_nothing(play: Playbook) -> None:
    assert play.tell(RunnerBeat(NodeName("gone"), Readings())) == []


def test_a_gpu_that_fails_gets_no_task_until_it_is_well() -> None:
    inventory = an_inventory(gpus=2)
    play = Playbook(a_cluster([a_node("n1", inventory)]))
    broken = Readings(gpus=(GpuReading("GPU-0", fault="fell off the bus"), GpuReading("GPU-1")))
    assert play.tell(RunnerBeat(N1, broken)) == [
        "show readings of n1",
        "diary node.gpu_fault",
        "show n1",
    ]
    assert play.tell(RunnerBeat(N1, broken)) == ["show readings of n1"]
    play.tell(a_submission(a_spec(gpus=1), array=2))
    assert play.place() == ["n1: start #1/1"]
    claim = play.task(1).claim
    assert claim is not None
    assert claim.gpus == ("GPU-1",)
    # A new link repairs nothing.
    play.tell(registered("n1", inventory, attempts=(play.report(play.id(1), RUNNING),)))
    assert play.place() == []
    play.tell(RunnerBeat(N1, Readings(gpus=(GpuReading("GPU-0"), GpuReading("GPU-1")))))
    assert play.place() == ["n1: start #2/1"]


def test_a_node_that_came_back_smaller_keeps_its_tasks_and_takes_what_is_left(
    play: Playbook,
) -> None:
    play.run(a_submission(a_spec(cores=3)))
    play.tell(a_submission(a_spec(cores=1), request_id="the-next", array=2))
    running = play.report(play.id(1), RUNNING)
    play.tell(registered("n1", an_inventory(cores=2), attempts=(running,)))
    assert play.place() == []
    play.hear(1, ENDED)
    assert play.place() == ["n1: start #2/1", "n1: start #3/1"]


# The host restarts --------------------------------------------------------------------------


def test_a_host_that_restarts_knows_all_it_had_answered_and_ordered() -> None:
    play = Playbook(a_cluster([a_node("n1", an_inventory(8, gpus=2)), a_node("n2")]))
    play.run(a_submission(a_spec(gpus=1), array=2))
    play.tell(a_submission(a_spec(cores=3, priority=5), request_id="three-more", array=3))
    play.place()
    play.tell(a_submission(a_spec(cores=4), request_id="both-wait", targets=["n2", "n1"]))
    play.hear(1, ENDED, exit_=DONE)
    play.hear(2, PAUSED)
    before = play.engine.state
    play.restart()
    after = play.engine.state
    assert after.tasks == before.tasks
    for name, node in before.fleet.nodes.items():
        again = after.fleet.nodes[name]
        assert again.record == node.record
        assert again.site.books.claims == node.site.books.claims
        assert again.site.books.free_cores == node.site.books.free_cores
        assert again.state is NodeState.OFFLINE
    waiting = [task for task in before.tasks if task in before.backlog]
    assert waiting
    assert [after.backlog.ahead_of(task) for task in waiting] == [
        before.backlog.ahead_of(task) for task in waiting
    ]


def test_a_node_that_stays_away_from_a_restarted_host_is_lost_too(play: Playbook) -> None:
    play.run(a_submission())
    play.restart()
    assert play.tell(Ticked(), after_s=119.0) == []
    play.tell(Ticked(), after_s=2.0)
    assert play.states() == ["lost"]


def test_the_diary_goes_on_counting_after_a_restart(play: Playbook) -> None:
    play.tell(RunnerGone(N1, "the link broke"))
    play.restart()
    back(play)
    first, second = play.kept.events
    assert second.id == first.id + 1


def test_tasks_of_a_removed_node_that_a_crash_left_behind_are_given_up(play: Playbook) -> None:
    play.run(a_submission())
    play.kept.documents.clear()  # the crash came between the two stores
    play.restart()
    assert play.tell(Ticked()) == ["save #1 killed"]
    assert play.task(1).exit is not None
    assert play.tell(Ticked()) == []


def test_a_batch_number_is_in_every_order(play: Playbook) -> None:
    play.tell(a_submission())
    batch = play.answer.batch
    play.place()
    (order,) = play.orders
    assert isinstance(order, OrderStart)
    assert order.batch == BatchId(batch)


def test_a_runner_that_changes_its_mind_for_ever_fills_nothing(play: Playbook) -> None:
    play.run(a_submission())
    for _ in range(600):
        play.hear(1, PAUSED)
        play.hear(1, RUNNING)
    history = play.task(1).history
    assert len(history) == 1000
    assert (history[0].cause, history[-1].state) == ("submitted", "running")


def test_nothing_happened_to_a_task_before_there_was_one(play: Playbook) -> None:
    play.run(a_submission())
    created = play.task(1).created_at
    report = replace(play.report(play.id(1), ENDED, exit_=DONE), at=5.0, started_at=4.0)
    play.tell(RunnerReported(N1, (report,)))
    assert (play.task(1).started_at, play.task(1).ended_at) == (created, created)


# How far a preparation is -------------------------------------------------------------------


def test_how_far_a_preparation_is_is_its_reason_and_no_history(play: Playbook) -> None:
    play.tell(a_submission())
    play.place()
    for text in ("preparing 3 %", "preparing 43 %"):
        assert "save #1 preparing" in play.hear(1, ACCEPTED, note=text)
        assert play.task(1).reason == text
    assert play.hear(1, ACCEPTED, note="preparing 43 %") == ["answer"]
    said = [change.cause for change in play.task(1).history]
    assert said[-1] == "the runner has the order"
    assert "save #1 running" in play.hear(1, RUNNING, note="in a container")
    task = play.task(1)
    assert (task.reason, task.history[-1].cause) == ("", "in a container")


def test_a_preparation_that_says_nothing_any_more_has_no_reason(play: Playbook) -> None:
    play.tell(a_submission())
    play.place()
    play.hear(1, ACCEPTED, note="waiting for docker: it is down")
    play.hear(1, ACCEPTED)
    assert play.task(1).reason == ""


def test_a_lost_task_that_is_back_is_lost_for_no_reason_any_more(play: Playbook) -> None:
    play.run(a_submission())
    long_silence(play)
    assert play.task(1).reason
    back(play, play.report(play.id(1), RUNNING))
    assert play.task(1).reason == ""
