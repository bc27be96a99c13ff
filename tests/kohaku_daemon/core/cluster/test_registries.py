"""Names at registries: which one a reference means, and passwords that nobody is shown."""

from __future__ import annotations

import pytest

from kohaku_daemon.core.cluster.events import RegistryRemoveAsked, RegistrySetAsked
from kohaku_daemon.core.cluster.records import RegistryRecord
from kohaku_daemon.core.cluster.registries import credential_for, parse_registry, registry_of
from protocol.errors import BadRequest
from protocol.models.environment import Credential
from tests.support.builders import OPERATOR, a_cluster
from tests.support.playbook import Playbook


def a_set(
    registry: str = "ghcr.io", username: str = "lab", password: str = "s3cret"
) -> RegistrySetAsked:
    return RegistrySetAsked(OPERATOR, registry, username, password)


@pytest.mark.parametrize(
    ("text", "registry"),
    [
        ("ghcr.io", "ghcr.io"),
        ("GHCR.io", "ghcr.io"),
        ("https://ghcr.io/", "ghcr.io"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("127.0.0.1:5000", "127.0.0.1:5000"),
        ("localhost\n", "localhost"),
        ("[::1]:5000", "[::1]:5000"),
    ],
)
def test_a_registry_is_read_as_people_write_it(text: str, registry: str) -> None:
    assert parse_registry(text) == registry


@pytest.mark.parametrize("text", ["", "a b", "ghcr.io/lab", "-x", "a:b:c", "a" * 300, "é", "a\nb"])
def test_what_is_no_registry_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="is not the name of a registry"):
        parse_registry(text)


@pytest.mark.parametrize(
    ("reference", "registry"),
    [
        ("python", "docker.io"),
        ("python:3.12-slim", "docker.io"),
        ("lab/torch:2", "docker.io"),
        ("docker.io/library/python", "docker.io"),
        ("index.docker.io/library/python", "docker.io"),
        ("ghcr.io/lab/torch:2", "ghcr.io"),
        ("localhost/x", "localhost"),
        ("127.0.0.1:5000/x@sha256:00", "127.0.0.1:5000"),
    ],
)
def test_a_reference_says_which_registry_it_means(reference: str, registry: str) -> None:
    assert registry_of(reference) == registry


def test_a_name_is_kept_told_to_who_pulls_and_not_shown() -> None:
    play = Playbook(a_cluster())
    assert play.tell(a_set()) == ["keep registry ghcr.io", "answer"]
    assert [account.username for account in play.answer] == ["lab"]
    assert "s3cret" not in repr(play.answer)
    assert "s3cret" not in repr(a_set())
    assert "s3cret" not in repr(play.kept.documents[(RegistryRecord, "ghcr.io")])

    play.restart()
    state = play.engine.state
    assert credential_for(state, "ghcr.io/lab/torch") == Credential("lab", "s3cret")
    assert credential_for(state, "python") is None
    assert "s3cret" not in repr(credential_for(state, "ghcr.io/lab/torch"))


def test_a_name_is_replaced_and_removed() -> None:
    play = Playbook(a_cluster())
    play.tell(a_set())
    play.tell(a_set(registry="https://GHCR.io", username="other"))
    assert [account.username for account in play.answer] == ["other"]
    assert play.tell(RegistryRemoveAsked(OPERATOR, "ghcr.io")) == [
        "drop registry ghcr.io", "answer"
    ]  # fmt: skip
    assert play.answer == ()
    assert play.tell(RegistryRemoveAsked(OPERATOR, "ghcr.io")) == ["refuse not_found"]


@pytest.mark.parametrize(
    "bad",
    [
        {"username": ""}, {"username": "a\nb"}, {"username": "a" * 300},
        {"password": ""}, {"password": "x" * 20_000}, {"registry": "no registry"},
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_without_the_password(bad: dict[str, str]) -> None:
    play = Playbook(a_cluster())
    assert play.tell(a_set(**bad)) == ["refuse bad_request"]
    assert "s3cret" not in str(play.refusal)
