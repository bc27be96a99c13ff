"""What a node will not let a container have is told; equal wishes are equal."""

from typing import Any

import pytest

from kohaku_daemon.core.placement.books import Books
from kohaku_daemon.core.placement.choose import suits, unsuitable
from kohaku_daemon.core.placement.containers import Wishes, unmet, wishes_of
from kohaku_daemon.core.placement.request import request_of
from protocol.models.node import BackendInfo
from protocol.models.task import Mount
from tests.support.builders import PROCESS, a_spec, an_inventory

DOCKER = BackendInfo("docker", mount_roots=("/srv", "/data/sets"), allows=("any-mount",))
PLAIN = BackendInfo("docker")
GENEROUS = BackendInfo("docker", mount_roots=("/",), allows=("privileged", "any-mount"))
ETC = (Mount("/etc", "/x"),)


@pytest.mark.parametrize(
    ("wishes", "backend", "reasons"),
    [
        ({"mounts": (Mount("/srv", "/x"), Mount("/srv/a/b", "/y"))}, DOCKER, []),
        ({"mounts": (Mount("/srvx", "/x"),)}, DOCKER, ["/srvx"]),
        (
            {"mounts": ETC},
            DOCKER,
            ["this node allows only what is below /srv, /data/sets; more only for operators"],
        ),
        ({"mounts": ETC}, PLAIN, ["mount of /etc wanted, this node allows none"]),
        ({"mounts": ETC}, GENEROUS, []),
        ({"mounts": ETC, "trusted": True}, DOCKER, []),
        ({"mounts": ETC, "trusted": True}, PLAIN, ["mount of /etc wanted, this node allows none"]),
        ({"privileged": True}, GENEROUS, []),
        ({"privileged": True}, DOCKER, ["a privileged container wanted, this node allows none"]),
        ({"privileged": True, "mounts": ETC}, PLAIN, ["privileged", "/etc"]),
        ({"user": "0", "image": "busybox"}, PLAIN, []),
        ({"user": "0"}, PLAIN, []),
        (
            {"user": "0", "privileged": True},
            PROCESS,
            [
                "user and privileged wanted, which only containers have, and the backend here"
                " is process"
            ],
        ),
        ({}, PROCESS, []),
    ],
)
def test_what_a_backend_will_not_give_is_told(
    wishes: dict[str, Any], backend: BackendInfo, reasons: list[str]
) -> None:
    trusted = wishes.pop("trusted", False)
    said = list(unmet(wishes_of(a_spec(**wishes), trusted=trusted), backend))
    assert len(said) == len(reasons)
    assert all(words in reason for words, reason in zip(reasons, said, strict=True))


def test_a_spec_that_any_container_will_do_for_has_no_wishes() -> None:
    assert wishes_of(a_spec(), trusted=True) is None
    assert wishes_of(a_spec(container="demo", user="0", shm_size=2**20), trusted=True) is None
    assert request_of(a_spec(), None) == request_of(a_spec(), None, trusted=True)


def test_equal_needs_are_equal_however_they_are_written() -> None:
    mounts = (Mount("/b", "/1"), Mount("/a", "/2", read_only=True), Mount("/b", "/3"))
    spec = a_spec(image="busybox", mounts=mounts)
    assert wishes_of(spec, trusted=False) == Wishes(("/a", "/b"))
    other = a_spec(image="python", mounts=mounts[1::-1])
    assert request_of(spec, None) == request_of(other, None)
    assert hash(request_of(spec, None)) == hash(request_of(other, None))


@pytest.mark.parametrize("backend", [PROCESS, DOCKER, PLAIN, GENEROUS])
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "wishes", [{}, {"mounts": ETC}, {"privileged": True}, {"user": "0"}, {"container": "demo"}]
)
def test_a_node_suits_where_nothing_is_said_against_it(
    backend: BackendInfo, trusted: bool, wishes: dict[str, Any]
) -> None:
    books = Books()
    books.refit(an_inventory(backends=(backend,)))
    request = request_of(a_spec(**wishes), None, trusted=trusted)
    assert suits(request, books, {}) == (not unsuitable(request, books, {}))
