"""A backend that runs nothing and behaves as it is told: for tests, trials and measurements.

A task says by variables how it shall go. Without any it ends at once with code 0:

    MOCK_RUN_S=SECONDS     how long it runs; ``forever`` until it is killed. Default 0
    MOCK_EXIT=CODE         what it returns. Default 0
    MOCK_SIGNAL=NUMBER     the signal that ends it, instead
    MOCK_OOM=COUNT         it is killed for memory, with so many processes of it
    MOCK_ON_TERM=...       what it does on SIGTERM: ``ignore``, or a code to return. Default is
                           to be ended by it
    MOCK_PREPARE_S=SECONDS how long it is prepared; ``forever`` until it is let go of. Default 0
    MOCK_PREPARE_ERROR=..  it cannot be prepared, for this reason
    MOCK_START_ERROR=TEXT  it does not start, for this reason
    MOCK_STDOUT=TEXT       written to its standard output, and MOCK_STDERR likewise
    MOCK_MEMORY=BYTES      what it is read to use

Knows: what ``base.Backend`` promises, and keeps it without a process.
Does not know: what a real backend must fear.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import (
    BackendAway,
    BackendFailed,
    OnExit,
    OnProgress,
    TaskFolders,
)
from kohaku_daemon.clock import Clock, SystemClock
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch, Started
from protocol.ids import TaskId
from protocol.models.node import BackendInfo, TaskReading
from protocol.models.task import Cause, Exit

_FOREVER: Final = float("inf")
#: How often a preparation says how far it is: so many times as it takes.
_STEPS: Final = 4


@dataclass(frozen=True, slots=True)
class Script:
    """How one mock task goes."""

    run_s: float = 0.0
    exit: Exit = field(default_factory=lambda: Exit(Cause.EXITED, code=0))
    #: What it does on SIGTERM: None to be ended by it, -1 to ignore it, or a code to return.
    on_term: int | None = None
    memory: int = 0


def parse_script(env: Mapping[str, str]) -> Script:
    """Read how a task shall go from its variables.

    Raises:
        BackendFailed: A variable cannot be read.
    """
    term, run_s = env.get("MOCK_ON_TERM"), _seconds("MOCK_RUN_S", env)
    on_term = None if term is None else -1 if term == "ignore" else _whole("MOCK_ON_TERM", term)
    memory = _whole("MOCK_MEMORY", env.get("MOCK_MEMORY", "0"))
    return Script(run_s=run_s, exit=_parse_exit(env), on_term=on_term, memory=memory)


def _parse_exit(env: Mapping[str, str]) -> Exit:
    if kills := _whole("MOCK_OOM", env.get("MOCK_OOM", "0")):
        return Exit(Cause.OOM, signal=signal.SIGKILL, oom_kills=kills)
    if number := _whole("MOCK_SIGNAL", env.get("MOCK_SIGNAL", "0")):
        return Exit(Cause.SIGNALLED, signal=number)
    return Exit(Cause.EXITED, code=_whole("MOCK_EXIT", env.get("MOCK_EXIT", "0")))


def _seconds(name: str, env: Mapping[str, str]) -> float:
    text = env.get(name, "0")
    try:
        return _FOREVER if text == "forever" else float(text)
    except ValueError as error:
        raise BackendFailed(f"{name}={text} is neither seconds nor forever") from error


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise BackendFailed(f"{name}={text} is not a whole number") from error


@dataclass(slots=True)
class _Run:
    """One mock task. Times are of the clock's ``monotonic`` but for ``started_at``."""

    script: Script
    #: UTC seconds; the difference to ``begun`` turns one kind of time into the other.
    started_at: float
    begun: float
    #: Seconds it was held before now.
    held_s: float = 0.0
    #: Since when it is held.
    held: float | None = None
    #: When SIGKILL comes.
    deadline: float = _FOREVER
    exit: Exit | None = None
    ended: float = 0.0

    @property
    def ended_at(self) -> float:
        return self.started_at + self.ended - self.begun

    def find_next(self) -> float:
        """Find when it ends by itself or by SIGKILL."""
        ends = _FOREVER if self.held is not None else self.begun + self.held_s + self.script.run_s
        return min(ends, self.deadline)

    def settle(self, now: float) -> None:
        """Let happen what has happened by now."""
        at = self.find_next()
        if self.exit is None and at <= now:
            killed = at == self.deadline
            self.end(Exit(Cause.SIGNALLED, signal=9) if killed else self.script.exit, at)

    def end(self, exit_: Exit, at: float) -> None:
        self.exit, self.ended = exit_, at

    def hold(self, now: float) -> None:
        if self.held is None:
            self.held = now

    def release(self, now: float) -> None:
        if self.held is not None:
            self.held_s += now - self.held
            self.held = None

    def kill(self, now: float, grace_s: float) -> None:
        """Take SIGTERM now and SIGKILL ``grace_s`` later, whichever ends it."""
        term, first = self.script.on_term, self.deadline == _FOREVER
        self.release(now)
        self.deadline = min(self.deadline, now + grace_s)
        if first and grace_s > 0 and term != -1:
            by_signal = Exit(Cause.SIGNALLED, signal=signal.SIGTERM)
            self.end(by_signal if term is None else Exit(Cause.EXITED, code=term), now)

    def count_ran_s(self, now: float) -> float:
        return (self.held if self.held is not None else now) - self.begun - self.held_s


