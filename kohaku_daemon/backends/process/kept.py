"""The processes of one launch, through its record: finding, signalling, holding, reading.

Knows: that a cgroup holds a launch completely, and how to walk /proc where there is none.
Does not know: asyncio. Without a cgroup each call reads all of /proc, milliseconds on a busy
machine: call it from a thread then (``is_quick``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Final

from kohaku_daemon.backends.process import tree
from kohaku_daemon.backends.process.files import read_text
from kohaku_daemon.backends.process.group import Group, GroupUsage
from kohaku_daemon.backends.process.record import Keeper, Program, find_marks, read_record

#: Passes over a tree that forks while it is being stopped. Each stops all it finds, so what
#: is left shrinks fast; a program that outruns this many is not paused, and that is said.
_PASSES: Final = 50
_NO_PROGRAM: Final = Program(0, 0)


class KeptLaunch:
    """One launch as its record describes it.

    A program that is not recorded yet is left alone: the keeper may be in its cgroup.
    """

    def __init__(self, path: str, keeper: Keeper) -> None:
        """Look at a launch.

        Args:
            path: Its record.
            keeper: Its keeper, of this boot of the machine.
        """
        self._path = path
        self._keeper = keeper
        self._group = Group(keeper.group) if keeper.group else None
        self._marks = find_marks(path)
        self._program = _NO_PROGRAM

    def __repr__(self) -> str:
        return f"KeptLaunch({os.path.basename(self._path)}, group={self._group})"

    @property
    def is_quick(self) -> bool:
        """Say whether the calls below take microseconds rather than milliseconds."""
        return self._group is not None

    def is_kept(self) -> bool:
        """Say whether it has not ended, and somebody is there who will say how it does."""
        found = read_record(self._path)
        if found.program is not None:
            self._program = found.program
        # Of another keeper, or of none: a guard has freed it.
        is_ours = found.keeper is not None and found.keeper.started_at == self._keeper.started_at
        return is_ours and found.ending is None and self.has_keeper()

    def has_keeper(self) -> bool:
        """Say whether its keeper or the guard of that runs."""
        keeper = self._keeper
        return tree.is_same(keeper.pid, keeper.start) or (
            tree.is_same(keeper.guard, keeper.guard_start)
        )

    def read_age_s(self) -> float | None:
        """Say how many seconds ago its program began; None if that is not known to run."""
        process = tree.read_process(self._program.pid) if self._program.pid else None
        return None if process is None else tree.age_s(process.start)

    def open_program(self) -> int | None:
        """Open a pidfd of its program; None if that is not known to run."""
        if not self.is_kept() or not self._program.pid:
            return None
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self._program.pid)
            if self.is_kept():  # else the pid may have passed to a stranger meanwhile
                return descriptor
            os.close(descriptor)
        return None

    def terminate(self) -> int:
        """Send SIGTERM to all its programs, held or not; say to how many."""
        if self._is_unborn():
            return 0
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
        if self._is_unborn():
            return False
        if self._group is not None:
            return self._group.kill() | self._end_init()
        return (tree.signal_each(self._walk, signal.SIGKILL) > 0) | self._end_init()

    def hold(self) -> bool:
        """Hold all its programs still; say whether they are. Call again if they are not yet."""
        if self._is_unborn():
            return False
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

    def _is_unborn(self) -> bool:
        """Say whether it is just being started."""
        return not self._program.pid and self.is_kept() and not self._program.pid

    def _end_init(self) -> bool:
        """End the namespace of a launch that nobody keeps any more; say whether it was there."""
        init = self._program.init
        if not init or self.has_keeper() or not _is_our_init(init):
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)
        return True

    def _select(self, every: dict[int, tree.Process]) -> set[int]:
        """Choose its programs among all processes.

        When keeper and guard are gone, the pids of the record may have passed to strangers.
        """
        pid, init = self._program if self.has_keeper() else _NO_PROGRAM
        return tree.select_launch(every, pid, init, self._keeper.uid, self._marks)

    def _are_stopped(self) -> bool:
        processes = [tree.read_process(pid) for pid in self._walk()]
        running = [process for process in processes if process is not None]
        return bool(running) and all(process.is_stopped for process in running)


def _is_our_init(pid: int) -> bool:
    try:
        name = read_text(f"/proc/{pid}/comm").strip()
    except OSError:
        return False
    return name == "kohaku-init" and tree.read_owner(pid) == os.geteuid()
