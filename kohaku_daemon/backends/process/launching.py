"""One launch in its keeper: taken, started, ended, recorded.

Knows: the order of these steps, which is what lets each of them be interrupted.
Does not know: when its turn comes, who is told (``keeper``), what others leave (``leftovers``).

A program that has ended is waited for last of all: first what it left behind is killed, its
output passed on, its end recorded. Until then the kernel keeps its status, and hands it to the
guard if the keeper is killed, which then does the same again. A program in namespaces has to be
waited for before those can end: so how it ended is recorded first. Standard library only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Iterable
from typing import Final

from kohaku_daemon.backends.process import record
from kohaku_daemon.backends.process.group import Group
from kohaku_daemon.backends.process.output import Output, open_pipe
from kohaku_daemon.backends.process.record import Ending, Keeper, LaunchPlan, Program
from kohaku_daemon.backends.process.sandbox import StepFailed
from kohaku_daemon.backends.process.starting import Starter

#: Answers to the runner: the program runs; another keeper has the launch; a reason.
STARTED: Final = "started"
TAKEN: Final = "taken"
FAILED: Final = "failed"

#: How long to go on killing what a launch left behind. What is stuck in the kernel longer
#: (a dead NFS server) would otherwise hold the end back for ever.
SWEEP_S: Final = 10.0
#: Characters of a reason. A record has to fit a block.
_LONGEST: Final = 600
#: ``si_code`` of a program that exited (``man 2 waitid``); others were ended by a signal.
_EXITED: Final = 1
_DUMPED: Final = 3


class NotLaunchedError(Exception):
    """It was not launched: ``kind`` is TAKEN or FAILED, ``text`` for the task's owner."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text[:_LONGEST]


class Launched:
    """One launch whose program runs, or has ended and is not yet recorded."""

    def __init__(
        self, path: str, keeper: Keeper, program: Program, status: Ending | None = None
    ) -> None:
        """Keep a launch.

        Args:
            path: Its record.
            keeper: As recorded; the pipes it names are open here.
            program: A child of the calling process, but for
            status: how it ended, if it has been waited for.
        """
        self.path = path
        self.uid = keeper.uid
        self.started_at = keeper.started_at
        self.program = program
        self.outputs = [Output(file, source) for file, source in keeper.outputs]
        self.is_bare = not keeper.group and not program.init
        #: Whether its namespace has a first process, which has not been waited for.
        self.has_init = program.init > 0
        self._group = Group(keeper.group)
        self._ending = status
        self._deadline = time.monotonic() + SWEEP_S

    def __repr__(self) -> str:
        return f"Launched({self.name}, {self.program})"

    @functools.cached_property
    def marks(self) -> dict[str, str]:
        """Variables that its program was started with."""
        return record.find_marks(self.path)

    @property
    def name(self) -> str:
        """Name of its record."""
        return os.path.basename(self.path)

    @property
    def has_program(self) -> bool:
        """Say whether its program has not been waited for."""
        return self._ending is None or not self.program.init

    @property
    def is_late(self) -> bool:
        """Say whether what it left behind has had all the time it gets."""
        return time.monotonic() > self._deadline

    def note_end(self) -> None:
        """Take down how the program ended, which it has."""
        status, oom_kills = _read_status(self.program.pid), self._group.count_oom_kills()
        self._ending = Ending(status, now(), oom_kills)
        self._deadline = time.monotonic() + SWEEP_S
        if self.program.init:
            with contextlib.suppress(OSError):
                record.write_status(self.path, self._ending)
            os.waitpid(self.program.pid, 0)
            self._kill_init()

    def kill_rest(self) -> bool:
        """Kill what its cgroup or namespace still holds; say whether nothing is left there."""
        if self.has_init:
            self._kill_init()
        if self.has_init:
            return False
        if self._group.has_emptied():
            return True
        self._group.kill()
        return False

    def _kill_init(self) -> None:
        """Kill its namespace's first process, and so all in it, or wait for it if it is over."""
        try:
            # Before anything else: of a child of ours alone it is certain whose pid it is.
            if os.waitpid(self.program.init, os.WNOHANG)[0]:
                self.has_init = False
            else:
                os.kill(self.program.init, signal.SIGKILL)
        except ChildProcessError:
            self.has_init = False

    def close(self) -> str:
        """Pass on the rest of its output, record its end, let go of it; give its end as JSON."""
        assert self._ending is not None, "it has not ended"
        for output in self.outputs:
            output.finish()
            if output.lost:
                lost = self._ending.lost + output.lost
                why = self._ending.why_lost or output.why_lost
                self._ending = self._ending._replace(lost=lost, why_lost=why)
        ending = record.encode_ending(self._ending)
        # OSError: somebody removed the record, or the disk is gone. The runner is still told.
        with contextlib.suppress(OSError):
            record.write_encoded_ending(self.path, ending)
        # Not before: a guard looks for the pipes of whatever has no ending.
        for output in self.outputs:
            output.close()
        if self.has_program:
            os.waitpid(self.program.pid, 0)
        self._group.remove()
        return ending


