"""Which image a batch runs: the first word counts, for all of its tasks and after a crash."""

from __future__ import annotations

import re

import pytest

from kohaku_daemon.core.cluster.events import PinAsked, RegistrySetAsked
from protocol.errors import BadRequest, Conflict, KohakuError, NotFound
from protocol.ids import BatchId, NodeName
from protocol.messages.runner import PinnedImage
from protocol.models.environment import Credential
from protocol.models.node import BackendInfo
from tests.support.builders import (
    OPERATOR,
    PROCESS,
    a_cluster,
    a_node,
    a_spec,
    a_submission,
    an_inventory,
)
from tests.support.playbook import Playbook

DIGESTS = [f"sha256:{number:064x}" for number in range(3)]
WITH_DOCKER = an_inventory(backends=(PROCESS, BackendInfo("docker")))


@pytest.fixture
def play() -> Playbook:
    """Two nodes, one of which runs a task of a batch."""
    play = Playbook(a_cluster([a_node("n1", WITH_DOCKER), a_node("n2", WITH_DOCKER)]))
    play.tell(a_submission(a_spec(image="ghcr.io/lab/x:1"), targets=["n1"]))
    assert play.place()
    return play


def batch_of(play: Playbook) -> BatchId:
    (batch,) = play.kept.batches
    return batch


def ask(play: Playbook, digest: str = "", *, node: str = "n1", **more: str) -> list[str]:
    reference = more.get("reference", "ghcr.io/lab/x:1")
    return play.tell(PinAsked(NodeName(node), batch_of(play), reference, digest))


def test_nobody_knows_it_at_first_and_the_first_word_is_kept(play: Playbook) -> None:
    assert ask(play) == ["answer"]
    assert play.answer == PinnedImage()
    assert ask(play, DIGESTS[1]) == ["save batch of 1", "answer"]
    assert play.answer == PinnedImage(DIGESTS[1])
    assert ask(play, DIGESTS[2]) == ["answer"], "somebody else was first"
    assert play.answer == PinnedImage(DIGESTS[1])


def test_a_crash_forgets_nothing_of_it(play: Playbook) -> None:
    ask(play, DIGESTS[1])
    play.restart()
    ask(play)
    assert play.answer == PinnedImage(DIGESTS[1])


def test_whom_to_pull_as_is_told_to_those_who_have_to(play: Playbook) -> None:
    play.tell(RegistrySetAsked(OPERATOR, "ghcr.io", "lab", "s3cret"))
    ask(play)
    assert play.answer == PinnedImage("", Credential("lab", "s3cret"))
    assert "s3cret" not in repr(play.answer)
    refused(play, NotFound, "no task of batch .* is on node n2", node="n2")


def refused(play: Playbook, kind: type[KohakuError], words: str, **more: str) -> None:
    told = ask(play, more.pop("digest", ""), **more)
    assert told == [f"refuse {kind.code}"]
    assert isinstance(play.refusal, kind)
    assert re.search(words, play.refusal.message)


def test_what_the_batch_does_not_run_tells_nothing(play: Playbook) -> None:
    play.tell(RegistrySetAsked(OPERATOR, "ghcr.io", "lab", "s3cret"))
    refused(play, Conflict, "does not run image 'ghcr.io/other/y'", reference="ghcr.io/other/y")


@pytest.mark.parametrize("digest", ["sha256:1", "x", DIGESTS[0] + "\n", DIGESTS[0].upper()])
def test_what_is_no_digest_is_not_kept(play: Playbook, digest: str) -> None:
    refused(play, BadRequest, "digest must be sha256", digest=digest)
    ask(play)
    assert play.answer == PinnedImage()


def test_a_batch_without_an_image_has_none(play: Playbook) -> None:
    other = Playbook(a_cluster([a_node("n1")]))
    other.tell(a_submission(a_spec()))
    other.place()
    refused(other, Conflict, "does not run image")
