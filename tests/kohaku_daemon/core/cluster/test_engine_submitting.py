"""Submitting: what is accepted is one batch, saved whole, once, whatever is repeated."""

import pytest
from msgspec.structs import replace

from kohaku_daemon.core.cluster.events import PlacementDue, SubmitAsked
from protocol.errors import Conflict, Forbidden, NoFit, NotFound
from protocol.messages.runner import AttemptState, OrderStart
from protocol.messages.task import Submitted
from protocol.models.node import BackendInfo
from protocol.models.task import Claim, Mount
from tests.support.builders import (
    GIB,
    NOW,
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


def test_a_task_is_saved_before_it_is_answered_and_then_ordered() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    assert play.tell(a_submission(a_spec(cores=2))) == [
        "save batch of 1",
        "save #1 queued",
        "answer",
    ]
    assert play.answer == Submitted(play.answer.batch, ((play.id(1), 1),))
    assert play.tell(PlacementDue()) == ["save #1 assigned", "show n1", "n1: start #1/1"]
    assert play.orders == [
        OrderStart(
            task=play.id(1), attempt=1, batch=play.answer.batch, spec=a_spec(cores=2),
            claim=Claim(cores=(0, 1)),
        )
    ]  # fmt: skip
    assert play.hear(1, AttemptState.ACCEPTED) == ["save #1 preparing", "answer"]
    assert play.hear(1, AttemptState.RUNNING, note="namespaces") == ["save #1 running", "answer"]
    assert [(change.state, change.cause) for change in play.task(1).history] == [
        ("queued", "submitted"),
        ("assigned", "placed"),
        ("preparing", "the runner has the order"),
        ("running", "namespaces"),
    ]


def test_the_same_request_again_gives_the_same_tasks_and_saves_nothing() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission(array=3))
    first = play.answer
    assert play.tell(a_submission(array=3)) == ["answer"]
    assert play.answer == replace(first, repeated=True)
    assert list(play.answer.ids()) == sorted(play.kept.tasks)


def test_a_request_id_used_for_something_else_is_a_conflict() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission())
    assert play.tell(a_submission(a_spec(cores=3))) == ["refuse conflict"]
    assert isinstance(play.refusal, Conflict)
    assert "request-1" in play.refusal.message


def test_request_ids_are_everybodys_own() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission())
    first = play.answer
    play.tell(_by("bob", a_submission()))
    assert play.answer.batch != first.batch


def test_a_request_whose_tasks_have_all_ended_is_still_the_same_request() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission())
    first = play.answer
    play.place()
    assert play.hear(1, AttemptState.ENDED)[0] == "save #1 failed"
    assert play.tell(a_submission()) == ["answer"]
    assert play.answer == replace(first, repeated=True)


def test_a_request_of_long_ago_is_known_from_the_store() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission())
    first, batch = play.answer, play.kept.batches[play.answer.batch]
    play.kill(1)
    play.restart()  # an ended batch is not loaded
    assert play.tell(a_submission(earlier=batch)) == ["answer"]
    assert play.answer == replace(first, repeated=True)
    assert play.tell(a_submission(a_spec(cores=2), earlier=batch)) == ["refuse conflict"]


def test_a_batch_over_targets_puts_each_task_where_it_was_sent() -> None:
    play = Playbook(a_cluster([a_node("n1"), a_node("n2", an_inventory(8, gpus=2, numa=2))]))
    play.tell(a_submission(targets=["n2:1", "n1", "n2::0,1"]))
    assert set(play.place()) == {"n2: start #1/1", "n1: start #2/1", "n2: start #3/1"}
    assert [play.task(number).claim for number in (1, 2, 3)] == [
        Claim(cores=(4,), numa=1),
        Claim(cores=(0,)),
        Claim(cores=(5,), gpus=("GPU-0", "GPU-1")),
    ]


def test_an_array_is_numbered() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission(array=3))
    play.place()
    assert [(order.index, order.size) for order in _starts(play)] == [(0, 3), (1, 3), (2, 3)]


def test_each_row_adds_its_variables_to_those_of_the_spec() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    rows = ({"SEED": "1"}, {"SEED": "2", "MODE": "slow"})
    play.tell(a_submission(a_spec(env={"MODE": "fast"}), rows=rows))
    play.place()
    assert [order.spec.env for order in _starts(play)] == [
        {"MODE": "fast", "SEED": "1"},
        {"MODE": "slow", "SEED": "2"},
    ]


def test_a_batch_too_large_for_a_millisecond_has_all_its_ids() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission(a_spec(cores=4), array=10_000))
    play.finish()
    assert list(play.answer.ids()) == sorted(play.kept.tasks)
    assert play.kept.batches[play.answer.batch].runs == play.answer.runs
    assert [play.kept.tasks[task].index for task in play.answer.ids()] == list(range(10_000))


