"""``kohakud backup``: one file from which a host comes back, made while it runs.

Knows: what belongs to a cluster's host, and in which order it must be read.
Does not know: the file's layout (``archive``), what is done with it (``restore``).

Why the two stores agree: ``tasks.sqlite`` is copied in one read transaction, so it holds a
commit and all before it. ``cluster.json`` is read **after** it, and is always replaced whole.
The host writes ``cluster.json`` first and then the tasks that rely on it, so every node that
the copied tasks are on is in it, but for nodes that were removed meanwhile. What a restore
sees is therefore what a host sees that was killed between the two writes, and it knows what to
do then. The other way round, tasks could be on nodes that the backup never heard of.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import kohaku_daemon
from kohaku_daemon.clock import SystemClock
from kohaku_daemon.host import config as host_config
from kohaku_daemon.local import pidfiles
from kohaku_daemon.local.archive import HOME, SETTINGS, Manifest, is_name, verify, write_archive
from kohaku_daemon.local.home import Home
from kohaku_daemon.packing.pieces import ENVIRONMENTS
from kohaku_daemon.store import documents, migrations
from kohaku_daemon.store.database import copy_database, examine, sync
from kohaku_daemon.store.pair import CLUSTER, TASKS, examine_pair
from protocol.errors import Conflict, NotFound, Unavailable
from protocol.units import render_size

#: Of this run of the host only, or carried over into the copy of the database.
_PASSING: Final = (".pid", ".url", "-wal", "-shm", "-journal", ".lock", ".new")
#: More than a few of these belong to nobody's host: secrets and keys are small. Bytes.
_LARGEST_ASIDE: Final = 64 * 2**20


def backup(target: Path | None, flags: Mapping[str, Any], *, config: Path | None = None) -> int:
    """Write a backup of this machine's host to ``target``: a new file, or a folder for one.

    Prints the file's path. Gives the exit status.

    Raises:
        NotFound: There is no cluster.
        Conflict: The file exists already.
        Unavailable: A store is damaged or cannot be read, or the backup cannot be written.
        Unsupported: A newer version of the program wrote a store.
        BadRequest: A setting makes no sense.
    """
    settings = config or host_config.default_file()
    data = host_config.load(flags, file=settings).data
    if not (data / CLUSTER).exists() and not (data / TASKS).exists():
        raise NotFound(
            f"there is no cluster in {data}",
            hint="its folder is another one? then: --data FOLDER, or set KOHAKU_HOME",
        )
    now = SystemClock().now()
    path = _choose(target, now)
    with _staged(path) as folder:
        manifest = _write(folder, path, data, settings, now)
    sys.stdout.write(f"{path}\n")
    sys.stderr.write(_describe(manifest, data, path))
    return 0


def stamp(at: float) -> str:
    """Write a time for people who read backups: ``2026-11-23 16:40:05 UTC``."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def _choose(target: Path | None, now: float) -> Path:
    name = time.strftime("kohaku-backup-%Y%m%dT%H%M%SZ.tar", time.gmtime(now))
    path = Path(name) if target is None else target / name if target.is_dir() else target
    path = path.absolute()
    if path.exists() or path.is_symlink():
        raise Conflict(f"{path} exists already", hint="choose another name; nothing is replaced")
    if not path.parent.is_dir():
        raise NotFound(f"there is no folder {path.parent}", hint=f"mkdir -p {path.parent}")
    return path


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Make a folder beside the backup for what goes into it: there it needs no second disk.

    Raises:
        Unavailable: The disk is full, or the folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".kohakud-backup-", dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise Unavailable(
            f"the backup {path} cannot be written: {error.strerror} ({error.filename or 'disk'})",
            hint="free some space, or choose another folder; nothing of it was kept",
        ) from error


def _write(folder: Path, path: Path, data: Path, settings: Path | None, now: float) -> Manifest:
    ran = pidfiles.holder(data / "host.pid") is not None
    _copy_tasks(data / TASKS, folder / TASKS)
    _copy_document(data / CLUSTER, folder / CLUSTER)
    sight = examine_pair(folder)
    aside, left_out = _find_aside(data)
    files = {f"host/{TASKS}": folder / TASKS, f"host/{CLUSTER}": folder / CLUSTER, **aside}
    if settings is not None:
        files[SETTINGS] = settings
    if data == Home().host and Home().kept.exists():
        files[HOME] = Home().kept
    whole = folder / "backup"
    write_archive(
        whole,
        Manifest(
            made_at=now,
            program=kohaku_daemon.version(),
            cluster=sight.cluster,
            host_ran=ran or pidfiles.holder(data / "host.pid") is not None,
            schemas=sight.schemas,
            left_out=left_out,
        ),
        files,
    )
    manifest = verify(whole)
    whole.rename(path)
    sync(path.parent)
    return manifest


def _copy_tasks(source: Path, target: Path) -> None:
    if not source.exists():
        raise _missing(source)
    # Damage is told of the file where it is, and not of its copy.
    examine(source, migrations.TASKS)
    copy_database(source, target)


def _copy_document(source: Path, target: Path) -> None:
    """Copy cluster.json: one open file is one version of it, whatever is renamed meanwhile."""
    if documents.examine(source) is None:
        raise _missing(source)
    target.write_bytes(source.read_bytes())


def _missing(path: Path) -> Unavailable:
    return Unavailable(
        f"{path} is missing, so there is nothing whole to back up",
        hint="was it moved? else take an older backup: kohakud restore",
    )


def _find_aside(data: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Find the other files of the host: tokens and keys of today and of later versions.

    Gives them by their names in the backup, and the names of what is left out.
    """
    found: dict[str, Path] = {}
    left_out: list[str] = []
    for path in sorted(data.iterdir()):
        if path.name in (TASKS, CLUSTER) or path.name.endswith(_PASSING):
            continue
        plain = path.is_file() and not path.is_symlink()
        if plain and is_name(f"host/{path.name}") and path.stat().st_size <= _LARGEST_ASIDE:
            found[f"host/{path.name}"] = path
        else:
            left_out.append(path.name)
    return found, tuple(left_out)


def _describe(manifest: Manifest, data: Path, path: Path) -> str:
    size = render_size(path.stat().st_size)
    lines = [
        f"cluster {manifest.cluster} of {data}, as it was at {stamp(manifest.made_at)}",
        f"{len(manifest.files)} files, {size}, read back and compared",
    ]
    others = [name for name in manifest.left_out if name != ENVIRONMENTS]
    if others:
        lines.append(f"left out, as no part of the host: {', '.join(others)}")
    if len(others) < len(manifest.left_out):
        folder = data / ENVIRONMENTS
        lines.append(f"packed environments are not in it: keep a copy of {folder} beside it")
    lines.append("it holds the admin's token: keep it where only admins can read it")
    return "\n".join(lines) + "\n"
