"""The rules of environments: one work at a time, versions that are kept, what tasks run in."""

from __future__ import annotations

from typing import Any

import pytest

from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.core.cluster.ended import EndedTasks
from kohaku_daemon.core.cluster.environments import (
    choose_image,
    find_environment,
    presences,
    show_environment,
)
from kohaku_daemon.core.cluster.events import (
    CreateAsked,
    DeleteAsked,
    EnvironmentMade,
    EnvironmentPacked,
    FilesRemoved,
    PackAsked,
    PlacementDue,
    PullAsked,
    RetryAsked,
    RunnerBeat,
    RunnerGone,
)
from kohaku_daemon.core.cluster.records import EnvironmentRecord
from protocol.ids import NodeName
from protocol.messages.runner import AttemptState, OrderPull, OrderStart
from protocol.models.access import Role
from protocol.models.environment import (
    EnvironmentState,
    ImageReading,
    Presence,
    Version,
    WantedImage,
)
from protocol.models.node import BackendInfo, Readings
from protocol.models.task import Cause, Exit
from tests.support.builders import (
    OPERATOR,
    PROCESS,
    a_cluster,
    a_node,
    a_spec,
    a_submission,
    a_user,
    an_inventory,
)
from tests.support.playbook import Playbook

DOCKER = BackendInfo("docker")


def a_version(number: int) -> Version:
    """Make what hands tell of a version."""
    digest = f"{number:064x}"
    return Version(digest=digest, size=number, pieces="p", image=f"sha256:{number}")


@pytest.fixture
def play() -> Playbook:
    """A host with one node that runs containers."""
    return Playbook(a_cluster([a_node("n1", an_inventory(backends=[DOCKER, PROCESS]))]))


def create(play: Playbook, name: str = "torch", image: str = "python:3.12") -> list[str]:
    return play.tell(CreateAsked(OPERATOR, name, image))


def ready(play: Playbook, name: str = "torch") -> None:
    create(play, name)
    play.tell(EnvironmentMade(name))


def packed(play: Playbook, number: int, name: str = "torch") -> list[str]:
    assert play.tell(PackAsked(OPERATOR, name))[-1] == "answer"
    return play.tell(EnvironmentPacked(name, a_version(number)))


def record(play: Playbook, name: str = "torch") -> EnvironmentRecord:
    kept = play.kept.documents[(EnvironmentRecord, name)]
    assert isinstance(kept, EnvironmentRecord)
    return kept


def numbers(play: Playbook) -> list[int]:
    return [version.size for version in record(play).versions]


def run_in(play: Playbook, request_id: str = "request-1", **spec: Any) -> list[str]:
    spec = spec or {"container": "torch"}
    return play.tell(a_submission(a_spec(**spec), request_id=request_id))


def test_it_is_kept_before_it_is_answered_and_then_made(play: Playbook) -> None:
    assert create(play) == ["keep environment torch", "show environment torch", "answer"]
    assert play.answer.state is EnvironmentState.CREATING
    assert create(play) == ["answer"], "the same again changes nothing"

    told = play.tell(EnvironmentMade("torch"))
    assert told == ["keep environment torch", "show environment torch", "diary environment.created"]
    assert record(play).state is EnvironmentState.READY
    assert play.tell(EnvironmentMade("torch")) == [], "told twice"


@pytest.mark.parametrize("name", ["", "Torch", "-x", "a_b", "a" * 64, "a/b", "a" * 100_000, "é"])
def test_a_name_that_could_be_no_image_is_refused(play: Playbook, name: str) -> None:
    assert create(play, name) == ["refuse bad_request"]
    assert play.refusal is not None
    assert "hyphens" in play.refusal.hint
    assert len(play.refusal.message) < 300


@pytest.mark.parametrize("image", ["", "a b", "-x", "a" * 600, "x\n", "$(id)"])
def test_an_image_of_no_sense_is_refused(play: Playbook, image: str) -> None:
    assert create(play, image=image) == ["refuse bad_request"]