def test_what_nobody_could_ever_hold_is_refused_with_everybodys_reason() -> None:
    play = Playbook(a_cluster([a_node("n1"), a_node("n2", an_inventory(64, memory=GIB))]))
    assert play.tell(a_submission(a_spec(cores=8, memory=2 * GIB))) == ["refuse no_fit"]
    assert isinstance(play.refusal, NoFit)
    assert play.refusal.message == "no node could ever hold this, even idle (2 asked)"
    assert play.refusal.details == {
        "reasons": {
            "n1": ["8 cores wanted, the node has 4"],
            "n2": ["2 GiB memory wanted, the node has 1 GiB"],
        }
    }
    assert play.kept.tasks == {}


def test_one_hopeless_target_refuses_the_whole_batch() -> None:
    play = Playbook(a_cluster([a_node("n1"), a_node("n2", an_inventory(8))]))
    event = a_submission(a_spec(cores=8), targets=["n2", "n1"])
    assert play.tell(event) == ["refuse no_fit"]
    assert len(play.engine.state.backlog) == 0


def test_who_may_have_more_of_a_container_than_others() -> None:
    docker = BackendInfo("docker", mount_roots=("/srv",), allows=("any-mount", "privileged"))
    nodes = [a_node("n1", an_inventory(backends=(docker,))), a_node("n2")]
    play = Playbook(a_cluster(nodes))

    privileged = a_spec(privileged=True)
    play.tell(a_submission(privileged))
    assert isinstance(play.refusal, Forbidden)
    play.tell(a_submission(privileged, request_id="request-2", actor=OPERATOR))
    assert play.place() == ["n1: start #1/1"]

    elsewhere = a_spec(mounts=(Mount("/etc", "/etc-of-the-node"),))
    play.tell(a_submission(elsewhere, request_id="request-3"))
    assert isinstance(play.refusal, NoFit)
    assert play.refusal.details["reasons"] == {
        "n1": [
            "mount of /etc wanted, this node allows only what is below /srv; more only for"
            " operators"
        ],
        "n2": ["mounts wanted, which only containers have, and the backend here is process"],
    }
    play.tell(a_submission(elsewhere, request_id="request-4", actor=OPERATOR))
    assert play.place() == ["n1: start #2/1"]
    (order,) = play.orders
    assert isinstance(order, OrderStart)
    assert order.trusted


def test_a_backend_that_cannot_start_tasks_now_is_waited_for() -> None:
    ill = an_inventory(backends=(BackendInfo("process", False, "no daemon answers"),))
    play = Playbook(a_cluster([a_node("n1", ill)]))
    assert play.tell(a_submission())[-1] == "answer"
    assert play.place() == []
    play.tell(registered("n1", an_inventory()))
    assert play.place() == ["n1: start #1/1"]


def test_what_is_only_busy_draining_or_away_is_waited_for() -> None:
    play = Playbook(a_cluster([a_node("n1", draining=True)], online=False))
    assert play.tell(a_submission(a_spec(cores=4)))[-1] == "answer"
    assert play.place() == []


def test_with_no_node_yet_and_with_one_that_never_registered_everything_may_wait() -> None:
    play = Playbook(a_cluster())
    assert play.tell(a_submission(a_spec(cores=99)))[-1] == "answer"
    unknown = replace(a_node("n1"), inventory=an_inventory(0, backends=()))
    play = Playbook(a_cluster([unknown], online=False))
    assert play.tell(a_submission(a_spec(cores=99)))[-1] == "answer"


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("gpu-node-l", "did you mean gpu-node-1? all nodes: kohaku node list"),
        ("elsewhere", "see all nodes with: kohaku node list"),
    ],
)
def test_an_unknown_target_names_the_nearest(target: str, hint: str) -> None:
    play = Playbook(a_cluster([a_node("gpu-node-1"), a_node("n2")]))
    assert play.tell(a_submission(targets=["n2", target])) == ["refuse not_found"]
    assert isinstance(play.refusal, NotFound)
    assert play.refusal.message == f"no node is called '{target}'"
    assert play.refusal.hint == hint


def test_nonsense_is_refused_by_name() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    assert play.tell(a_submission(a_spec(command=()))) == ["refuse bad_request"]


def test_hundreds_that_do_not_fit_wait_in_order_and_go_one_by_one() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.run(a_submission(a_spec(cores=3)))
    play.tell(a_submission(a_spec(cores=2), request_id="the-hundreds", array=400))
    assert play.place() == []
    play.hear(1, AttemptState.ENDED)
    assert play.place() == ["n1: start #2/1", "n1: start #3/1"]
    play.hear(3, AttemptState.ENDED)
    assert play.place() == ["n1: start #4/1"]
    assert play.engine.state.backlog.ahead_of(play.id(401)) == 396


def test_ids_go_on_rising_after_a_restart_with_a_clock_that_went_back() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission(array=5000))
    largest = max(play.kept.tasks)
    play.now = NOW - 3600
    play.restart()
    play.tell(a_submission(request_id="request-2"))
    assert play.answer.batch > largest


def _by(user: str, event: SubmitAsked) -> SubmitAsked:
    return a_submission(event.request.spec, actor=a_user(user))


def _starts(play: Playbook) -> list[OrderStart]:
    return [order for order in play.orders if isinstance(order, OrderStart)]
