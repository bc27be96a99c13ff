"""From a launch and what this machine allows to a plan for a keeper, and to words.

Knows: which walls and limits a launch gets, and how to say so truly.
Does not know: how they are put up (``sandbox``, ``group``), or whether they hold (``backend``
tries them).
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import TaskFolders
from kohaku_daemon.backends.process.cgroups import GroupSite
from kohaku_daemon.backends.process.environment import build_environment
from kohaku_daemon.backends.process.files import read_text
from kohaku_daemon.backends.process.record import LaunchPlan, SandboxPlan
from kohaku_daemon.backends.process.settings import ProcessSettings
from kohaku_daemon.core.workload import Launch

#: Belongs to nobody by convention; what tasks run as where our own range is not mapped.
_NOBODY: Final = range(65534, 65535)
_NO_USERS: Final = range(0)
#: Daemons' folders stay where they are as long as those run, and to resolve a path costs a look
#: at each folder above it.
_resolve: Final = functools.lru_cache(64)(os.path.realpath)


@dataclass(frozen=True)  # without slots: it keeps what it says of every launch
class Means:
    """What this machine allows, or a guess at it that is to be tried."""

    namespaces: bool
    #: None if there are no cgroups to be had.
    site: GroupSite | None
    #: Users that launches run as; empty if the runner is not root, and they run as itself.
    users: range

    @property
    def limits(self) -> frozenset[str]:
        """What cgroups limit, out of memory, cpuset, pids."""
        return frozenset() if self.site is None else self.site.limits

    def describe(self) -> str:
        """Say what keeps tasks from the machine and from each other."""
        users = f"one of {len(self.users)} users per task" if len(self.users) > 1 else ""
        if len(self.users) == 1:
            users = f"uid {self.users[0]}, shared by all tasks"
        if not self.users:
            users = "the runner's own user"
        return ", ".join((self._describe_walls(), users, self._describe_groups()))

    def describe_launch(self, uid: int) -> str:
        """Say what one launch is given."""
        user = f"uid {uid}" if uid >= 0 else f"the runner's own user (uid {os.geteuid()})"
        walls, groups = self._around
        return f"{walls}, {user}, {groups}"

    def list_enforced(self) -> tuple[str, ...]:
        """List what ``BackendInfo.enforces`` may claim.

        GPUs are not among it: a program is told which it may use, and is not kept from the
        others.
        """
        names = ["pause", "adopt"]
        if "memory" in self.limits:
            names.append("memory")
        if "cpuset" in self.limits:
            names += ["cores", "numa"]
        return tuple(sorted(names))

    @functools.cached_property
    def _around(self) -> tuple[str, str]:
        return self._describe_walls(), self._describe_groups()

    def _describe_walls(self) -> str:
        if not self.namespaces:
            return "plain process"
        names = ("user, " if self._needs_user_namespace() else "") + "pid, mount, ipc, uts"
        return f"namespaces ({names})"

    def _describe_groups(self) -> str:
        if self.site is not None and "memory" in self.limits:
            return self.site.describe()
        start = f"{self.site.describe()}; " if self.site is not None else ""
        return f"{start}rlimits only: memory is per process"

    def _needs_user_namespace(self) -> bool:
        return os.geteuid() != 0


def find_users(settings: ProcessSettings) -> range:
    """Find the users that launches can run as: none unless the runner is root.

    Inside a container with a user namespace of its own only some numbers exist.
    """
    if os.geteuid() != 0:
        return _NO_USERS
    wanted = range(settings.uid_base, settings.uid_base + settings.uid_span)
    lines = read_text("/proc/self/uid_map").splitlines()
    spans = [tuple(map(int, line.split())) for line in lines]
    mapped = [range(inside, inside + count) for inside, _, count in spans]
    for users in (wanted, _NOBODY):
        if users and any(users[0] in span and users[-1] in span for span in mapped):
            return users
    return _NO_USERS


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes plans of launches for one node."""

    node: str
    #: Folders that no task may see.
    hidden: tuple[Path, ...]
    settings: ProcessSettings
    means: Means
    #: Of this boot of the machine.
    boot: str
    #: The folder that all nodes share; empty if there is none.
    shared_dir: str = ""

    def plan(self, launch: Launch, path: str, folders: TaskFolders) -> LaunchPlan:
        """Plan one launch.

        Args:
            launch: What to run.
            path: Its record.
            folders: Its scratch folder and output files.
        """
        claim, means = launch.claim, self.means
        # It is a folder of ours; what is above it may be reached by links.
        above, name = os.path.split(str(folders.scratch))
        scratch = f"{_resolve(above)}/{name}"
        uid = self._choose_user(launch.key)
        site, most = means.site, self.settings.max_processes
        return LaunchPlan(
            record=path,
            argv=list(launch.spec.command),
            env=build_environment(
                launch,
                node=self.node,
                home=scratch,
                temporary="/tmp" if means.namespaces else scratch,
                shared_dir=self.shared_dir,
            ),
            workdir=launch.spec.workdir or scratch,
            scratch=scratch,
            stdout=str(folders.stdout),
            stderr=str(folders.stderr),
            uid=uid,
            cores=[] if "cpuset" in means.limits else list(claim.cores),
            address_space=0 if "memory" in means.limits else claim.memory,
            memory=claim.memory,
            group=None if site is None else site.plan(launch.key, claim, most),
            sandbox=self._plan_sandbox(launch) if means.namespaces else None,
            note=means.describe_launch(uid),
            boot=self.boot,
        )

    def _plan_sandbox(self, launch: Launch) -> SandboxPlan:
        return SandboxPlan(
            user=os.geteuid() != 0,
            hostname=f"task-{launch.task}",
            hidden=[_resolve(str(path)) for path in self.hidden],
            writable=[str(path) for path in self._list_writable() if path.is_dir()],
            tmp_size=launch.claim.memory,
        )

    def _list_writable(self) -> list[Path]:
        shared = [Path(self.shared_dir)] if self.shared_dir else []
        return [*self.settings.writable, *shared]

    def _choose_user(self, key: str) -> int:
        """Choose the user of a launch; -1 for the runner's own.

        Drawn by a hash, so that nothing must be kept, across several runners on a machine
        too. With 2**27 users, 1000 launches at once share one by a chance of 0.4 %.
        """
        users = self.means.users
        if not users:
            return -1
        digest = hashlib.blake2b(f"{self.node}/{key}".encode(), digest_size=8).digest()
        return users[int.from_bytes(digest, "big") % len(users)]
