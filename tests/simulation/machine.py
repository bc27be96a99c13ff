"""What truly happens on one machine: programs that run and end whether or not anybody looks.

Stands in for a backend and the kernel under it. It survives every crash of the runner.

Knows: handles, what a command does, what hardware there is at present.
Does not know: runners, hosts, what anybody believes. ``truth`` is told of each beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from kohaku_daemon.backends.base import BackendAway
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch
from protocol.ids import NodeName
from protocol.models.node import BackendInfo, Gpu, GpuReading, Inventory, Readings
from protocol.models.task import Cause, Exit
from tests.simulation.plan import Command, MachinePlan
from tests.simulation.stage import Clock, Stage
from tests.simulation.truth import Truth
from tests.support.builders import GIB, an_inventory


@dataclass(slots=True, eq=False)
class Program:
    """One launch that began."""

    launch: Launch
    node: NodeName
    #: True seconds.
    began_at: float
    #: What its machine's clock said.
    started_at: float
    paused: bool = False
    #: It would have ended by itself while it was paused.
    due: bool = False
    exit: Exit | None = None
    ended_at: float = 0.0
    #: Its end has been told to ``watcher``.
    is_told: bool = False
    watcher: Callable[[Program], None] | None = None

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.exit is None


def words_of(command: Command) -> tuple[str, ...]:
    """Write a command so that the machine that gets it knows what to do."""
    codes = ",".join(map(str, command.codes))
    return ("play", str(command.lasts_s), codes, str(command.on_term))


def command_of(words: tuple[str, ...]) -> Command:
    """Read what ``words_of`` wrote."""
    _, lasts_s, codes, on_term = words
    return Command(float(lasts_s), tuple(map(int, codes.split(","))), int(on_term))


def own_exit(command: Command, attempt: int) -> Exit:
    """Give what a command returns when it is left alone."""
    code = command.codes[min(attempt, len(command.codes)) - 1]
    if code == -9:
        return Exit(Cause.OOM, signal=9, oom_kills=1)
    return Exit(Cause.EXITED, code=code)


class Machine:
    """One node's hardware and what runs on it."""

    def __init__(self, stage: Stage, plan: MachinePlan, truth: Truth) -> None:
        self.node = NodeName(plan.name)
        self.plan_ = plan
        self.clock = Clock(stage, plan.clock_off_s)
        #: By the name in the handle.
        self.programs: dict[str, Program] = {}
        #: Indices of GPUs that say they are out of order, and of those that are not there.
        self.faulty: list[int] = []
        self.gone: list[int] = []
        #: How starts fail at present; empty if they do not.
        self.trouble = ""
        #: What runs things here cannot be asked at present, and when that last ended.
        self.is_away = False
        self.back_at = stage.now
        self._whole = an_inventory(plan.cores, plan.gib * GIB, plan.gpus, plan.numa)
        self._never: set[str] = set()
        self._stage = stage
        self._truth = truth
        self._random = stage.chance()
        self._handles = 0
        #: Runs of the runner so far: what one was about to do, the next has to do anew.
        self._runs = 0

    # Hardware -----------------------------------------------------------------------

    def inventory(self, *, healthy: bool = True) -> Inventory:
        """Say what the machine has; what is left of its GPUs is counted anew."""
        if not healthy:
            backend = BackendInfo("process", healthy=False, message="it cannot keep what it starts")
            return replace(self.inventory(), backends=(backend,))
        if not self.gone:
            return self._whole
        left = [gpu for gpu in self._whole.gpus if gpu.index not in self.gone]
        gpus = tuple(Gpu(index, gpu.uuid, numa=gpu.numa) for index, gpu in enumerate(left))
        return replace(self._whole, gpus=gpus)

    def readings(self) -> Readings:
        """Say how it is."""
        faulty = [index for index in self.faulty if index not in self.gone]
        return Readings(
            at=self.clock.now(),
            gpus=tuple(
                GpuReading(self._whole.gpus[index].uuid, fault="lost") for index in sorted(faulty)
            ),
        )

    def forget_runner(self) -> None:
        """Lose what was on behalf of the runner only: who is told of ends, and ends to come."""
        self._runs += 1
        for program in self.programs.values():
            program.watcher = None

    def go_down(self) -> None:
        """Lose power: everything that runs ends, and nobody keeps how."""
        for program in self.programs.values():
            if program.runs:
                self._end(program, Exit(Cause.NODE_FAILED, message="its node restarted"))

    # The backend --------------------------------------------------------------------

    def come_back(self) -> None:
        """Let what runs things be asked again; it tells what has ended meanwhile."""
        if not self.is_away:
            return
        self.is_away, self.back_at = False, self._stage.now
        self._stage.tell("the backend of {} is back", self.node)
        for program in list(self.programs.values()):
            self._tell_end(program)

    def check(self) -> None:
        """Raise if it cannot be asked.

        Raises:
            BackendAway: So it is.
        """
        if self.is_away:
            raise BackendAway("it is away")

    def plan(self) -> Handle:
        """Make a handle that no other launch has."""
        self._handles += 1
        return Handle(backend="process", data={"name": f"{self.node}-h{self._handles}"})

    def start(self, launch: Launch, handle: Handle) -> Program | None:
        """Begin a program, unless its handle has been given up."""
        name = str(handle.data["name"])
        if name in self._never:
            return None
        program = Program(launch, self.node, self._stage.now, self.clock.now())
        self._truth.begins(program, [one for one in self.programs.values() if one.runs])
        self.programs[name] = program
        self._stage.tell("{} runs {}", self.node, launch)
        command = command_of(launch.spec.command)
        if command.lasts_s:
            lasts_s = command.lasts_s * (1.0 + 0.37 * (launch.index % 3))
            self._stage.after(lasts_s, lambda: self._finish(program))
        return program

    def find(self, handle: Handle) -> Finding:
        """Say what became of a handle; one that never began never will.

        Raises:
            BackendAway: It cannot be asked.
        """
        self.check()
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
        program = self._of(handle)
        program.watcher, program.is_told = watcher, False
        self._tell_end(program)

    def hold(self, handle: Handle, *, paused: bool) -> bool:
        """Pause or resume a program; say whether it is there to be held.

        Raises:
            BackendAway: It cannot be asked.
        """
        self.check()
        program = self._of(handle)
        if not program.runs:
            return False
        if program.paused != paused:
            self._stage.tell("{} is {}", program.launch, "paused" if paused else "resumed")
        program.paused = paused
        if not paused and program.due:
            self._finish(program)
        return True

    def kill(self, handle: Handle, grace_s: float) -> None:
        """Ask a program to end, and end it after the grace.

        Raises:
            BackendAway: It cannot be asked.
        """
        self.check()
        program = self._of(handle)
        on_term = command_of(program.launch.spec.command).on_term
        if on_term == -2:
            self._stage.after(grace_s, partial(self._kill_hard, program, self._runs))
            return
        by_itself = Exit(Cause.EXITED, code=on_term)
        ended = Exit(Cause.SIGNALLED, signal=15) if on_term == -1 else by_itself
        self._stage.after(0.3 * self._random.random(), lambda: self._end(program, ended))

    def _kill_hard(self, program: Program, runs: int) -> None:
        if self._runs == runs:
            self._end(program, Exit(Cause.SIGNALLED, signal=9))

    def _of(self, handle: Handle) -> Program:
        return self.programs[str(handle.data["name"])]

    def _finish(self, program: Program) -> None:
        if program.paused:
            program.due = True
        else:
            command = command_of(program.launch.spec.command)
            self._end(program, own_exit(command, program.launch.attempt))

    def _end(self, program: Program, exit_: Exit) -> None:
        if program.exit is not None:
            return
        program.exit, program.ended_at = exit_, self.clock.now()
        self._stage.tell("{} ended {}: {}", self.node, program.launch, exit_)
        self._tell_end(program)

    def _tell_end(self, program: Program) -> None:
        if program.exit is None or program.is_told or program.watcher is None or self.is_away:
            return
        program.is_told = True
        program.watcher(program)