def launch(plan: LaunchPlan, me: Keeper, starter: Starter) -> Launched:
    """Take a launch and start it.

    Args:
        plan: The launch.
        me: The keeper, without what belongs to one launch.
        starter: Of this process.

    Raises:
        NotLaunchedError: It does not run, and nothing is left of it.
    """
    pipes: list[tuple[int, int]] = []
    try:
        pipes += [open_pipe(plan["uid"]) for _ in range(2)]
        keeper = _describe(plan, me, pipes)
        descriptor = record.take(plan["record"], keeper)
        if descriptor is None:
            raise NotLaunchedError(TAKEN)
        program = _run(plan, [sink for _, sink in pipes], descriptor, starter)
    except FileNotFoundError:
        # The record is gone: the launch was given up and removed before this began.
        _close_each(source for source, _ in pipes)
        raise NotLaunchedError(TAKEN) from None
    except OSError as error:
        _close_each(source for source, _ in pipes)
        text = f"cannot keep the launch: {error.strerror} ({error.filename})"
        raise NotLaunchedError(FAILED, text) from error
    except NotLaunchedError:
        _close_each(source for source, _ in pipes)
        raise
    finally:
        _close_each(sink for _, sink in pipes)
    return Launched(plan["record"], keeper, program)


def now() -> float:
    """Give the time in UTC seconds."""
    return time.time()  # noqa: TID251  runs without the daemon's packages


def _describe(plan: LaunchPlan, me: Keeper, pipes: list[tuple[int, int]]) -> Keeper:
    (out, _), (err, _) = pipes
    return Keeper(
        pid=me.pid,
        start=me.start,
        guard=me.guard,
        guard_start=me.guard_start,
        boot=plan["boot"],
        started_at=now(),
        uid=plan["uid"],
        group={} if plan["group"] is None else plan["group"]["folders"],
        note=plan["note"],
        outputs=[(plan["stdout"], out), (plan["stderr"], err)],
    )


def _run(plan: LaunchPlan, sinks: list[int], descriptor: int, starter: Starter) -> Program:
    """Start what was just taken; record that it runs, or why it does not."""
    group = Group({} if plan["group"] is None else plan["group"]["folders"])
    try:
        _prepare(plan, group)
        program = starter.start(plan, sinks)
    except StepFailed as error:
        text = str(error)[:_LONGEST]
        os.close(descriptor)
        with contextlib.suppress(OSError):
            record.write_ending(plan["record"], Ending(0, now(), error=text))
        group.remove()
        raise NotLaunchedError(FAILED, text) from error
    # OSError: a disk that failed since it took the line before. It runs all the same.
    with contextlib.suppress(OSError):
        record.write_program(descriptor, program)
    return program


def _prepare(plan: LaunchPlan, group: Group) -> None:
    try:
        if plan["group"] is not None:
            group.make(plan["group"])
        if plan["uid"] >= 0:
            os.chown(plan["scratch"], plan["uid"], plan["uid"])
            os.chmod(plan["scratch"], 0o700)
    except OSError as error:
        text = f"cannot prepare the launch: {error.strerror} ({error.filename})"
        raise StepFailed(text) from error


def _read_status(pid: int) -> int:
    """Give the wait status of a child that has ended, and leave it to be waited for."""
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if end is None:
        raise RuntimeError(f"process {pid} has not ended")
    if end.si_code == _EXITED:
        return end.si_status << 8
    return end.si_status | (0x80 if end.si_code == _DUMPED else 0)


def _close_each(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
