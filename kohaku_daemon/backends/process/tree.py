"""Processes: telling one from a later owner of its pid, finding a launch's, signalling them.

Knows: /proc and pidfds. Does not know: what a launch is for. Standard library only:
guards and keepers run it without site-packages.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from kohaku_daemon.backends.process.files import read_text

_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
#: A process that is over but not yet waited for (``man 5 proc``).
_OVER: Final = frozenset("ZXx")
_STOPPED: Final = frozenset("Tt")


class Process(NamedTuple):
    """One line of /proc/PID/stat, as far as we need it."""

    pid: int
    parent: int
    state: str
    #: Clock ticks after boot.
    start: int
    #: Seconds.
    cpu_s: float
    #: Bytes.
    resident: int
    #: Pid of the process that began its session.
    session: int = 0

    @property
    def start_s(self) -> float:
        """Say when it started, in seconds after boot."""
        return self.start / _CLOCK_TICKS

    @property
    def is_stopped(self) -> bool:
        """Say whether a signal or a tracer holds it."""
        return self.state in _STOPPED

    @property
    def is_over(self) -> bool:
        """Say whether it has ended, whoever has yet to wait for it."""
        return self.state in _OVER


def read_boot_id() -> str:
    """Read the number the kernel drew at this boot."""
    return read_text("/proc/sys/kernel/random/boot_id").strip()


def age_s(start: int) -> float:
    """Say how many seconds ago a process began that has this start.

    By the clock that began at boot, which nobody sets; /proc counts by it (man 5 proc).
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start / _CLOCK_TICKS


def read_boot_time() -> float:
    """Read when the machine was booted, in UTC seconds, whole ones."""
    lines = read_text("/proc/stat").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("btime "))


def read_process(pid: int) -> Process | None:
    """Read one process; None if there is none or it is over."""
    process = read_remains(pid)
    return None if process is None or process.is_over else process


def read_remains(pid: int) -> Process | None:
    """Read one process, even if it is over but not yet waited for; None if there is none."""
    try:
        line = read_text(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may itself hold some.
    fields = line[line.rindex(")") + 2 :].split()
    return Process(
        pid=pid,
        parent=int(fields[1]),
        state=fields[0],
        start=int(fields[19]),
        cpu_s=(int(fields[11]) + int(fields[12])) / _CLOCK_TICKS,
        resident=int(fields[21]) * _PAGE,
        session=int(fields[3]),
    )


def read_all() -> dict[int, Process]:
    """Read every process there is. Takes some 30 µs each: not for the event loop."""
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None}


def is_same(pid: int, start: int) -> bool:
    """Say whether the process that had this pid and start still runs."""
    process = read_process(pid)
    return process is not None and process.start == start


def open_process(pid: int, start: int) -> int | None:
    """Open a pidfd of exactly that process; None if it is over."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if is_same(pid, start):
        return descriptor
    os.close(descriptor)
    return None


def select_below(processes: Mapping[int, Process], root: int) -> set[int]:
    """Choose the descendants of ``root``, without it."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    unseen = list(children.get(root, ()))
    while unseen:
        pid = unseen.pop()
        if pid not in found:
            found.add(pid)
            unseen += children.get(pid, ())
    return found


def list_children() -> set[int]:
    """List the children of the calling process, also those that are over."""
    try:
        return {int(pid) for pid in read_text(f"/proc/self/task/{os.getpid()}/children").split()}
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        found = (read_remains(int(name)) for name in os.listdir("/proc") if name.isdigit())
        return {process.pid for process in found if process and process.parent == os.getpid()}


def select_launch(
    every: Mapping[int, Process], program: int, init: int, uid: int, marks: Mapping[str, str]
) -> set[int]:
    """Choose the processes of one launch that no cgroup holds together.

    In namespaces they are all below ``init`` or ``program``. Elsewhere what lost its parents
    has become a child of some process of ours: then it is what is below the program, in its
    session, started with its marks, or of its user, if that was not started with other marks.

    Args:
        every: All processes there are.
        program: Pid of its program; 0 if it is not known.
        init: Pid of its namespace's first process, which is not chosen; 0 without namespaces.
        uid: The user it has for itself; -1 if it shares one.
        marks: Variables that its program was started with.
    """
    found = select_below(every, program) | ({program} & every.keys()) if program else set()
    if init:
        return found | select_below(every, init) - {init}
    own = frozenset(f"{name}={value}" for name, value in marks.items())
    if program:
        found |= {process.pid for process in every.values() if process.session == program}
    found |= select_marked(every, own)
    if uid >= 0:
        found |= {pid for pid in select_user(every, uid) if not _is_marked_for_another(pid, marks)}
    return found


def _is_marked_for_another(pid: int, marks: Mapping[str, str]) -> bool:
    own = {f"{name}={value}" for name, value in marks.items()}
    others = (line for line in _read_environment(pid) if line.partition("=")[0] in marks)
    return any(line not in own for line in others)


def select_user(processes: Iterable[int], uid: int) -> set[int]:
    """Choose the processes of a user."""
    return {pid for pid in processes if read_owner(pid) == uid}


def select_marked(processes: Iterable[int], marks: frozenset[str]) -> set[int]:
    """Choose the processes that were started with all of these ``NAME=VALUE`` variables."""
    return {pid for pid in processes if marks <= _read_environment(pid)}


def read_owner(pid: int) -> int:
    """Read the user of a process; -1 if it is over."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def _read_environment(pid: int) -> set[str]:
    try:
        return set(read_text(f"/proc/{pid}/environ").split("\0"))
    except OSError:  # it is over, or belongs to somebody else
        return set()


def signal_each(members: Callable[[], Iterable[int]], number: signal.Signals) -> int:
    """Signal every process that ``members`` names, and say how many there were.

    A pid may pass to a stranger between its listing and the signal. So each is opened first
    and signalled through its descriptor only if a second listing still names it.
    """
    opened: dict[int, int] = {}
    try:
        for pid in members():
            try:
                opened[pid] = os.pidfd_open(pid)
            except OSError:  # it is over
                continue
        if not opened:
            return 0
        still = opened.keys() & set(members())
        for pid in still:
            _send(opened[pid], number)
        return len(still)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _send(descriptor: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except (ProcessLookupError, PermissionError):
        # PermissionError: it runs a set-uid program that no_new_privs should have
        # prevented. It is no longer ours to signal.
        return