def test_what_cannot_be_made_says_why_and_can_be_made_again(play: Playbook) -> None:
    create(play)
    play.tell(EnvironmentMade("torch", "no such image"))
    assert (record(play).state, record(play).trouble) == (EnvironmentState.FAILED, "no such image")

    assert play.tell(PackAsked(OPERATOR, "torch")) == ["refuse conflict"]
    assert play.refusal is not None
    assert play.refusal.message == "environment torch could not be made: no such image"
    assert create(play, image="python:3.13")[-1] == "answer"
    assert (record(play).source, record(play).trouble) == ("python:3.13", "")


def test_one_work_at_a_time_and_a_refusal_names_it(play: Playbook) -> None:
    create(play)
    assert create(play, image="other") == ["refuse conflict"]
    assert play.refusal is not None
    assert (
        play.refusal.message == "environment torch is being made from python:3.12, not from other"
    )
    assert play.tell(PackAsked(OPERATOR, "torch")) == ["refuse conflict"]
    assert play.refusal.message == "environment torch is being made"

    play.tell(EnvironmentMade("torch"))
    play.tell(PackAsked(OPERATOR, "torch"))
    for event in (PackAsked(OPERATOR, "torch"), DeleteAsked(OPERATOR, "torch")):
        assert play.tell(event) == ["refuse conflict"]
        assert play.refusal.message == "environment torch is being packed"
    assert create(play) == ["refuse conflict"]
    assert play.refusal.message == "there is an environment torch already, made from python:3.12"


def test_versions_are_kept_newest_first_and_the_oldest_goes(play: Playbook) -> None:
    ready(play)
    for number in range(1, 6):
        packed(play, number)
    assert numbers(play) == [5, 4, 3]
    assert record(play).dropped == (a_version(1).digest, a_version(2).digest)
    assert record(play).versions[0].packed_by == "olga"
    assert record(play).versions[0].packed_at == play.now

    play.tell(FilesRemoved("torch", (a_version(1).digest,)))
    assert record(play).dropped == (a_version(2).digest,)


def test_a_version_in_which_tasks_run_stays_until_they_have_ended(play: Playbook) -> None:
    ready(play)
    packed(play, 1)
    run_in(play)
    for number in range(2, 6):
        packed(play, number)
    assert numbers(play) == [5, 4, 3, 1]

    play.tell(PlacementDue())
    play.hear(1, AttemptState.ENDED, exit_=Exit(Cause.EXITED, code=0))
    packed(play, 6)
    assert numbers(play) == [6, 5, 4]


def test_what_cannot_be_packed_leaves_the_versions_and_says_why(play: Playbook) -> None:
    ready(play)
    packed(play, 1)
    play.tell(PackAsked(OPERATOR, "torch"))
    play.tell(EnvironmentPacked("torch", trouble="no space left"))
    assert (numbers(play), record(play).state) == ([1], EnvironmentState.READY)
    assert record(play).trouble == "no space left"
    packed(play, 2)
    assert record(play).trouble == ""


def test_one_whose_container_is_gone_is_made_again_and_keeps_its_versions(play: Playbook) -> None:
    ready(play)
    packed(play, 1)
    play.tell(PackAsked(OPERATOR, "torch"))
    play.tell(EnvironmentPacked("torch", trouble="it is gone", is_gone=True))
    assert record(play).state is EnvironmentState.FAILED
    assert run_in(play)[-1] == "answer", "what was packed goes on to be used"
    assert create(play)[-1] == "answer"
    assert numbers(play) == [1]


def test_a_submission_runs_in_what_was_packed_last(play: Playbook) -> None:
    ready(play)
    packed(play, 1)
    run_in(play)
    packed(play, 2)
    run_in(play, "request-2")

    play.place()
    images = [order.image for order in play.orders if isinstance(order, OrderStart)]
    versions = [image.version.size for image in images if image and image.version]
    assert versions == [1, 2]
    assert {image.environment for image in images if image} == {"torch"}


