"""The two files of a host, opened together or not at all.

Knows: that neither file means anything without the other, and which of them is made first.
Does not know: what is in them.

``tasks.sqlite`` is made first: a start that was killed in between leaves tasks without a
cluster, and none of those was ever accepted. From then on both are there. So a file that is
missing was lost, and a host that made a new one in its place would deny what it had accepted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from kohaku_daemon.store import documents, migrations
from kohaku_daemon.store.database import DAMAGED_HINT, Synchronous, examine
from kohaku_daemon.store.documents import Documents
from kohaku_daemon.store.tasks import TaskStore
from protocol.errors import Unavailable

#: Of the files, in the host's data folder.
TASKS: Final = "tasks.sqlite"
CLUSTER: Final = "cluster.json"


class Pair(NamedTuple):
    """Both files, open."""

    documents: Documents
    tasks: TaskStore


class Sight(NamedTuple):
    """What both files are, seen without opening them for writing."""

    #: Snowflake id of the cluster, as text.
    cluster: str
    #: Version of each file's schema, by its name.
    schemas: dict[str, int]


def open_pair(folder: Path, *, new_cluster: str, synchronous: Synchronous = "FULL") -> Pair:
    """Open both files and bring their schemas up to date; make them in an empty folder.

    A folder that is refused is left as it is: each file is looked at before either is written.

    Raises:
        Unsupported: A newer version of the program wrote one of them.
        Unavailable: One cannot be opened, is damaged, or was lost.
    """
    known = documents.examine(folder / CLUSTER)
    if known is not None:
        _refuse_lost_tasks(folder, known)
    tasks = TaskStore.open(folder / TASKS, synchronous=synchronous)
    try:
        if known is None and tasks.highest_id() > 0:
            raise _lost(folder / CLUSTER, "is missing", folder / TASKS)
        return Pair(Documents.open(folder / CLUSTER, new_cluster=new_cluster), tasks)
    except BaseException:
        tasks.close()
        raise


def examine_pair(folder: Path) -> Sight:
    """Look whether both files are there and whole.

    Raises:
        Unsupported: A newer version of the program wrote one of them.
        Unavailable: One cannot be opened, is damaged, or is missing.
    """
    cluster = documents.examine(folder / CLUSTER)
    if cluster is None:
        raise Unavailable(f"{folder / CLUSTER} is missing")
    tasks = examine(folder / TASKS, migrations.TASKS)
    return Sight(cluster.cluster, {TASKS: tasks, CLUSTER: cluster.schema})


@contextmanager
def reading_records(folder: Path) -> Iterator[None]:
    """Say which file it was that holds a record of no sense, as after a bit has turned.

    Raises:
        Unavailable: The block met such a record.
    """
    path = folder / TASKS
    try:
        yield
    except msgspec.MsgspecError as error:
        # Lets go of the rows that were still to come, before the file is closed.
        traceback.clear_frames(error.__traceback__)
        raise Unavailable(
            f"the store {path} is damaged: a record makes no sense: {error}",
            hint=DAMAGED_HINT,
            details={"store": str(path)},
        ) from error


def _refuse_lost_tasks(folder: Path, known: documents.Glance) -> None:
    tasks, cluster = folder / TASKS, folder / CLUSTER
    if not tasks.exists():
        # A cluster without nodes has launched nothing, and may have been written by hand.
        if known.has_nodes:
            raise _lost(tasks, "is missing", cluster)
    elif tasks.stat().st_size == 0:
        raise _lost(tasks, "is empty", cluster)


def _lost(path: Path, what: str, other: Path) -> Unavailable:
    return Unavailable(
        f"{path} {what}, and {other} beside it is not: a part of this cluster was lost",
        hint="nothing was changed; move the data folder aside and bring a backup back with "
        f"kohakud restore, or move {other.name} aside too to begin a new cluster",
        details={"store": str(path)},
    )
