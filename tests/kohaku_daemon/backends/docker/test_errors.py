"""What an engine says, in words for people: its own texts, as dockerd 20.10 writes them."""

import pytest

from kohaku_daemon.backends.base import BackendAway, BackendFailed
from kohaku_daemon.backends.docker.errors import engine_errors, explain_refusal
from kohaku_daemon.dockerd.errors import EngineAway, EngineRefused


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Requested CPUs are not available - requested 5, available: 0-1", "5, available: 0-1"),
        ("Requested memory nodes are not available - requested 3, available: 0", "NUMA node"),
        (
            'could not select device driver "" with capabilities: [[gpu]]',
            "nvidia-container-toolkit",
        ),
        ("unable to find user bob: no matching entries in passwd file", "has no user bob:"),
        ("linux spec user: unable to find group x: no matching entries", "has no group x:"),
        ("mkdir /data/overlay2/x: no space left on device", "docker system df"),
        ("could not find an available, non-overlapping IPv4 address pool", "--network none"),
        ("no available IPv4 addresses on this network's address pools: bridge", "--network none"),
        (
            'invalid mount config for type "bind": bind source path does not exist: /a/b',
            "/a/b is not there",
        ),
        ("No such image: sha256:123", "submit the task again"),
        (
            'runc create failed: exec: "/.kohaku/init": permission denied: unknown',
            "mounted with noexec",
        ),
        (
            'error mounting "/a" to rootfs at "/etc": mount /a:/etc: not a directory',
            "mounted at /etc is a file",
        ),
        ("something {new} went wrong", "Docker on this node refuses: something {new} went wrong"),
    ],
)
def test_each_refusal_says_what_to_do(said: str, told: str) -> None:
    assert told in explain_refusal(said)


def test_what_is_known_and_what_is_not_are_told_apart() -> None:
    with pytest.raises(BackendFailed), engine_errors():
        raise EngineRefused(404, "no such image")
    with pytest.raises(BackendAway), engine_errors():
        raise EngineAway("it does not answer")
