"""What a spec says about its container, and what of that makes no sense.

Knows: how references to images, names of environments, users, limits and mounts are written,
and how much of it there may be.
Does not know: nodes, and what they let containers have; who may ask for what.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from typing import Final

from protocol.errors import BadRequest
from protocol.ids import parse_environment_name
from protocol.models.task import DOCKER, Mount, Network, TaskSpec

#: An image's name as registries know it: host and port, then a path, then tag or digest
#: (distribution/reference, grammar of ``Reference``). Each repetition begins with what the one
#: before cannot end with, so that no text is tried in more ways than a few.
_PART: Final = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_REFERENCE: Final = re.compile(
    rf"(?P<name>(?:{_LABEL}(?:\.{_LABEL})*(?::[0-9]{{1,5}})?/)?{_PART}(?:/{_PART})*)"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
    r"(?:@sha256:[0-9a-f]{64})?"
)
#: Of the name alone it is 255 (same source); a tag and a digest follow it.
_LONGEST_REFERENCE: Final = 512
_LONGEST_IMAGE_NAME: Final = 255
#: Docker takes a name of just that many digits for the id of an image.
_IMAGE_ID: Final = re.compile(r"[0-9a-f]{64}")
_ACCOUNT: Final = r"(?:[0-9]{1,10}|[A-Za-z_][A-Za-z0-9_.-]{0,62}\$?)"
_USER: Final = re.compile(rf"{_ACCOUNT}(?::{_ACCOUNT})?")
#: Docker refuses numbers of users above (libcontainer/user, maxID).
_LARGEST_ACCOUNT: Final = 2**31 - 1
#: PATH_MAX of Linux without the NUL at its end.
LONGEST_PATH: Final = 4095
_MOST_MOUNTS: Final = 64
#: Where a mount would hide what every container needs, or what is ours.
_KEPT: Final = ("/proc", "/sys", "/dev", "/.kohaku")
#: Less is refused by Docker (20.10, "Minimum memory limit allowed is 6MB").
LEAST_MEMORY: Final = 6 * 2**20
_LEAST_SHM: Final = 2**16
_LARGEST_SHM: Final = 2**53
#: As Docker knows them (docker/go-units, ulimit.go).
_ULIMITS: Final = frozenset(
    {
        "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc",
        "rss", "rtprio", "rttime", "sigpending", "stack",
    }
)  # fmt: skip
_NO_LIMIT: Final = -1
_LARGEST_LIMIT: Final = 2**63 - 1


def wishes(spec: TaskSpec) -> list[str]:
    """Name the fields of a spec that mean something in a container only, and are set."""
    asked = {
        "container": spec.container,
        "image": spec.image,
        "mounts": spec.mounts,
        "user": spec.user,
        "network": spec.network is not Network.DEFAULT,
        "shm_size": spec.shm_size,
        "ulimits": spec.ulimits,
        "privileged": spec.privileged,
    }
    return [name for name, value in asked.items() if value]


def check_container(spec: TaskSpec) -> None:
    """Refuse what no container could be.

    Raises:
        BadRequest: Naming the field.
    """
    if spec.container and spec.image:
        raise BadRequest(
            "container and image were given together",
            hint="choose one: an environment of the cluster, or an image of a registry",
        )
    asked = wishes(spec)
    if asked and spec.backend not in {"", DOCKER}:
        raise BadRequest(
            f"{asked[0]} was given, and backend {spec.backend} has no containers",
            hint=f"leave out either that or --backend {spec.backend}",
        )
    if spec.wanted_backend == DOCKER and 0 < spec.memory < LEAST_MEMORY:
        raise BadRequest(
            f"memory of {spec.memory} bytes is less than the 6 MiB that a container needs",
            hint="sizes take K, M, G: -m 64M",
        )
    if spec.container:
        parse_environment_name(spec.container)
    if spec.image:
        check_reference(spec.image)
    _check_mounts(spec.mounts)
    _check_user(spec.user)
    if spec.shm_size and not _LEAST_SHM <= spec.shm_size <= _LARGEST_SHM:
        raise BadRequest(
            f"shm_size must be 64 KiB or more, or 0 for the engine's choice, not {spec.shm_size}",
            hint="sizes take K, M, G: --shm-size 1G",
        )
    for name, limits in spec.ulimits.items():
        _check_ulimit(name, *limits)


def check_reference(image: str) -> None:
    """Refuse what cannot name an image of a registry.

    Raises:
        BadRequest: With an example.
    """
    # The length first: nothing longer is worth matching.
    match = _REFERENCE.fullmatch(image) if len(image) <= _LONGEST_REFERENCE else None
    if match is None or len(match["name"]) > _LONGEST_IMAGE_NAME or _IMAGE_ID.fullmatch(image):
        raise BadRequest(
            f"image {image[:80]!r} is not a reference to an image",
            hint="write it as docker pull takes it, such as python:3.12-slim or"
            " registry.lab:5000/team/tool@sha256:...",
        )


def _check_mounts(mounts: tuple[Mount, ...]) -> None:
    if len(mounts) > _MOST_MOUNTS:
        raise BadRequest(
            f"a task may have {_MOST_MOUNTS} mounts, not {len(mounts)}",
            hint="mount the folder that these are in",
        )
    for mount in mounts:
        for side, path in (("source", mount.source), ("destination", mount.destination)):
            if wrong := _say_wrong(path):
                raise BadRequest(
                    f"mounts: the {side} {path[:80]!r} {wrong}",
                    hint="write both as absolute paths: /data/set:/data:ro",
                )
        if mount.destination == "/" or any(_is_below(mount.destination, kept) for kept in _KEPT):
            raise BadRequest(
                f"mounts: nothing can be mounted at {mount.destination[:80]}",
                hint="choose another destination, such as /data",
            )
    places = [mount.destination for mount in mounts]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise BadRequest(
            f"mounts: {twice[:80]} is the destination of two", hint="give each its own"
        )


def _say_wrong(path: str) -> str:
    """Say what keeps a text from being the path of a mount; empty if nothing does."""
    if not path.startswith("/"):
        return "is not an absolute path"
    if len(path.encode(errors="surrogatepass")) > LONGEST_PATH:
        return f"is longer than {LONGEST_PATH} bytes"
    # A newline would end its line in the logs, a colon Docker's own way of writing mounts.
    if not path.isprintable() or ":" in path:
        return "has a colon or a character that cannot be printed in it"
    # What is compared with a node's folders must mean to the node what it reads like here.
    # POSIX leaves the meaning of two slashes at the beginning open, so normpath keeps them.
    plain = "/" + posixpath.normpath(path).lstrip("/")
    if plain != path:
        return f"is not in its plain form, {plain[:80]}"
    return ""


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _check_user(user: str) -> None:
    if not user:
        return
    numbers = (int(part) for part in user.split(":") if part.isascii() and part.isdigit())
    # Python refuses to read a number of 4300 digits; the pattern's bound comes first.
    if not _USER.fullmatch(user) or any(number > _LARGEST_ACCOUNT for number in numbers):
        raise BadRequest(
            f"user {user[:80]!r} is not USER or USER:GROUP",
            hint="use names that the image has, or numbers: 1000:1000",
        )


def _check_ulimit(name: str, soft: int, hard: int) -> None:
    if name not in _ULIMITS:
        raise BadRequest(
            f"ulimits: there is no limit {name[:64]!r}",
            hint=f"there are {', '.join(sorted(_ULIMITS))}",
        )
    if not all(_NO_LIMIT <= limit <= _LARGEST_LIMIT for limit in (soft, hard)):
        raise BadRequest(f"ulimits: {name} takes 0 or more, or -1 for no limit")
    if hard != _NO_LIMIT and (soft == _NO_LIMIT or soft > hard):
        raise BadRequest(
            f"ulimits: the soft limit {soft} of {name} is above the hard one {hard}",
            hint=f"write --ulimit {name}=SOFT:HARD with the smaller one first; -1 is no limit",
        )


def texts(spec: TaskSpec) -> Iterator[str]:
    """Give the texts of the mounts, the one part of a container's wishes that may be large."""
    for mount in spec.mounts:
        yield mount.source
        yield mount.destination
