"""What truly happens on one machine: programs that run and end whether or not anybody looks.

Stands in for a backend and the kernel under it. It survives every crash of the runner, and
asserts what the promises say about the world itself: an attempt runs at most once, and no
core is used by two programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kohaku_daemon.core.workload import Finding, Found, Handle, Launch
from protocol.ids import NodeName, TaskId
from protocol.models.task import Cause, Exit
from tests.simulation.stage import Stage


@dataclass
class Program:
    """One launch that began."""

    launch: Launch
    started_at: float
    paused: bool = False
    #: It would have ended by itself while it was paused.
    due: bool = False
    exit: Exit | None = None
    ended_at: float = 0.0
    watcher: Callable[[Program], None] | None = None


def own_exit(task: TaskId) -> Exit | None:
    """Give what a task's program returns if it is left alone. Some fail, some never end."""
    if task % 7 == 0:
        return None
    return Exit(Cause.EXITED, code=3 if task % 3 == 0 else 0)


class Machine:
    """One node's hardware."""

    def __init__(self, stage: Stage, node: NodeName) -> None:
        self.node = node
        #: By the name in the handle.
        self.programs: dict[str, Program] = {}
        self._never: set[str] = set()
        self._stage = stage
        self._handles = 0

    def plan(self) -> Handle:
        """Make a handle that no other launch has."""
        self._handles += 1
        return Handle(backend="process", data={"name": f"{self.node}-h{self._handles}"})

    def start(self, launch: Launch, handle: Handle) -> Program | None:
        """Begin a program, unless its handle has been given up."""
        name = str(handle.data["name"])
        if name in self._never:
            return None
        for other in self.programs.values():
            assert other.launch.key != launch.key, f"{launch.key} was started twice"
            assert other.exit or not set(other.launch.claim.cores) & set(launch.claim.cores), (
                f"{launch.key} and {other.launch.key} have the same cores of {self.node}"
            )
        program = Program(launch, self._stage.now)
        self.programs[name] = program
        self._stage.tell(f"{self.node} runs {launch.key}")
        if own_exit(launch.task) is not None:
            lasts_s = self._stage.random.expovariate(1 / 8.0)
            self._stage.after(lasts_s, lambda: self._finish(program))
        return program

    def find(self, handle: Handle) -> Finding:
        """Say what became of a handle; one that never began never will."""
        name = str(handle.data["name"])
        program = self.programs.get(name)
        if program is None:
            self._never.add(name)
            return Finding(found=Found.NEVER_STARTED)
        if program.exit is None:
            state = Found.PAUSED if program.paused else Found.RUNNING
            return Finding(found=state, started_at=program.started_at)
        return Finding(
            found=Found.ENDED,
            exit=program.exit,
            started_at=program.started_at,
            ended_at=program.ended_at,
        )

    def watch(self, handle: Handle, watcher: Callable[[Program], None]) -> None:
        """Tell the end of a program, also if it has ended."""
        program = self.programs[str(handle.data["name"])]
        program.watcher = watcher
        if program.exit is not None:
            watcher(program)

    def hold(self, handle: Handle, *, paused: bool) -> None:
        """Pause or resume a program."""
        program = self.programs[str(handle.data["name"])]
        program.paused = paused
        if not paused and program.due:
            self._finish(program)

    def kill(self, handle: Handle) -> None:
        """End a program in a moment."""
        program = self.programs[str(handle.data["name"])]
        self._stage.soon(lambda: self._end(program, Exit(Cause.SIGNALLED, signal=15)))

    def _finish(self, program: Program) -> None:
        exit_ = own_exit(program.launch.task)
        if program.paused:
            program.due = True
        elif exit_ is not None:
            self._end(program, exit_)

    def _end(self, program: Program, exit_: Exit) -> None:
        if program.exit is not None:
            return
        program.exit, program.ended_at = exit_, self._stage.now
        self._stage.tell(f"{self.node} ended {program.launch.key}: {exit_.cause}")
        if program.watcher is not None:
            program.watcher(program)
