"""Joining, draining, labelling and removing nodes."""

import pytest

from kohaku_daemon.core.cluster.events import (
    DrainAsked,
    JoinAsked,
    JoinTokenAsked,
    LabelAsked,
    RemoveAsked,
    Ticked,
)
from protocol.messages.runner import AttemptState
from protocol.models.node import NodeState
from protocol.models.task import Cause, Exit
from tests.support.builders import (
    OPERATOR,
    a_cluster,
    a_node,
    a_spec,
    a_submission,
    an_inventory,
    registered,
)
from tests.support.playbook import Playbook


@pytest.fixture
def play() -> Playbook:
    return Playbook(a_cluster([a_node("n1")]))


def drain(node: str = "n1", *, draining: bool = True) -> DrainAsked:
    return DrainAsked(OPERATOR, node, draining)


def label(node: str = "n1", unset: tuple[str, ...] = (), **labels: str) -> LabelAsked:
    return LabelAsked(OPERATOR, node, labels, unset)


def a_token(uses: int = 1, lasts_s: float = 60.0, node: str = "") -> JoinTokenAsked:
    return JoinTokenAsked(OPERATOR, "token-digest", "khj_12345", uses, lasts_s, node)


def join(name: str, credential: str = "", **labels: str) -> JoinAsked:
    return JoinAsked("token-digest", name, credential or f"digest-{name}", labels, "10.0.0.9")


# Draining -----------------------------------------------------------------------------------


def test_a_draining_node_finishes_what_it_has_and_gets_nothing_new(play: Playbook) -> None:
    play.run(a_submission())
    assert play.tell(drain()) == ["keep node n1", "show n1", "diary node.draining", "answer"]
    assert (play.answer.state, play.answer.draining) == (NodeState.ONLINE, True)
    assert play.tell(drain()) == ["answer"]
    play.tell(a_submission(request_id="the-next"))
    assert play.place() == []
    assert play.hear(1, AttemptState.ENDED)[0] == "save #1 failed"
    assert play.place() == []
    assert "diary node.undrained" in play.tell(drain(draining=False))
    assert play.place() == ["n1: start #2/1"]


def test_draining_outlives_restarts_of_host_and_runner(play: Playbook) -> None:
    play.tell(drain())
    play.restart()
    play.tell(registered("n1", an_inventory()))
    play.tell(a_submission())
    assert play.place() == []


def test_draining_an_unknown_node_names_the_nearest(play: Playbook) -> None:
    assert play.tell(drain("n11")) == ["refuse not_found"]
    assert play.refusal is not None
    assert play.refusal.hint == "did you mean n1? all nodes: kohaku node list"


# Labels -------------------------------------------------------------------------------------


def test_labels_decide_where_a_task_may_go(play: Playbook) -> None:
    assert play.tell(a_submission(a_spec(labels={"gpu": "a100"}))) == ["refuse no_fit"]
    assert play.tell(label(gpu="a100", zone="x")) == ["keep node n1", "show n1", "answer"]
    assert play.answer.labels == {"gpu": "a100", "zone": "x"}
    play.tell(a_submission(a_spec(labels={"gpu": "a100"}), array=2))
    play.tell(label(unset=("gpu",)))
    assert play.place() == []
    play.restart()
    play.tell(registered("n1", an_inventory()))
    (node,) = play.engine.state.fleet.nodes.values()
    assert node.view().labels == node.site.labels == {"zone": "x"}
    play.tell(label(gpu="a100"))
    assert play.place() == ["n1: start #1/1", "n1: start #2/1"]


def test_labels_that_cannot_be_are_refused_and_change_nothing(play: Playbook) -> None:
    play.tell(label(zone="x"))
    for event in (label(unset=("gpu",)), label(zone="a b"), label("m1", zone="y")):
        assert play.tell(event)[0].startswith("refuse")
    (node,) = play.engine.state.fleet.nodes.values()
    assert node.record.labels == node.site.labels == {"zone": "x"}


# Removing -----------------------------------------------------------------------------------


def test_a_node_with_tasks_is_not_removed_unless_they_are_given_up(play: Playbook) -> None:
    play.run(a_submission())
    assert play.tell(RemoveAsked(OPERATOR, "n1", force=False)) == ["refuse conflict"]
    assert play.tell(RemoveAsked(OPERATOR, "n1", force=True)) == [
        "save #1 killed",
        "drop node n1",
        "close the link of n1",
        "show n1",
        "diary node.removed",
        "answer",
    ]
    exit_ = play.task(1).exit
    assert exit_ == Exit(
        Cause.NODE_REMOVED, message="what it left on the machine is not followed up"
    )
    assert play.kept.documents == {}


