"""The processes of one launch, through its keeper: finding, signalling, holding, reading.

Knows: that a cgroup holds a launch completely, and how to walk /proc where there is none.
Does not know: asyncio. Without a cgroup each call reads all of /proc, milliseconds on a busy
machine: call it from a thread then (``is_quick``).
"""

from __future__ import annotations

import signal
import time
from typing import Final

from kohaku_daemon.backends.process import tree
from kohaku_daemon.backends.process.group import Group, GroupUsage
from kohaku_daemon.backends.process.record import Keeper

#: Passes over a tree that forks while it is being stopped. Each stops all it finds, so what
#: is left shrinks fast; a program that outruns this many is not paused, and that is said.
_PASSES: Final = 50


class KeptLaunch:
    """One launch as its keeper describes it."""

    def __init__(self, keeper: Keeper, marks: dict[str, str]) -> None:
        """Look at a launch.

        Args:
            keeper: Its keeper, of this boot of the machine.
            marks: Variables that all its processes were started with.
        """
        self._keeper = keeper
        self._group = Group(keeper.group) if keeper.group else None
        self._marks = frozenset(f"{name}={value}" for name, value in marks.items())

    def __repr__(self) -> str:
        return f"KeptLaunch(shim={self._keeper.pid}, group={self._group})"

    @property
    def is_quick(self) -> bool:
        """Say whether the calls below take microseconds rather than milliseconds."""
        return self._group is not None

    def is_kept(self) -> bool:
        """Say whether its shim runs: as long as it does, the launch has not ended."""
        return tree.is_same(self._keeper.pid, self._keeper.start)

    def open(self) -> int | None:
        """Open a pidfd of the shim; None if it is over."""
        return tree.open_process(self._keeper.pid, self._keeper.start)

    def terminate(self) -> int:
        """Send SIGTERM to all its programs, held or not; say to how many."""
        if self._group is not None:
            count = self._group.signal(signal.SIGTERM)
            self._group.thaw()
            return count
        count = tree.signal_each(self._walk, signal.SIGTERM)
        tree.signal_each(self._walk, signal.SIGCONT)
        return count

    def kill(self) -> bool:
        """Send SIGKILL to all its programs, held or not; say whether there were any.

        What forks meanwhile may escape once: call again until there are none.
        """
        if self._group is not None:
            return self._group.kill()
        return tree.signal_each(self._walk, signal.SIGKILL) > 0

    def hold(self) -> bool:
        """Hold all its programs still; say whether they are. Call again if they are not yet."""
        if self._group is not None and self._group.can_freeze:
            self._group.freeze()
            return self._group.is_frozen()
        for _ in range(_PASSES):
            tree.signal_each(self._walk, signal.SIGSTOP)
            if self._are_stopped():
                return True
            time.sleep(0.002)
        return False

    def release(self) -> None:
        """Let all its programs go on."""
        if self._group is not None and self._group.can_freeze:
            self._group.thaw()
        else:
            tree.signal_each(self._walk, signal.SIGCONT)

    def is_held(self) -> bool:
        """Say whether all its programs are held still."""
        if self._group is not None and self._group.can_freeze:
            return self._group.is_frozen()
        return self._are_stopped()

    def read_usage(self) -> GroupUsage:
        """Read what its programs use now; without a cgroup, those that still run."""
        if self._group is not None:
            return self._group.read_usage()
        every = tree.read_all()
        own = [every[pid] for pid in self._select(every)]
        return GroupUsage(
            sum(process.cpu_s for process in own),
            sum(process.resident for process in own),
            len(own),
        )

    def remove_group(self) -> None:
        """Remove its cgroup if that is still there."""
        if self._group is not None:
            self._group.remove()

    def _walk(self) -> set[int]:
        if self._group is not None:
            return set(self._group.list_processes())
        return self._select(tree.read_all())

    def _select(self, every: dict[int, tree.Process]) -> set[int]:
        """Choose its programs among all processes.

        What a program leaves behind becomes the shim's child, so that descent from the shim
        covers all of it. Once the shim is gone, descent tells nothing: then it is all that
        belongs to the launch's own user, and all that still carries its variables.
        """
        keeper = self._keeper
        shim = every.get(keeper.pid)
        if shim is not None and shim.start == keeper.start:
            return tree.select_below(every, keeper.pid) - {keeper.init}
        found = tree.select_marked(every, self._marks)
        if keeper.uid >= 0:
            found |= tree.select_user(every, keeper.uid)
        return found - {keeper.init}

    def _are_stopped(self) -> bool:
        processes = [tree.read_process(pid) for pid in self._walk()]
        running = [process for process in processes if process is not None]
        return bool(running) and all(process.is_stopped for process in running)
