"""What engines and registries were heard to say, in words for a task's owner."""

from __future__ import annotations

import pytest

from kohaku_daemon.backends.docker.images.troubles import explain_pull, is_full
from kohaku_daemon.dockerd.errors import EngineRefused


@pytest.mark.parametrize(
    ("reference", "said", "words"),
    [
        (
            "ghcr.io/lab/x:1",
            "errors: denied: requested access to the resource is denied unauthorized: "
            "authentication required",
            "kohaku registry set ghcr.io --username NAME",
        ),
        (
            "127.0.0.1:5000/lab/bb:1",
            "Get http://127.0.0.1:5000/v2/lab/bb/manifests/1: no basic auth credentials",
            "kohaku registry set 127.0.0.1:5000 --username NAME",
        ),
        ("pythn:3", "pull access denied for pythn, repository does not exist", "is not there, or"),
        (
            "127.0.0.1:5000/lab/bb:2",
            "manifest for 127.0.0.1:5000/lab/bb:2 not found: manifest unknown: manifest unknown",
            "there is no image 127.0.0.1:5000/lab/bb:2 in 127.0.0.1:5000",
        ),
        (
            "python:3.12",
            "Get https://registry-1.docker.io/v2/: dial tcp: lookup registry-1.docker.io: "
            "no such host",
            "docker.io, the registry of image python:3.12, cannot be reached from this node",
        ),
        (
            "10.0.0.9:5000/x",
            "Get http://10.0.0.9:5000/v2/: dial tcp 10.0.0.9:5000: connect: connection refused",
            "cannot be reached from this node: Get http://10.0.0.9:5000/v2/",
        ),
        (
            "Python",
            "invalid reference format: repository name must be lowercase",
            "'Python' is not",
        ),
        ("x", "something new", "image x cannot be pulled: something new"),
    ],
)
def test_what_was_said_becomes_what_to_do(reference: str, said: str, words: str) -> None:
    assert words in explain_pull(reference, said)


@pytest.mark.parametrize(
    ("said", "full"),
    [
        ("Error processing tar file(exit status 1): write /x: no space left on device", True),
        ("write /x: disk quota exceeded", True),
        ("unexpected EOF", False),
    ],
)
def test_a_full_disk_is_told_apart(said: str, *, full: bool) -> None:
    assert is_full(EngineRefused(500, said)) is full