def test_an_image_is_passed_on_by_its_reference(play: Playbook) -> None:
    run_in(play, image="ghcr.io/lab/torch:2")
    run_in(play, "request-2", command=("true",))
    play.place()
    images = [order.image for order in play.orders if isinstance(order, OrderStart)]
    assert images == [WantedImage(reference="ghcr.io/lab/torch:2"), None]


def test_only_operators_are_trusted(play: Playbook) -> None:
    for number, role in enumerate((Role.USER, Role.OPERATOR, Role.ADMIN)):
        actor = a_user(str(role), role)
        play.tell(a_submission(a_spec(), actor=actor, request_id=f"request-{number}"))
    play.place()
    assert [order.trusted for order in play.orders if isinstance(order, OrderStart)] == [
        False, True, True
    ]  # fmt: skip


def test_an_unknown_environment_is_refused_with_the_nearest_name(play: Playbook) -> None:
    assert run_in(play) == ["refuse not_found"]
    assert play.refusal is not None
    assert "kohaku environment create" in play.refusal.hint

    ready(play)
    assert run_in(play, container="trch") == ["refuse not_found"]
    assert play.refusal.hint == "did you mean torch? see: kohaku environment list"
    assert run_in(play, container="x" * 63) == ["refuse not_found"]
    assert play.refusal.hint == "see: kohaku environment list"


def test_what_was_never_packed_cannot_be_run_in(play: Playbook) -> None:
    ready(play)
    assert run_in(play) == ["refuse conflict"]
    assert play.refusal is not None
    assert play.refusal.message == "environment torch is not packed yet"
    assert play.refusal.hint == "pack it: kohaku environment pack torch"


def test_delete_is_refused_while_tasks_run_in_it(play: Playbook) -> None:
    ready(play)
    packed(play, 1)
    run_in(play)
    assert play.tell(DeleteAsked(OPERATOR, "torch")) == ["refuse conflict"]
    assert play.refusal is not None
    assert play.refusal.message == ("1 task that has not ended runs in environment torch")
    assert "kohaku batch kill" in play.refusal.hint


def test_what_is_deleted_is_gone_for_people_and_then_for_good(play: Playbook) -> None:
    ready(play)
    packed(play, 1)
    assert play.tell(DeleteAsked(OPERATOR, "torch"))[-1] == "answer"
    state = play.engine.state
    assert show_environment(state, "torch") is None
    assert record(play).dropped == (a_version(1).digest,)
    assert play.tell(PackAsked(OPERATOR, "torch")) == ["refuse not_found"]
    assert create(play) == ["refuse conflict"]
    assert play.refusal is not None
    assert play.refusal.message.endswith("is being removed")

    assert play.tell(FilesRemoved("torch", (a_version(1).digest,))) == ["drop environment torch"]
    assert create(play)[-1] == "answer"


def test_one_that_is_being_made_can_be_given_up(play: Playbook) -> None:
    create(play)
    assert play.tell(DeleteAsked(OPERATOR, "torch"))[-1] == "answer"
    assert play.tell(EnvironmentMade("torch")) == [], "its hands were told too late"
    assert play.tell(FilesRemoved("torch", ())) == ["drop environment torch"]


def test_nodes_are_told_to_pull_the_newest_version(play: Playbook) -> None:
    ready(play)
    assert play.tell(PullAsked(OPERATOR, "torch", ())) == ["refuse conflict"]
    packed(play, 1)
    packed(play, 2)
    assert play.tell(PullAsked(OPERATOR, "torch", ())) == ["n1: pull torch", "answer"]
    (order,) = play.orders
    assert isinstance(order, OrderPull)
    assert order.image.version == record(play).versions[0]
    assert play.answer.nodes == ("n1",)


