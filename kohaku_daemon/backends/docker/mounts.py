"""Which files and folders of the machine a container sees.

Knows: what may be mounted, what never may, how links are kept from leading elsewhere, and how
Docker wants it written. Looks at the disk, so run it in a thread.
Does not know: containers.

A source is followed to what it really is, and that is what is compared and mounted. A task that
may write above a source can still exchange it between the look and the mount, which Docker makes
by its path: roots belong to those who may see all of what is below them.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kohaku_daemon.backends.base import BackendFailed
from protocol.models.task import Mount

#: Where our own things are in each container.
OURS: Final = "/.kohaku"
SHARED: Final = "/shared"
LOCAL_TEMP: Final = "/local_temp"
#: What no mount may hide.
_KEPT: Final = (OURS, SHARED, LOCAL_TEMP, "/proc", "/sys", "/dev")


def bind(source: str, target: str, *, read_only: bool = False, alone: bool = False) -> _DockerMount:
    """Write a mount of a file or folder that exists.

    ``alone`` leaves out file systems that are mounted below it: to these, ``read_only`` does not
    reach with engines older than 25.
    """
    written: _DockerMount = {
        "Type": "bind",
        "Source": source,
        "Target": target,
        "ReadOnly": read_only,
    }
    if alone:
        written["BindOptions"] = {"NonRecursive": True}
    return written


_DockerMount = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MountRules:
    """What may be mounted on a node."""

    #: Folders below which anybody may.
    roots: tuple[Path, ...] = ()
    #: Operators may anywhere.
    allows_any: bool = False
    #: The daemons' own data, which nobody sees.
    hidden: tuple[Path, ...] = ()

    def resolve(self, mounts: Sequence[Mount], *, trusted: bool) -> list[_DockerMount]:
        """Check the mounts that a task asks for, and write them.

        Raises:
            BackendFailed: One of them is not to be had.
        """
        return [self._resolve(mount, trusted=trusted) for mount in mounts]

    def _resolve(self, mount: Mount, *, trusted: bool) -> _DockerMount:
        target = posixpath.normpath(mount.destination)
        if not target.startswith("/") or target == "/" or _is_below(target, _KEPT):
            raise BackendFailed(
                f"nothing can be mounted at {mount.destination}: choose another destination,"
                " such as /data"
            )
        if not mount.source.startswith("/"):
            raise BackendFailed(f"the source of a mount is an absolute path, not {mount.source}")
        source = os.path.realpath(mount.source)
        may_any = trusted and self.allows_any
        # First, so that nobody learns what there is elsewhere.
        if not may_any and not _is_below(source, map(_real, self.roots)):
            raise BackendFailed(self._explain(mount, source, trusted=trusted))
        for hidden in map(_real, self.hidden):
            if _is_below(source, [hidden]) or _is_below(hidden, [source]):
                raise BackendFailed(
                    f"{mount.source} cannot be mounted: it holds data of the cluster's daemons"
                )
        _check_kind(mount.source, source)
        return bind(source, target, read_only=mount.read_only)

    def _explain(self, mount: Mount, source: str, *, trusted: bool) -> str:
        there = ", ".join(map(str, self.roots)) or "none"
        is_link = posixpath.normpath(mount.source) != source
        what = f"{mount.source} leads to {source}, which" if is_link else f"{mount.source}"
        more = "; this node lets nobody mount others, not operators either" if trusted else ""
        return f"{what} is not below a folder that tasks may mount on this node ({there}){more}"


def resolve_fixed(written: Iterable[str], hidden: Sequence[Path]) -> Iterator[_DockerMount]:
    """Write the mounts that the configuration gives every container, ``SOURCE:DESTINATION[:ro]``.

    What is hidden below them is covered by something empty.

    Raises:
        BackendFailed: One makes no sense, or is not there.
    """
    for text in written:
        source, _, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        is_plain = source.startswith("/") and target.startswith("/")
        if not is_plain or mode not in {"", "ro", "rw"} or _is_below(target, _KEPT):
            raise BackendFailed(
                f"docker.mounts of this node's runner has {text!r}: write"
                " SOURCE:DESTINATION or SOURCE:DESTINATION:ro, both absolute paths"
            )
        real = os.path.realpath(source)
        _check_kind(source, real)
        yield bind(real, posixpath.normpath(target), read_only=mode == "ro")
        yield from cover(real, posixpath.normpath(target), hidden)


def cover(source: str, target: str, hidden: Sequence[Path]) -> Iterator[_DockerMount]:
    """Write empty folders over what is hidden below a mount."""
    for path in map(_real, hidden):
        if path != source and _is_below(path, [source]) and os.path.isdir(path):
            inside = posixpath.join(target, os.path.relpath(path, source))
            yield {"Type": "tmpfs", "Target": inside, "TmpfsOptions": {"Mode": 0o555}}


def _check_kind(named: str, source: str) -> None:
    """Refuse what is not there, and what is neither a file nor a folder: a socket is a door."""
    try:
        kind = os.stat(source).st_mode
    except OSError as error:
        raise BackendFailed(
            f"{named} cannot be mounted on this node: {(error.strerror or 'it fails').lower()}"
        ) from error
    if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
        raise BackendFailed(f"{named} cannot be mounted: it is neither a file nor a folder")


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(path == one or path.startswith(one.rstrip("/") + "/") for one in folders)
