"""Processes: telling one from a later owner of its pid, finding a launch's, signalling them.

Knows: /proc and pidfds. Does not know: what a launch is for. Standard library only: the
launcher runs it without site-packages.
"""

from __future__ import annotations

import os
import signal
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

    @property
    def is_stopped(self) -> bool:
        """Say whether a signal or a tracer holds it."""
        return self.state in _STOPPED


def read_boot_id() -> str:
    """Read the number the kernel drew at this boot."""
    return read_text("/proc/sys/kernel/random/boot_id").strip()


def read_process(pid: int) -> Process | None:
    """Read one process; None if there is none or it is over."""
    try:
        line = read_text(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may itself hold some.
    fields = line[line.rindex(")") + 2 :].split()
    if fields[0] in _OVER:
        return None
    return Process(
        pid=pid,
        parent=int(fields[1]),
        state=fields[0],
        start=int(fields[19]),
        cpu_s=(int(fields[11]) + int(fields[12])) / _CLOCK_TICKS,
        resident=int(fields[21]) * _PAGE,
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


def select_user(processes: Iterable[int], uid: int) -> set[int]:
    """Choose the processes of a user."""
    return {pid for pid in processes if _read_owner(pid) == uid}


def select_marked(processes: Iterable[int], marks: frozenset[str]) -> set[int]:
    """Choose the processes that were started with all of these ``NAME=VALUE`` variables."""
    return {pid for pid in processes if marks <= _read_environment(pid)}


def _read_owner(pid: int) -> int:
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