def test_a_node_that_cannot_take_it_is_named_with_the_reason() -> None:
    sick = BackendInfo("docker", healthy=False, message="it does not answer")
    play = Playbook(
        a_cluster(
            [
                a_node("n1", an_inventory(backends=[DOCKER])),
                a_node("n2"),
                a_node("n3", an_inventory(backends=[sick])),
                a_node("n4", an_inventory(backends=[DOCKER])),
            ]
        )
    )
    ready(play)
    packed(play, 1)
    play.tell(RunnerGone(NodeName("n4"), "cable"))
    assert play.tell(PullAsked(OPERATOR, "torch", ())) == ["n1: pull torch", "answer"]
    assert play.tell(PullAsked(OPERATOR, "torch", ("n1", "n2", "n3", "n4"))) == ["refuse conflict"]
    assert play.refusal is not None
    assert play.refusal.details == {
        "reasons": {
            "n2": ["it has no backend docker"],
            "n3": ["its Docker engine: it does not answer"],
            "n4": ["the node is offline"],
        }
    }
    assert play.tell(PullAsked(OPERATOR, "torch", ("n5",))) == ["refuse not_found"]
    play.tell(RunnerGone(NodeName("n1"), "cable"))
    assert play.tell(PullAsked(OPERATOR, "torch", ())) == ["refuse unavailable"]


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        (ImageReading(a_version(1).digest, present=True), "present"),
        (ImageReading(a_version(1).digest, percent=42.6), "43 %"),
        (ImageReading(a_version(1).digest, percent=9, trouble="disk full"), "disk full"),
    ],
)
def test_a_node_says_how_far_it_is(play: Playbook, reading: ImageReading, said: str) -> None:
    ready(play)
    packed(play, 1)
    other = ImageReading(a_version(9).digest, present=True)
    play.tell(RunnerBeat(NodeName("n1"), Readings(images=(other, reading))))
    state = play.engine.state
    assert presences(state, find_environment(state, "torch")) == (Presence(NodeName("n1"), said),)


def test_a_host_that_was_killed_knows_all_of_it(play: Playbook) -> None:
    ready(play)
    packed(play, 1)
    play.tell(PackAsked(OPERATOR, "torch"))
    play.restart()
    assert play.tell(EnvironmentPacked("torch", a_version(2)))[0] == "keep environment torch"
    assert numbers(play) == [2, 1]
    wanted = choose_image(play.engine.state, a_spec(container="torch"))
    assert wanted is not None
    assert wanted.version == record(play).versions[0]


def retry(play: Playbook, number: int, actor: Actor) -> OrderStart:
    """Try an ended task again, and give the order that comes of it."""
    ended = EndedTasks("retry-001")
    ended.take([play.task(number)])
    source = play.kept.batches[play.task(number).batch]
    play.tell(RetryAsked(actor, "retry-001", b"", source, None, ended))
    play.place()
    (order,) = play.orders
    assert isinstance(order, OrderStart)
    return order


def test_a_retry_runs_in_what_was_packed_last(play: Playbook) -> None:
    ready(play)
    packed(play, 1)
    run_in(play)
    play.place()
    play.hear(1, AttemptState.ENDED, exit_=Exit(Cause.EXITED, code=3))
    packed(play, 2)
    order = retry(play, 1, a_user())
    assert order.image is not None
    assert order.image.version == record(play).versions[0]


@pytest.mark.parametrize(
    ("first", "second", "trusted"),
    [
        (a_user(), OPERATOR, False),
        (OPERATOR, OPERATOR, True),
        (a_user("olga", Role.OPERATOR), a_user("olga", Role.USER), False),
    ],
    ids=["an operator for a user", "an operator", "a former operator"],
)
def test_a_retry_trusts_nobody_more_than_before(
    play: Playbook, first: Actor, second: Actor, trusted: bool
) -> None:
    play.tell(a_submission(actor=first))
    play.place()
    play.hear(1, AttemptState.ENDED, exit_=Exit(Cause.EXITED, code=3))
    assert retry(play, 1, second).trusted is trusted
