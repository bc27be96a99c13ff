"""The cgroup of one launch: making, joining, holding still, killing, reading.

Knows: the files of cgroup v1, v2 and of both at once ("hybrid": limits by v1, and a v2 tree
without controllers that still can freeze and kill).
Does not know: where on this machine such groups may be made (``cgroups``). Standard library
only: a keeper makes and removes a launch's group with it.

Files and their meaning: Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst of Linux.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Final, NamedTuple

from kohaku_daemon.backends.process.files import read_text, write_text
from kohaku_daemon.backends.process.record import GroupPlan
from kohaku_daemon.backends.process.tree import signal_each

#: The key of a cgroup v2 folder among a group's folders.
UNIFIED: Final = "unified"


class GroupUsage(NamedTuple):
    """What a group uses."""

    #: Seconds since its start.
    cpu_s: float
    #: Bytes, without file pages the kernel can drop at once.
    memory: int
    processes: int


class Group:
    """The folders of one launch, by controller. See ``GroupPlan.folders``."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders = folders
        self._is_v2_gone = False

    def __repr__(self) -> str:
        return f"Group({self._folders})"

    def make(self, plan: GroupPlan) -> None:
        """Make the folders and set the limits.

        Raises:
            OSError: The kernel refused.
        """
        for folder in self._folders.values():
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
        for path, value in plan["settings"]:
            write_text(path, value)

    def join(self) -> None:
        """Move the calling process in, which has no threads.

        Raises:
            OSError: The kernel refused.
        """
        doors = self.open_doors()
        try:
            enter(doors)
        finally:
            for door in doors:
                os.close(door)

    def open_doors(self) -> list[int]:
        """Open what ``enter`` needs, also once the folders cannot be reached any more.

        Raises:
            OSError: The kernel refused.
        """
        doors: list[int] = []
        try:
            for name, folder in self._folders.items():
                # Moving itself by ``tasks``, a thread holds up no fork on the machine; moving a
                # process by ``cgroup.procs`` may wait for an RCU grace period.
                path = f"{folder}/{'cgroup.procs' if name == UNIFIED else 'tasks'}"
                doors.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            for door in doors:
                os.close(door)
            raise
        return doors

    def remove(self) -> None:
        """Remove the folders as far as they are empty of processes."""
        for name, folder in self._folders.items():
            if name != UNIFIED or not self._is_v2_gone:
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    def has_emptied(self) -> bool:
        """Say whether nothing runs in it any more, to whoever will ``remove`` it then.

        Beside v1, the v2 folder counts nothing and holds the same processes as the others. The
        kernel removes it only if there are none: one call, where a list takes four.
        """
        if UNIFIED in self._folders and len(self._folders) > 1:
            with contextlib.suppress(OSError):
                os.rmdir(self._folders[UNIFIED])
                self._is_v2_gone = True
                return True
        return not self.list_processes()

    def list_processes(self) -> list[int]:
        """List the pids of its processes; empty if it is gone."""
        text = _read(self._any_folder() + "/cgroup.procs")
        return [int(line) for line in text.split()]

    def signal(self, number: signal.Signals) -> int:
        """Signal every process in it, and say how many there were."""
        return signal_each(self.list_processes, number)

    def kill(self) -> bool:
        """Send SIGKILL to all of it, frozen or not; say whether there was anything."""
        if not self.list_processes():
            return False
        killer = f"{self._folders.get(UNIFIED, '')}/cgroup.kill"
        if UNIFIED in self._folders and os.path.exists(killer):  # Linux 5.14
            with contextlib.suppress(OSError):
                write_text(killer, "1")
            return True
        # Frozen, a group cannot fork faster than it is listed.
        self.freeze()
        self.signal(signal.SIGKILL)
        self.thaw()  # v1 delivers the signal only now
        return True

    @property
    def can_freeze(self) -> bool:
        """Say whether it can be held still."""
        return UNIFIED in self._folders or "freezer" in self._folders

    def freeze(self) -> None:
        """Begin to hold it still; ``is_frozen`` says when that is done."""
        self._freeze("1", "FROZEN")

    def thaw(self) -> None:
        """Let it go on."""
        self._freeze("0", "THAWED")

    def is_frozen(self) -> bool:
        """Say whether all of it is held still."""
        if UNIFIED in self._folders:
            events = _read_fields(f"{self._folders[UNIFIED]}/cgroup.events")
            return events.get("frozen") == 1
        return _read(f"{self._folders.get('freezer', '')}/freezer.state").strip() == "FROZEN"

    def count_oom_kills(self) -> int:
        """Count the processes the kernel killed in it for memory."""
        if "memory" in self._folders:
            path = f"{self._folders['memory']}/memory.oom_control"
        else:
            path = f"{self._folders.get(UNIFIED, '')}/memory.events"
        _, found, count = _read(path).partition("\noom_kill ")
        return int(count.partition("\n")[0]) if found else 0

    def read_usage(self) -> GroupUsage:
        """Read what it uses now. What no controller counts is 0."""
        return GroupUsage(self._read_cpu_s(), self._read_memory(), len(self.list_processes()))

    def _any_folder(self) -> str:
        return self._folders.get(UNIFIED) or next(iter(self._folders.values()), "")

    def _freeze(self, v2: str, v1: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # it has ended and is removed
            if UNIFIED in self._folders:
                write_text(f"{self._folders[UNIFIED]}/cgroup.freeze", v2)
            elif "freezer" in self._folders:
                write_text(f"{self._folders['freezer']}/freezer.state", v1)

    def _read_cpu_s(self) -> float:
        if UNIFIED in self._folders:
            usage_us = _read_fields(f"{self._folders[UNIFIED]}/cpu.stat").get("usage_usec", 0)
            return usage_us / 1e6
        usage_ns = _read(f"{self._folders.get('cpuacct', '')}/cpuacct.usage").strip()
        return int(usage_ns or 0) / 1e9

    def _read_memory(self) -> int:
        if "memory" in self._folders:
            folder, total, idle = self._folders["memory"], "usage_in_bytes", "total_inactive_file"
        else:
            folder, total, idle = self._folders.get(UNIFIED, ""), "current", "inactive_file"
        used = int(_read(f"{folder}/memory.{total}").strip() or 0)
        return max(0, used - _read_fields(f"{folder}/memory.stat").get(idle, 0))


def enter(doors: Sequence[int]) -> None:
    """Move the calling process, which has no threads, into a group by ``Group.open_doors``.

    Raises:
        OSError: The kernel refused.
    """
    for door in doors:
        os.write(door, b"0")


def _read(path: str) -> str:
    try:
        return read_text(path)
    except OSError:  # the group is gone, or the controller is not there
        return ""


def _read_fields(path: str) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