def test_what_a_removed_node_still_runs_is_ended_when_it_joins_again(play: Playbook) -> None:
    play.run(a_submission())
    running = play.report(play.id(1), AttemptState.RUNNING)
    play.tell(RemoveAsked(OPERATOR, "n1", force=True))
    play.tell(a_token())
    play.tell(join("n1"))
    ended = frozenset(play.kept.ended())
    lines = play.tell(registered("n1", an_inventory(), attempts=(running,), ended=ended))
    assert "n1: kill #1/1" in lines
    assert play.states() == ["killed"]


def test_what_waits_for_a_removed_node_says_so_and_waits() -> None:
    play = Playbook(a_cluster([a_node("n1"), a_node("n2")]))
    play.tell(a_submission(targets=["n2"]))
    play.tell(RemoveAsked(OPERATOR, "n2", force=False))
    assert play.place() == []
    assert play.states() == ["queued"]


# Joining ------------------------------------------------------------------------------------


def test_a_runner_joins_registers_and_gets_work() -> None:
    play = Playbook(a_cluster())
    assert play.tell(a_token()) == ["keep join token token-digest", "answer"]
    assert play.answer == play.now + 60
    assert play.tell(join("n1", zone="x")) == [
        "keep join token token-digest",
        "keep node n1",
        "show n1",
        "diary node.joined",
        "answer",
    ]
    assert play.answer == "n1"
    play.tell(a_submission(a_spec(labels={"zone": "x"})))
    assert play.place() == []
    play.tell(registered("n1", an_inventory()))
    assert play.place() == ["n1: start #1/1"]


def test_a_join_repeated_because_its_answer_was_lost_uses_one() -> None:
    play = Playbook(a_cluster())
    play.tell(a_token(uses=2))
    play.tell(join("n1"))
    assert play.tell(join("n1")) == ["answer"]
    assert play.answer == "n1"
    assert play.tell(join("n2"))[-1] == "answer"
    assert play.tell(join("n3")) == ["refuse unauthenticated"]


def test_a_used_up_token_is_not_good_after_a_restart_either() -> None:
    play = Playbook(a_cluster())
    play.tell(a_token())
    play.tell(join("n1"))
    play.restart()
    assert play.tell(join("n2")) == ["refuse unauthenticated"]
    assert play.tell(join("n1")) == ["answer"]


@pytest.mark.parametrize(
    ("token", "after_s", "words"),
    [
        (None, 0.0, "the join token is not known here"),
        (a_token(), 60.0, "the join token khj_12345... has expired"),
        (a_token(node="n7"), 0.0, "the join token khj_12345... is for node n7, not n1"),
    ],
)
def test_a_token_that_is_no_good(token: JoinTokenAsked | None, after_s: float, words: str) -> None:
    play = Playbook(a_cluster())
    if token is not None:
        play.tell(token)
    assert play.tell(join("n1"), after_s=after_s) == ["refuse unauthenticated"]
    assert play.refusal is not None
    assert play.refusal.message == words
    assert play.engine.state.fleet.nodes == {}


def test_a_token_that_is_used_up_says_so() -> None:
    play = Playbook(a_cluster())
    play.tell(a_token())
    play.tell(join("n1"))
    play.tell(join("n2"))
    assert play.refusal is not None
    assert play.refusal.message == "the join token khj_12345... is used up"


def test_a_taken_name_is_refused_and_costs_no_use(play: Playbook) -> None:
    play.tell(a_token())
    assert play.tell(join("n1")) == ["refuse conflict"]
    assert play.tell(join("n2"))[-1] == "answer"


def test_a_copied_machine_is_told_that_its_credential_is_anothers(play: Playbook) -> None:
    play.tell(a_token())
    assert play.tell(join("n2", credential="digest-of-n1")) == ["refuse conflict"]
    assert play.refusal is not None
    assert play.refusal.message == "this runner's credential is that of node n1"
    assert play.tell(join("n2"))[-1] == "answer"


@pytest.mark.parametrize("name", ["", "N1", "a b", "-a", "x" * 64, "a.b"])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    play = Playbook(a_cluster())
    play.tell(a_token())
    assert play.tell(join(name)) == ["refuse bad_request"]


@pytest.mark.parametrize(
    "token",
    [
        a_token(uses=0), a_token(uses=1001), a_token(lasts_s=0.0), a_token(lasts_s=float("nan")),
        a_token(lasts_s=31 * 86400.0), a_token(node="N 1"),
    ],
)  # fmt: skip
def test_a_token_that_makes_no_sense_is_not_made(token: JoinTokenAsked) -> None:
    play = Playbook(a_cluster())
    assert play.tell(token) == ["refuse bad_request"]


def test_tokens_are_forgotten_a_week_after_they_can_no_longer_be_used() -> None:
    play = Playbook(a_cluster())
    play.tell(a_token())
    week_s = 7 * 86400.0
    assert play.tell(Ticked(), after_s=59.0 + week_s) == []
    assert play.tell(Ticked(), after_s=1.0) == ["drop join token token-digest"]
    assert play.kept.documents == {}
