"""Processes that lost their parents and became children of a keeper: whose they are.

Knows: every child of the calling process, how to tell which launch left it, when it must go.
Does not know: cgroups and namespaces, which hold all of a launch by themselves.

A process without cgroup or namespace leaves its launch by nothing it can do at once: it would
have to lose its parent, begin a session, and change its user or its variables. What cannot be
told whose it is ends when every launch that might have left it has ended. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable

from kohaku_daemon.backends.process import tree
from kohaku_daemon.backends.process.launching import Launched


class Leftovers:
    """The children of a keeper that are nobody's program."""

    def __init__(self) -> None:
        #: By pid of the program.
        self._launches: dict[int, Launched] = {}
        self._inits: set[int] = set()
        #: Children that nobody owns to the launches that may have left them.
        self._strays: dict[int, set[Launched]] = {}

    def add(self, launched: Launched) -> None:
        """Know a launch."""
        if launched.has_program:
            self._launches[launched.program.pid] = launched
        if launched.program.init:
            self._inits.add(launched.program.init)

    def forget_program(self, launched: Launched) -> None:
        """Forget the program of a launch: it has been waited for, its pid may be another's."""
        self._launches.pop(launched.program.pid, None)

    def discard(self, launched: Launched) -> None:
        """Forget a launch of which nothing is left."""
        if self._launches.get(launched.program.pid) is launched:
            del self._launches[launched.program.pid]
        if launched.program.init:
            self._inits.discard(launched.program.init)

    def reap(self) -> None:
        """Wait for what has ended, up to a program: that is waited for in its own time."""
        with contextlib.suppress(ChildProcessError):
            while end := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if end.si_pid in self._launches or end.si_pid in self._inits:
                    break
                os.waitpid(end.si_pid, 0)

    def kill_left_by(self, launched: Launched) -> bool:
        """Kill what a launch that is ending has left; say whether there was nothing."""
        doomed: set[int] = set()
        unknown = tree.list_children() - self._launches.keys() - self._inits
        for pid in unknown:
            process = tree.read_remains(pid)
            if process is None or process.is_over:
                _wait_for(pid)
            elif (owner := self._find_owner(process)) is launched:
                doomed.add(pid)
            elif owner is None:
                self._strays.setdefault(pid, set(self._launches.values()))
        doomed |= self._give_up_strays(launched, unknown)
        if doomed:
            tree.signal_each(lambda: _list_with_all_below(doomed), signal.SIGKILL)
        return not doomed

    def _find_owner(self, process: tree.Process) -> Launched | None:
        by_session = self._launches.get(process.session)
        if by_session is not None:
            return by_session
        owners = [one for one in self._launches.values() if one.uid >= 0]
        if owners:
            uid = tree.read_owner(process.pid)
            owners = [one for one in owners if one.uid == uid]
            if len(owners) == 1:
                return owners[0]
        for one in self._launches.values():
            marks = frozenset(f"{name}={value}" for name, value in one.marks.items())
            if tree.select_marked([process.pid], marks):
                return one
        return None

    def _give_up_strays(self, launched: Launched, there: Iterable[int]) -> set[int]:
        """Take a launch from those that may have left a stray; give those nobody has left."""
        self._strays = {pid: may for pid, may in self._strays.items() if pid in there}
        for may in self._strays.values():
            may.discard(launched)
        return {pid for pid, may in self._strays.items() if not may}


def _list_with_all_below(roots: set[int]) -> set[int]:
    every = tree.read_all()
    found = roots & every.keys()
    for root in roots:
        found |= tree.select_below(every, root)
    return found


def _wait_for(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
