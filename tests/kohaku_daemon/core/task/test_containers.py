"""What no container could be is refused by name; what one could be is let through."""

from typing import Any

import pytest

from kohaku_daemon.core.task.containers import check_container, check_reference, wishes
from protocol.errors import BadRequest
from protocol.models.task import Mount, Network
from tests.support.builders import a_spec

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"container": "demo"},
        {"container": "demo", "backend": "docker", "memory": 6 * 2**20},
        {"image": "busybox", "network": Network.NONE},
        {"mounts": (Mount("/srv/data", "/data", read_only=True), Mount("/srv", "/devices"))},
        {"user": "1000"},
        {"user": "worker:2147483647"},
        {"user": "machine$"},
        {"shm_size": 2**16},
        {"ulimits": {"nofile": (1024, 4096), "memlock": (-1, -1), "core": (0, 0), "cpu": (5, -1)}},
        {"privileged": True},
        # Of another backend the least is another: it is the node's word then.
        {"memory": 2**20},
    ],
)
def test_what_a_container_could_be_is_let_through(changes: dict[str, Any]) -> None:
    check_container(a_spec(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"container": "demo", "image": "busybox"}, "container and image were given together"),
        ({"container": "Demo"}, "'Demo' cannot be an environment's name"),
        ({"image": "-"}, "image '-' is not a reference to an image"),
        (
            {"image": "busybox", "backend": "process"},
            "image was given, and backend process has no containers",
        ),
        (
            {"mounts": (Mount("/a", "/b"),), "privileged": True, "backend": "process"},
            "mounts was given, and backend process has no containers",
        ),
        (
            {"network": Network.NONE, "backend": "qemu"},
            "network was given, and backend qemu has no containers",
        ),
        (
            {"container": "demo", "memory": 1024},
            "memory of 1024 bytes is less than the 6 MiB that a container needs",
        ),
        (
            {"backend": "docker", "memory": 6 * 2**20 - 1},
            "memory of 6291455 bytes is less than the 6 MiB that a container needs",
        ),
        ({"mounts": (Mount("data", "/d"),)}, "mounts: the source 'data' is not an absolute path"),
        ({"mounts": (Mount("/d", ""),)}, "mounts: the destination '' is not an absolute path"),
        (
            {"mounts": (Mount("/srv/../etc", "/d"),)},
            "mounts: the source '/srv/../etc' is not in its plain form, /etc",
        ),
        (
            {"mounts": (Mount("//etc", "/d"),)},
            "mounts: the source '//etc' is not in its plain form,",
        ),
        (
            {"mounts": (Mount("/d", "/a/./b"),)},
            "mounts: the destination '/a/./b' is not in its plain form, /a/b",
        ),
        (
            {"mounts": (Mount("/a:b", "/d"),)},
            "mounts: the source '/a:b' has a colon or a character that cannot be printed in it",
        ),
        (
            {"mounts": (Mount("/a\nb", "/d"),)},
            r"mounts: the source '/a\nb' has a colon or a character that cannot be printed in it",
        ),
        ({"mounts": (Mount("/a", "/"),)}, "mounts: nothing can be mounted at /"),
        ({"mounts": (Mount("/a", "/proc"),)}, "mounts: nothing can be mounted at /proc"),
        ({"mounts": (Mount("/a", "/dev/shm"),)}, "mounts: nothing can be mounted at /dev/shm"),
        ({"mounts": (Mount("/a", "/.kohaku/x"),)}, "mounts: nothing can be mounted at /.kohaku/x"),
        (
            {"mounts": (Mount("/a", "/d"), Mount("/b", "/d"))},
            "mounts: /d is the destination of two",
        ),
        (
            {"mounts": tuple(Mount("/a", f"/d{number}") for number in range(65))},
            "a task may have 64 mounts, not 65",
        ),
        ({"user": "a b"}, "user 'a b' is not USER or USER:GROUP"),
        ({"user": "0:0:0"}, "user '0:0:0' is not USER or USER:GROUP"),
        ({"user": "2147483648"}, "user '2147483648' is not USER or USER:GROUP"),
        ({"user": "9" * 5000}, f"user '{'9' * 80}' is not USER or USER:GROUP"),
        (
            {"shm_size": 1024},
            "shm_size must be 64 KiB or more, or 0 for the engine's choice, not 1024",
        ),
        ({"shm_size": -1}, "shm_size must be 64 KiB or more, or 0 for the engine's choice, not -1"),
        ({"ulimits": {"files": (1, 1)}}, "ulimits: there is no limit 'files'"),
        ({"ulimits": {"nofile": (-2, 1)}}, "ulimits: nofile takes 0 or more, or -1 for no limit"),
        ({"ulimits": {"cpu": (0, 2**63)}}, "ulimits: cpu takes 0 or more, or -1 for no limit"),
        (
            {"ulimits": {"nofile": (2, 1)}},
            "ulimits: the soft limit 2 of nofile is above the hard one 1",
        ),
        (
            {"ulimits": {"nofile": (-1, 1)}},
            "ulimits: the soft limit -1 of nofile is above the hard one 1",
        ),
    ],
)
def test_what_no_container_could_be_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_container(a_spec(**changes))
    assert caught.value.message.startswith(words)


@pytest.mark.parametrize(
    "image",
    [
        "busybox",
        "python:3.12-slim",
        "library/python",
        "localhost:5000/a/b",
        "127.0.0.1:5000/team/tool:1",
        "GHCR.io/org/x_y__z--w.v:Tag_1.2",
        f"busybox@{DIGEST}",
        f"registry.lab/team/tool:1@{DIGEST}",
        "a" * 255,
    ],
)
def test_a_reference_as_docker_takes_it(image: str) -> None:
    check_reference(image)


@pytest.mark.parametrize(
    "image",
    [
        "", "Busybox", "a b", "a//b", "/a", "a/", "a:", "a:-x", "a@sha256:00", "a@md5:" + "0" * 64,
        "a" * 256, "a/" * 300, "0" * 64, "https://ghcr.io/a", "a\n", "a--", "a___b",
    ],
)  # fmt: skip
def test_what_is_no_reference(image: str) -> None:
    with pytest.raises(BadRequest, match="not a reference to an image"):
        check_reference(image)


def test_what_needs_a_container_is_named_in_order() -> None:
    spec = a_spec(privileged=True, user="0", network=Network.NONE, mounts=(Mount("/a", "/b"),))
    assert wishes(spec) == ["mounts", "user", "network", "privileged"]
    assert wishes(a_spec(env={"A": ""}, memory=1, workdir="/")) == []
