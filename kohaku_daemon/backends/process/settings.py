"""What an administrator may choose about the process backend."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Isolation(StrEnum):
    """How far a task is kept from the machine."""

    #: Namespaces where they can be made, else plain.
    AUTO = "auto"
    #: Namespaces, or the backend is not healthy.
    NAMESPACES = "namespaces"
    #: A process like any other, in its own session.
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """What an administrator may choose about the process backend."""

    #: How far tasks are kept from the machine and from each other: "namespaces", or this backend
    #: takes no task; "plain", processes like any others; "auto", namespaces where they can be
    #: made, else plain.
    isolation: Isolation = Isolation.AUTO
    #: Where the cgroup file systems are. A folder that is not there turns limits by cgroup off.
    cgroup_root: Path = Path("/sys/fs/cgroup")
    #: A runner that is root gives each launch a user of its own, this number or one of the
    #: ``uid_span`` after it. The default lies between the ranges systemd names for containers
    #: (0x80000 to 0x6FFFFFFF) and the end of the signed numbers (systemd, UIDS-GIDS.md).
    uid_base: int = 0x70000000
    #: How many users launches of a runner that is root are spread over; 0 for one, 65534, that
    #: all of them share.
    uid_span: int = 0x08000000
    #: Processes and threads a launch may have at once, where a cgroup counts them.
    max_processes: int = 8192
    #: Folders that stay writable for tasks in namespaces, as far as their user may write there.
    writable: tuple[Path, ...] = ()