@dataclass(slots=True)
class MockWorld:
    """Where mock tasks live: what stays when a backend, and the runner with it, is replaced."""

    clock: Clock = field(default_factory=SystemClock)
    #: Tells the tasks of this world from those that ended with another.
    name: str = field(default_factory=lambda: secrets.token_hex(4))
    #: By launch; None for one that shall never start.
    runs: dict[str, _Run | None] = field(default_factory=dict, repr=False)
    #: Why nothing can be asked here at present; empty if it can. Tasks go on meanwhile.
    away: str = ""
    #: Whether a start that is asked for while it is away begins all the same.
    starts_unseen: bool = False

    def check(self) -> None:
        """Raise if nothing can be asked at present.

        Raises:
            BackendAway: So it is.
        """
        if self.away:
            raise BackendAway(self.away)


class MockBackend:
    """Runs nothing. See ``base.Backend``."""

    name: Final = "mock"

    def __init__(self, world: MockWorld | None = None) -> None:
        """Make a backend.

        Args:
            world: Where its tasks live; one of its own if left out, which ends with it.
        """
        self._world = world or MockWorld()
        # Begins anywhere, so that no two of one world number alike.
        self._plans = itertools.count(secrets.randbits(60))
        self._watched: dict[str, OnExit] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __repr__(self) -> str:
        return f"MockBackend({self._world.name}, watched={len(self._watched)})"

    async def open(self) -> BackendInfo:
        """Say what it does: nothing, but all of it.

        Raises:
            BackendAway: Its world is.
        """
        self._world.check()
        return BackendInfo(self.name, isolation="none: nothing is run", enforces=("adopt", "pause"))

    async def close(self) -> None:
        """Look away. The tasks of its world go on."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._watched.clear()

    @property
    def trouble(self) -> str:
        """Why its world cannot be asked."""
        return self._world.away

    async def prepare(self, launch: Launch, on_progress: OnProgress) -> None:
        """Take the time it was told to.

        Raises:
            BackendFailed: It was told not to be possible.
            BackendAway: Its world is.
        """
        self._world.check()
        env = launch.spec.env
        if "MOCK_PREPARE_ERROR" in env:
            raise BackendFailed(env["MOCK_PREPARE_ERROR"])
        lasts_s = _seconds("MOCK_PREPARE_S", env)
        if lasts_s == _FOREVER:
            on_progress("preparing 0 %")
            await asyncio.Event().wait()
        if lasts_s:
            for step in range(_STEPS):
                on_progress(f"preparing {100 * step // _STEPS} %")
                await asyncio.sleep(lasts_s / _STEPS)

    def plan(self, launch: Launch) -> Handle:
        """Make the handle of a launch that does not exist yet."""
        key = f"{launch.key}-{next(self._plans):016x}"
        data: dict[str, str | int] = {"task": launch.task, "key": key}
        return Handle(backend=self.name, data={**data, "world": self._world.name})

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        """Begin a mock task; again with the same handle, say that it was begun.

        Raises:
            BackendFailed: It was told not to start, or was given up.
            BackendAway: Its world is.
        """
        if not self._world.starts_unseen:
            self._world.check()
        key, env = _name(handle), launch.spec.env
        run = self._world.runs.get(key)
        if run is None and key not in self._world.runs:
            run = self._begin(key, env, folders)
        if run is None:
            raise BackendFailed(f"launch {key} was given up before it started")
        self._world.check()
        return Started(started_at=run.started_at, note="mock: nothing is run")

    async def adopt(self, handle: Handle) -> Finding:
        """Say what became of a launch.

        Raises:
            BackendAway: Its world is.
        """
        self._world.check()
        key = _name(handle)
        if handle.data.get("world") != self._world.name:
            text = "mock tasks end with the runner that holds them"
            return Finding(found=Found.ENDED, exit=Exit(Cause.NODE_FAILED, message=text))
        run = self._world.runs.setdefault(key, None)
        if run is None:
            return Finding(found=Found.NEVER_STARTED)
        run.settle(self._world.clock.monotonic())
        if run.exit is not None:
            return Finding(
                found=Found.ENDED,
                exit=run.exit,
                started_at=run.started_at,
                ended_at=run.ended_at,
            )
        found = Found.RUNNING if run.held is None else Found.PAUSED
        return Finding(found=found, started_at=run.started_at)

    def watch(self, handle: Handle, on_exit: OnExit) -> None:
        """Call ``on_exit`` once when the launch ends, or has ended.

        Raises:
            BackendFailed: There is no such launch.
        """
        key = _name(handle)
        if self._world.runs.get(key) is None:
            raise BackendFailed(f"there is no mock launch {key}")
        self._watched[key] = on_exit
        self._look(key)

    async def kill(self, handle: Handle, grace_s: float) -> None:
        """Ask it to end, as its script says."""
        run = self._find(handle)
        if run is not None:
            run.kill(self._world.clock.monotonic(), grace_s)
            self._look(_name(handle))

    async def pause(self, handle: Handle) -> None:
        """Stop its time."""
        run = self._find(handle)
        if run is not None:
            run.hold(self._world.clock.monotonic())
            self._look(_name(handle))

    async def resume(self, handle: Handle) -> None:
        """Let its time go on."""
        run = self._find(handle)
        if run is not None:
            run.release(self._world.clock.monotonic())
            self._look(_name(handle))

    async def remove(self, handle: Handle) -> None:
        """Forget an ended launch.

        Raises:
            BackendFailed: It has not ended.
            BackendAway: Its world is.
        """
        self._world.check()
        key = _name(handle)
        if self._find(handle) is not None:
            raise BackendFailed(f"mock launch {key} has not ended")
        self._watched.pop(key, None)
        self._world.runs.pop(key, None)

    async def read(self, handle: Handle) -> TaskReading | None:
        """Read what it uses: one core while it is not held."""
        run = self._find(handle)
        if run is None:
            return None
        return TaskReading(
            task=TaskId(int(handle.data["task"])),
            cpu_s=run.count_ran_s(self._world.clock.monotonic()),
            cpu_percent=100.0 if run.held is None else 0.0,
            memory=run.script.memory,
            processes=1,
        )

    async def tidy(self, wanted: Collection[Handle]) -> None:
        """Forget launches that nobody wants.

        Raises:
            BackendAway: Its world is.
        """
        self._world.check()
        for key in self._world.runs.keys() - {_name(handle) for handle in wanted}:
            self._watched.pop(key, None)
            del self._world.runs[key]

    def owner(self, pid: int, cgroup: str) -> TaskId | None:
        """None: its tasks have no processes."""
        return None

    def _begin(self, key: str, env: Mapping[str, str], folders: TaskFolders) -> _Run:
        self._world.runs[key] = None
        if "MOCK_START_ERROR" in env:
            raise BackendFailed(env["MOCK_START_ERROR"])
        script, clock = parse_script(env), self._world.clock
        for name, path in (("MOCK_STDOUT", folders.stdout), ("MOCK_STDERR", folders.stderr)):
            if name in env:
                _append(path, env[name])
        run = _Run(script, started_at=clock.now(), begun=clock.monotonic())
        self._world.runs[key] = run
        return run

    def _find(self, handle: Handle) -> _Run | None:
        """Find a launch that has not ended.

        Raises:
            BackendAway: Its world is.
        """
        self._world.check()
        run = self._world.runs.get(_name(handle))
        if run is None:
            return None
        run.settle(self._world.clock.monotonic())
        return run if run.exit is None else None

    def _look(self, key: str) -> None:
        """Tell the end of a watched launch, or look again when that is due."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        run = self._world.runs.get(key)
        if run is None or key not in self._watched:
            return
        now = self._world.clock.monotonic()
        run.settle(now)
        if run.exit is not None:
            on_exit = self._watched.pop(key)
            loop = asyncio.get_running_loop()  # never within ``watch`` itself
            loop.call_soon(on_exit, run.exit, run.started_at, run.ended_at)
        elif run.find_next() < _FOREVER:
            loop = asyncio.get_running_loop()
            self._timers[key] = loop.call_later(run.find_next() - now, self._look, key)


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _name(handle: Handle) -> str:
    key = handle.data.get("key")
    if not isinstance(key, str):
        raise BackendFailed(f"this is no handle of the mock backend: {handle.data}")
    return key
