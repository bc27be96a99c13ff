"""``kohakud restore``: a host comes back from a backup, whole or not at all.

Knows: that nothing is overwritten, and that what the backup says may have been overtaken.
Does not know: the file's layout (``archive``), which words may be believed
(``core.cluster.restoring``).

All is made ready in a folder beside the host's and moved there by one rename, which is the
moment of the restore: killed before it, there is no cluster, and the same command begins anew.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from kohaku_daemon.clock import SystemClock
from kohaku_daemon.core.cluster.records import (
    AuditRecord,
    DocumentChange,
    DropDocument,
    EventRecord,
    JoinTokenRecord,
    PutDocument,
)
from kohaku_daemon.core.cluster.restoring import RESTORER, doubt_node, doubt_task
from kohaku_daemon.host import config as host_config
from kohaku_daemon.local import pidfiles
from kohaku_daemon.local.archive import HOME, SETTINGS, Manifest, read_file, read_manifest, unpack
from kohaku_daemon.local.backup import stamp
from kohaku_daemon.local.home import Home
from kohaku_daemon.store.database import sync
from kohaku_daemon.store.documents import Documents
from kohaku_daemon.store.pair import examine_pair, open_pair, reading_records
from kohaku_daemon.store.tasks import Group, TaskStore, task_row
from protocol.errors import Conflict, Unavailable

#: What a host that was killed leaves behind, and no more than that may be in the way.
_LEFT: Final = frozenset({"host.pid", "host.url"})
#: Seconds that this machine's clock may be behind the one of the backup.
_SKEW_S: Final = 300.0
#: Tasks in one commit: a group is in memory as a whole.
_GROUP: Final = 1000


def restore(
    source: Path, flags: Mapping[str, Any], *, config: Path | None = None, resume: bool = False
) -> int:
    """Put a backup in the place of this machine's host. Gives the exit status.

    Nothing is launched by the host that comes back until somebody undrains its nodes; with
    ``resume`` it takes up work at once, for which nothing may have happened since the backup.

    Raises:
        NotFound: There is no such backup.
        BadRequest: It is no backup, or a setting makes no sense.
        Unsupported: A newer version of the program made it.
        Conflict: There is a cluster already, its host runs, or ``resume`` is out of the question.
        Unavailable: The backup is damaged, or the disk full or not to be written.
    """
    manifest = read_manifest(source)
    now = SystemClock().now()
    _refuse_what_cannot_be(manifest, source, now, resume=resume)
    data = _find_data(source, flags, config)
    ready = data.parent / f".{data.name}.restoring"
    with _hold(data):
        _refuse_cluster(data)
        try:
            _make_ready(ready, source, manifest, now, resume=resume)
        except BaseException:  # Ctrl-C too: a half-made cluster would be in the next one's way
            shutil.rmtree(ready, ignore_errors=True)
            raise
        (data / "host.url").unlink(missing_ok=True)
    said = [] if config else _place_settings(ready)
    said += _place_home(ready, data)
    _place_data(ready, data)
    sys.stdout.write(f"{data}\n")
    sys.stderr.write(_describe(manifest, data, said, resume=resume))
    return 0


# --- refusing -------------------------------------------------------------------------------


def _refuse_what_cannot_be(manifest: Manifest, source: Path, now: float, *, resume: bool) -> None:
    if now < manifest.made_at - _SKEW_S:
        raise Conflict(
            f"{source} was made at {stamp(manifest.made_at)}, and here it is {stamp(now)}",
            hint="set this machine's clock first: tasks would end before they began",
        )
    if resume and manifest.host_ran:
        raise Conflict(
            f"{source} was made while the host ran, so work may have gone on after it",
            hint="restore it without --resume; for a move, stop the host first and then back up",
        )


@contextmanager
def _hold(data: Path) -> Iterator[None]:
    """Be the host of a folder, so that none starts there meanwhile."""
    with ExitStack() as stack:
        try:
            stack.enter_context(pidfiles.hold(data / "host.pid", f"the host of {data}"))
        except Conflict as error:
            if data != Home().host.resolve():
                raise
            hint = f"{error.hint}; if kohakud up started it: kohakud down"
            raise Conflict(error.message, hint=hint) from None
        yield


def _refuse_cluster(data: Path) -> None:
    if data.is_mount():
        raise Conflict(
            f"{data} is a mount point, which cannot be replaced in one step",
            hint=f"restore into a folder in it: --data {data / 'host'}, and start the host so",
        )
    there = sorted(path.name for path in data.iterdir() if path.name not in _LEFT)
    if there:
        named = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
        raise Conflict(
            f"{data} is not empty: it has {named}; a restore replaces nothing",
            hint=f"if that cluster is to be given up: mv {data} {data}.old",
        )


# --- making ready ---------------------------------------------------------------------------


def _find_data(source: Path, flags: Mapping[str, Any], config: Path | None) -> Path:
    """Give the folder of the host that is to come: by the settings it will be started with.

    These are the machine's, if it has some, else those in the backup.
    """
    file = config or host_config.default_file()
    if file is not None:
        return host_config.load(flags, file=file).data.resolve()
    with tempfile.TemporaryDirectory(prefix="kohakud-restore-") as folder:
        text = read_file(source, SETTINGS)
        if text is not None:
            file = Path(folder) / "host.toml"
            file.write_bytes(text)
        return host_config.load(flags, file=file).data.resolve()


def _make_ready(ready: Path, source: Path, manifest: Manifest, now: float, *, resume: bool) -> None:
    if ready.exists():
        shutil.rmtree(ready)  # of a restore that was killed
    try:
        ready.mkdir(mode=0o700)
    except OSError as error:
        raise Unavailable(
            f"cannot make {ready}: {error.strerror}", hint="nothing was put in place"
        ) from error
    unpack(source, ready)
    host = ready / "host"
    if examine_pair(host).cluster != manifest.cluster:
        raise Unavailable(f"the backup {source} is damaged: it has another cluster's files")
    with reading_records(host):
        _revive(host, manifest, source, now, resume=resume)
    sync(host)


def _revive(folder: Path, manifest: Manifest, source: Path, now: float, *, resume: bool) -> None:
    """Have the stores say no more than may be believed."""
    documents, tasks = open_pair(folder, new_cluster=manifest.cluster)
    try:
        documents.raise_epoch()
        if not resume:
            documents.apply(_doubt_documents(documents))
            _doubt_tasks(tasks, f"the backup of {stamp(manifest.made_at)}", now)
        tasks.write(_traces(tasks, manifest, source, now, resume=resume))
    finally:
        tasks.close()


def _doubt_documents(documents: Documents) -> Iterator[DocumentChange]:
    book = documents.read()
    for node in book.nodes.values():
        yield PutDocument(doubt_node(node))
    for digest in book.join_tokens:
        # It may have been used up since.
        yield DropDocument(JoinTokenRecord, digest)


def _doubt_tasks(tasks: TaskStore, backup: str, now: float) -> None:
    live = list(tasks.live_tasks())
    for begin in range(0, len(live), _GROUP):
        group = live[begin : begin + _GROUP]
        tasks.write(Group(tasks=[task_row(doubt_task(task, backup, now)) for task in group]))


def _traces(
    tasks: TaskStore, manifest: Manifest, source: Path, now: float, *, resume: bool
) -> Group:
    """Write into the diary and the audit log that this is not how it went on."""
    next_ = "work goes on" if resume else "nodes drain until somebody has looked"
    text = f"the cluster came back from the backup of {stamp(manifest.made_at)}; {next_}"
    event = EventRecord(
        id=tasks.last_event_id() + 1, at=now, kind="cluster.restored", text=text, actor=RESTORER
    )
    audit = AuditRecord(
        at=now, actor=RESTORER, role="admin", address="", method="restore", subject=source.name
    )
    return Group(events=[event], audits=[audit])


# --- placing --------------------------------------------------------------------------------


def _place_settings(ready: Path) -> list[str]:
    return _place(ready / SETTINGS, host_config.config_file())


def _place_home(ready: Path, data: Path) -> list[str]:
    """Put back where ``up`` had its host listen: there its runners look for it."""
    home = Home()
    return _place(ready / HOME, home.kept) if data == home.host.resolve() else []


def _place(made: Path, wanted: Path) -> list[str]:
    """Put one small file in place unless there is one; say what was done."""
    if not made.exists():
        return []
    if wanted.exists():
        same = wanted.read_bytes() == made.read_bytes()
        return [] if same else [f"{wanted} was left as it is; the backup has another one"]
    aside = wanted.with_name(f".{wanted.name}.restoring")
    try:
        wanted.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(made, aside)
        sync(aside)
        aside.rename(wanted)
    except OSError as error:
        raise Unavailable(f"cannot write {wanted}: {error.strerror}") from error
    return [f"{wanted} came back too"]


def _place_data(ready: Path, data: Path) -> None:
    """Make it so: an empty folder is replaced by a full one."""
    try:
        (ready / "host").rename(data)
        sync(data.parent)
    except OSError as error:
        raise Conflict(
            f"{data} cannot be put in place: {error.strerror}",
            hint="does somebody start a host there? stop it, move the folder aside, and repeat",
        ) from error
    finally:
        shutil.rmtree(ready, ignore_errors=True)


def _describe(manifest: Manifest, data: Path, said: Sequence[str], *, resume: bool) -> str:
    lines = [
        f"cluster {manifest.cluster} is in {data}, as it was at {stamp(manifest.made_at)}",
        *said,
        "tokens that were revoked after that are good again; tasks that came after it are unknown",
    ]
    if resume:
        lines.append("next: kohakud host, or kohakud up --detach")
    else:
        lines += [
            "all nodes drain, so that nothing is launched that may have run since the backup",
            "next: start the host; when the nodes are online, look at: kohaku task list,",
            "      kohaku events; then, for each node: kohaku node undrain NAME",
        ]
    return "\n".join(lines) + "\n"
