"""What a Docker engine says, in words for the owner of a task.

Knows: the engine's own texts (dockerd 20.10, runc 1.1) and what there is to do about each.
Does not know: what was asked. Texts that are not known here are passed on as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kohaku_daemon.backends.base import BackendAway, BackendFailed
from kohaku_daemon.dockerd.errors import EngineAway, EngineRefused

#: A part of what the engine says, and what that means; ``{0}`` is what the pattern's group found.
_MEANINGS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), meaning)
    for pattern, meaning in (
        (
            r"Requested CPUs are not available - requested (.*)",
            "this node's Docker does not have the cores it was to run on: {0}; set cores of its"
            " runner to those that Docker may use",
        ),
        (
            r"Requested memory nodes are not available - requested (.*)",
            "this node's Docker does not have the NUMA node it was to run on: {0}",
        ),
        (
            r"could not select device driver",
            "this node's Docker has no NVIDIA runtime to give it GPUs with: install"
            " nvidia-container-toolkit there, and restart Docker",
        ),
        (
            r"unable to find user ([^:\n]*)",
            "its image has no user {0}: choose another one, or a number",
        ),
        (
            r"unable to find group ([^:\n]*)",
            "its image has no group {0}: choose another one, or a number",
        ),
        (
            r"no space left on device",
            "no space left on this node's disk where Docker keeps containers: free some there"
            " (docker system df), or run the task on another node",
        ),
        (
            r"could not find an available.*address pool|no available IPv4 addresses",
            "this node's Docker has no address left for another container: wait for some to end,"
            " or run the task with --network none",
        ),
        (
            r"Minimum memory limit allowed is",
            "Docker gives a container 6 MiB of memory or more: ask for more",
        ),
        (
            r"bind source path does not exist: (.*)",
            "{0} is not there on this node, so it cannot be mounted",
        ),
        (
            r"no such image",
            "its image was removed from this node: submit the task again",
        ),
        (
            r"/\.kohaku/init[^\n]*permission denied",
            "Docker may not run the runner's own helper: its data folder must not be on a disk"
            " that is mounted with noexec",
        ),
        (
            r"unable to apply caps",
            "this machine has not got all privileges itself, so its containers cannot have them",
        ),
        (
            r"error mounting \"?[^\"]*\"? to rootfs at \"?([^\"]*)\"?.*not a directory",
            "what is mounted at {0} is a file where the image has a folder, or the reverse",
        ),
    )
)


def explain_refusal(text: str) -> str:
    """Say what an engine's refusal means, and what to do about it."""
    for pattern, meaning in _MEANINGS:
        if (found := pattern.search(text)) is not None:
            return meaning.format(*(part.strip() for part in found.groups()))
    return f"Docker on this node refuses: {text}"


@contextmanager
def engine_errors() -> Iterator[None]:
    """Raise an engine's errors as those of a backend."""
    try:
        yield
    except EngineAway as error:
        raise BackendAway(error.message) from error
    except EngineRefused as error:
        raise BackendFailed(explain_refusal(error.message)) from error
