"""What a launch's container needs on the machine's disk before it is made.

Knows: which files and folders that are, and who may write there. Blocks; run it in a thread.
Does not know: engines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from kohaku_daemon.backends.base import BackendFailed, TaskFolders
from kohaku_daemon.backends.docker.container import Surroundings
from kohaku_daemon.backends.docker.mounts import SHARED, MountRules, bind, cover, resolve_fixed
from kohaku_daemon.backends.docker.record import ContainerRecord, make_writable
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.packing.pieces import ENVIRONMENTS

#: The part of the scratch folder that a container sees. Root in it may make programs there that
#: anybody could run as root, so nobody else gets at it: the folder above is the runner's alone.
_INSIDE: Final = "files"


@dataclass(frozen=True, slots=True)
class LaidOut:
    """What was made and found."""

    #: As they are to be mounted.
    folders: TaskFolders
    mounts: list[dict[str, Any]]


def lay_out(
    launch: Launch,
    folders: TaskFolders,
    record: ContainerRecord,
    here: Surroundings,
    hidden: Sequence[Path],
    machine_folders: Sequence[str],
) -> LaidOut:
    """Make the files of a launch, and find what is mounted beside them.

    Raises:
        BackendFailed: A mount is not to be had, or the disk is full or read-only.
    """
    settings = here.settings
    shared = [Path(here.shared_dir)] if here.shared_dir else []
    hidden = (*hidden, *_close_environments(shared))
    rules = MountRules(
        roots=(*settings.mount_roots, *shared),
        allows_any=settings.allow_any_mount,
        hidden=tuple(hidden),
    )
    mounts = [
        *_mount_machine(machine_folders, hidden),
        *(cover(here.shared_dir, SHARED, hidden) if here.shared_dir else ()),
        *resolve_fixed(settings.mounts, hidden),
        *rules.resolve(launch.spec.mounts, trusted=launch.trusted),
    ]
    inside = folders.scratch / _INSIDE
    try:
        record.make()
        for path in {folders.stdout, folders.stderr}:
            make_writable(str(path))
        folders.scratch.chmod(0o700)
        with suppress(FileExistsError):
            inside.mkdir()
        inside.chmod(0o777)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise BackendFailed(f"cannot make its files on this node: {why}") from error
    return LaidOut(replace(folders, scratch=inside), mounts)


def _close_environments(shared: Sequence[Path]) -> list[Path]:
    """Name what tasks must not get at in shared folders, and see that it is there to be covered.

    Root in a container could spoil packed environments, read what others have in theirs, or have
    a link wait for the host in the place where it writes them.
    """
    packed = [folder / ENVIRONMENTS for folder in shared]
    for folder in packed:
        with suppress(OSError):  # the storage may be read-only here: then it is for tasks too
            folder.mkdir(mode=0o755, exist_ok=True)
    return packed


def _mount_machine(folders: Sequence[str], hidden: Sequence[Path]) -> list[dict[str, Any]]:
    mounts = []
    for folder in folders:
        real = os.path.realpath(folder)
        mounts.append(bind(real, folder, read_only=True, alone=True))
        mounts += cover(real, folder, hidden)
    return mounts
