"""Where on this machine cgroups of launches can be made, and what they can limit.

Knows: how the three arrangements of cgroups (v1, v2, hybrid) are recognised and prepared, and
how a claim becomes files to write. Every path hangs below a root folder, so tests give it one
of their own.
Does not know: any one launch's life (``group``).

Groups are named ``kohaku/SITE/KEY``. With v2 and without delegation they lie below the root;
with systemd's ``Delegate=yes`` below the service's own group, whose processes must then move
into a leaf, because a v2 group with limits on its children may hold no processes itself
(cgroup-v2.rst, "No Internal Process Constraint").
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from kohaku_daemon.backends.process import sites
from kohaku_daemon.backends.process.group import UNIFIED
from kohaku_daemon.backends.process.record import GroupPlan
from protocol.models.task import Claim

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LIMITS: Final = ("memory", "cpuset", "pids")
#: The daemons' own group, where they may not stay in the one that holds ``kohaku``.
_LEAF: Final = "kohaku-daemons"
#: Where keepers stay, beside the launches' groups, when they are not starting something.
_HOME: Final = "keepers"
#: How often to begin anew if somebody removes what is just being prepared.
_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class GroupSite:
    """Where groups are made: a prepared folder ``kohaku/SITE`` for each controller."""

    #: Controller, or ``unified`` for cgroup v2, to the folder that groups are made in.
    parents: dict[str, Path]
    #: What can be limited, out of memory, cpuset, pids.
    limits: frozenset[str]

    @property
    def is_v2(self) -> bool:
        """Say whether limits are set by cgroup v2."""
        return set(self.parents) == {UNIFIED}

    def describe(self) -> str:
        """Say what it is, for people."""
        version = "v2" if self.is_v2 else "v1"
        return f"cgroup {version}: {', '.join(sorted(self.limits))}"

    def plan(self, key: str, claim: Claim, max_processes: int) -> GroupPlan:
        """Plan the group of one launch."""
        # Text: each launch comes here, and a ``Path`` costs more than the rest of it.
        parents = {name: str(parent) for name, parent in self.parents.items()}
        if not (claim.cores or claim.numa is not None):
            parents.pop("cpuset", None)  # moving a process into each group costs a millisecond
        folders = {name: f"{parent}/{key}" for name, parent in parents.items()}
        settings: list[tuple[str, str]] = []
        for limit in _LIMITS:
            name = UNIFIED if self.is_v2 else limit
            if name in parents and limit in self.limits:
                pairs = _limit(limit, parents[name], claim, max_processes, v2=self.is_v2)
                settings += ((f"{folders[name]}/{file}", value) for file, value in pairs)
        homes = {name: f"{parent}/{_HOME}" for name, parent in parents.items()}
        return GroupPlan(folders=folders, settings=settings, homes=homes)

    def remove(self) -> None:
        """Remove the node's folders if no launch is in them, and ``kohaku`` if no node is."""
        for parent in self.parents.values():
            for folder in (parent / _HOME, parent, parent.parent):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            sites.let_go(parent / _HOME)

    def is_ready(self) -> bool:
        """Say whether all of it is there: an earlier runner of the node may just have left."""
        return all(os.path.isdir(f"{folder}/{_HOME}") for folder in self.parents.values())


def find_site(root: Path, node: str, own: Path = Path("/proc/self/cgroup")) -> GroupSite | None:
    """Find out where groups can be made, and prepare it; None if nowhere.

    What runners that are no more have left there is removed, if nothing runs in it.

    Args:
        root: Where the cgroup file systems are mounted.
        node: Name of the node, the groups' common folder.
        own: The file that names the calling process's groups.
    """
    site: GroupSite | None
    try:
        if (root / "cgroup.controllers").exists():
            base = _choose_base(root, own)
            site = _persist(functools.partial(_prepare_v2, base, node))
        else:
            site = _prepare_v1(root, node)
    except OSError as error:
        _log.info("no cgroups: %s", error)
        return None
    for parent in () if site is None else site.parents.values():
        sites.remove_deserted(parent.parent, _HOME)
    return site


def _persist(prepare: Callable[[], T]) -> T:
    """Begin anew if another runner removes, as deserted, what is just being made."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(FileNotFoundError):
            return prepare()
    return prepare()


def _limit(
    name: str, parent: str, claim: Claim, max_processes: int, *, v2: bool
) -> list[tuple[str, str]]:
    """Say what to write into which files of a group below ``parent``."""
    match name:
        case "memory":
            return _limit_memory(parent, claim.memory, v2=v2)
        case "cpuset":
            cores = ",".join(map(str, claim.cores))
            nodes = "" if claim.numa is None else str(claim.numa)
            if not v2:  # both must be set before a process can join
                cores = cores or _read(Path(parent, "cpuset.cpus"))
                nodes = nodes or _read(Path(parent, "cpuset.mems"))
            pairs = (("cpuset.cpus", cores), ("cpuset.mems", nodes))
            return [(file, value) for file, value in pairs if value]
        case _:
            return [("pids.max", str(max_processes))]


def _limit_memory(parent: str, memory: int, *, v2: bool) -> list[tuple[str, str]]:
    """Limit memory, and memory with swap to the same: a task over its claim must not crawl."""
    if not memory:
        return []
    if v2:
        has_swap = os.path.exists(f"{parent}/memory.swap.max")
        swap = [("memory.swap.max", "0")] if has_swap else []
        return [("memory.max", str(memory)), *swap]
    if os.path.exists(f"{parent}/memory.memsw.limit_in_bytes"):
        swap = [("memory.memsw.limit_in_bytes", str(memory))]
    else:
        swap = [("memory.swappiness", "0")]
    return [("memory.limit_in_bytes", str(memory)), *swap]


def _choose_base(root: Path, own: Path) -> Path:
    """Choose the v2 group to work below: our own if it was given to us, else the root.

    systemd marks a delegated group by an extended attribute, and gives a user's group to the
    user. Working below any other group of systemd's would be undone by it at some moment.
    """
    path = next((line[3:] for line in _read(own).splitlines() if line.startswith("0::")), "/")
    mine = root / path.lstrip("/")
    if mine.name == _LEAF:  # moved there by an earlier run, or by DelegateSubgroup=
        mine = mine.parent
    if mine == root or not mine.is_dir():
        return root
    if os.geteuid() != 0:
        return mine if mine.stat().st_uid == os.geteuid() else root
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(mine, name) == b"1":
                return mine
    return root


def _prepare_v2(base: Path, node: str) -> GroupSite:
    offered = set(_read(base / "cgroup.controllers").split()) & set(_LIMITS)
    parent = base / "kohaku" / node
    parent.mkdir(parents=True, exist_ok=True)
    for folder in (base, base / "kohaku", parent):
        offered = {name for name in offered if _enable(folder, name, base)}
    (parent / _HOME).mkdir(exist_ok=True)
    sites.hold(parent / _HOME)
    return GroupSite({UNIFIED: parent}, frozenset(offered))


def _enable(folder: Path, controller: str, base: Path) -> bool:
    if controller in _read(folder / "cgroup.subtree_control").split():
        return True
    try:
        (folder / "cgroup.subtree_control").write_text(f"+{controller}")
    except OSError:
        if folder != base or not _vacate(base):
            return False
        with contextlib.suppress(OSError):
            (folder / "cgroup.subtree_control").write_text(f"+{controller}")
            return True
        return False
    return True


def _vacate(base: Path) -> bool:
    """Move the processes of our own group into a leaf of it; say whether there were any."""
    pids = _read(base / "cgroup.procs").split()
    with contextlib.suppress(OSError):
        (base / _LEAF).mkdir(exist_ok=True)
        for pid in pids:
            (base / _LEAF / "cgroup.procs").write_text(pid)
        return bool(pids)
    return False


def _prepare_v1(root: Path, node: str) -> GroupSite | None:
    wanted = [*_LIMITS]
    # On a hybrid machine the v2 tree holds still, kills and counts CPU: one group for three.
    has_v2 = (root / UNIFIED / "cgroup.controllers").exists()
    wanted += [UNIFIED] if has_v2 else ["freezer", "cpuacct"]
    parents = {}
    for name in wanted:
        with contextlib.suppress(OSError):
            if (root / name / "cgroup.procs").exists():
                parents[name] = _persist(functools.partial(_prepare_v1_parent, root / name, node))
    if not parents:
        return None
    return GroupSite(parents, frozenset(parents) & frozenset(_LIMITS))


def _prepare_v1_parent(hierarchy: Path, node: str) -> Path:
    folder = hierarchy
    for name in ("kohaku", node, _HOME):
        folder = folder / name
        folder.mkdir(exist_ok=True)
        if hierarchy.name == "cpuset":  # a v1 cpuset is born empty and useless
            for file in ("cpuset.cpus", "cpuset.mems"):
                if not _read(folder / file):
                    (folder / file).write_text(_read(folder.parent / file))
    sites.hold(folder)
    return folder.parent


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
