"""The promises of ``kohaku_daemon.backends.base`` as tests that every backend must pass.

A backend joins with a test module that makes a subclass of ``Conformance`` and a fixture
``rig``: how it is made, made again after a "restart of the runner", and what its tasks must be
told to behave as a ``Program`` says. Nothing here sleeps for luck: each wait has a condition
and a deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from kohaku_daemon.backends.base import Backend, BackendFailed, TaskFolders
from kohaku_daemon.core.workload import Found, Handle, Launch, Started
from protocol.ids import BatchId, TaskId
from protocol.models.node import BackendInfo
from protocol.models.task import Cause, Claim, Exit, TaskSpec

DEADLINE_S = 20.0
_NUMBERS = itertools.count(1)


class Programs(Protocol):
    """What tasks of a backend are told, to behave as each name says."""

    def exits(self, code: int) -> TaskSpec:
        """Return this code at once."""

    def dies(self, number: int) -> TaskSpec:
        """End by this signal, sent by itself."""

    def prints(self, out: str, err: str) -> TaskSpec:
        """Write to standard output and standard error, and return 0."""

    def works(self) -> TaskSpec:
        """Use a core until it is killed; SIGTERM ends it."""

    def runs(self, seconds: float) -> TaskSpec:
        """Return 0 after this time."""

    def refuses_term(self) -> TaskSpec:
        """Go on for ever whatever SIGTERM says, with a child that does so too.

        Each of the two says ``ready`` on standard output once it is.
        """

    def handles_term(self, code: int) -> TaskSpec:
        """Say ``ready``, go on for ever, and return this code on SIGTERM."""

    def cannot_start(self) -> tuple[TaskSpec, str]:
        """Be impossible to start; with the words its error must hold."""

    def exceeds_memory(self, limit: int) -> TaskSpec:
        """Use more memory than this limit, and return if nothing ends it for that."""


@dataclass
class Ended:
    """Where an end is reported."""

    told: list[tuple[Exit, float, float]] = field(default_factory=list)
    once: asyncio.Event = field(default_factory=asyncio.Event)

    def on_exit(self, exit_: Exit, started_at: float, ended_at: float) -> None:
        self.told.append((exit_, started_at, ended_at))
        self.once.set()

    async def wait(self) -> Exit:
        async with asyncio.timeout(DEADLINE_S):
            await self.once.wait()
        return self.told[0][0]


@dataclass
class Rig:
    """One backend under test and what belongs to it."""

    make: Callable[[], Backend]
    programs: Programs
    root: Path
    backend: Backend
    info: BackendInfo
    handles: list[Handle] = field(default_factory=list)

    async def restart(self) -> None:
        """Replace the backend as a restart of the runner does."""
        await self.backend.close()
        self.backend = self.make()
        self.info = await self.backend.open()

    def launch(
        self, spec: TaskSpec, claim: Claim | None = None
    ) -> tuple[Launch, Handle, TaskFolders]:
        number = next(_NUMBERS) + os.getpid() * 100_000
        launch = Launch(
            task=TaskId(number), attempt=1, batch=BatchId(5), spec=spec, claim=claim or Claim()
        )
        place = self.root / "tasks" / launch.key
        (place / "scratch").mkdir(parents=True)
        folders = TaskFolders(place / "scratch", place / "stdout", place / "stderr")
        handle = self.backend.plan(launch)
        self.handles.append(handle)
        return launch, handle, folders

    async def start(self, spec: TaskSpec, claim: Claim | None = None) -> tuple[Handle, TaskFolders]:
        launch, handle, folders = self.launch(spec, claim)
        await self.backend.start(launch, handle, folders)
        return handle, folders

    async def start_ready(self, spec: TaskSpec, count: int) -> Handle:
        """Start, and wait until so many of its processes have said that they are ready."""
        handle, folders = await self.start(spec)
        said = "ready\n" * count
        await until(lambda: folders.stdout.exists() and folders.stdout.read_text() == said)
        return handle

    async def run(self, spec: TaskSpec, claim: Claim | None = None) -> tuple[Exit, TaskFolders]:
        """Start, and wait for the end."""
        handle, folders = await self.start(spec, claim)
        return await self.watch(handle).wait(), folders

    def watch(self, handle: Handle) -> Ended:
        ended = Ended()
        self.backend.watch(handle, ended.on_exit)
        return ended

    async def read_cpu_s(self, handle: Handle) -> float:
        reading = await self.backend.read(handle)
        assert reading is not None
        return reading.cpu_s

    async def clear(self) -> None:
        """End and remove whatever a test has left."""
        for handle in self.handles:
            if (await self.backend.adopt(handle)).found in (Found.RUNNING, Found.PAUSED):
                ended = self.watch(handle)
                await self.backend.kill(handle, 0)
                await ended.wait()
            await self.backend.remove(handle)
        await self.backend.close()


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a folder that every user may pass through, which ``tmp_path`` is not for root."""
    root = Path(tempfile.mkdtemp(prefix="kohaku-backend-"))
    root.chmod(0o755)
    try:
        yield root
    finally:
        shutil.rmtree(root)


@asynccontextmanager
async def build_rig(
    make: Callable[[], Backend], programs: Programs, root: Path
) -> AsyncIterator[Rig]:
    """Open a backend, and leave nothing of it."""
    backend = make()
    rig = Rig(make, programs, root, backend, await backend.open())
    try:
        assert rig.info.healthy, rig.info.message
        yield rig
    finally:
        await rig.clear()


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait for a condition; fail after the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.01)


class Conformance:
    """What every backend promises."""

    #: How many tasks start at once, where that is asked for.
    many: ClassVar[int] = 50

    @pytest.mark.parametrize("code", [0, 3, 137, 255])
    async def test_a_code_is_told_as_it_was_returned(self, rig: Rig, code: int) -> None:
        assert (await rig.run(rig.programs.exits(code)))[0] == Exit(Cause.EXITED, code=code)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
    async def test_a_signal_is_told_apart_from_a_code(self, rig: Rig, number: int) -> None:
        exit_, _ = await rig.run(rig.programs.dies(number))
        assert (exit_.cause, exit_.code, exit_.signal) == (Cause.SIGNALLED, None, number)

    async def test_output_is_whole_and_in_its_file(self, rig: Rig) -> None:
        out = "".join(f"line {number}\n" for number in range(2000))
        _, folders = await rig.run(rig.programs.prints(out, "only this\n"))
        assert folders.stdout.read_text() == out
        assert folders.stderr.read_text() == "only this\n"

    async def test_output_is_added_to_what_is_there(self, rig: Rig) -> None:
        launch, handle, folders = rig.launch(rig.programs.prints("new\n", ""))
        folders.stdout.write_text("old\n")
        await rig.backend.start(launch, handle, folders)
        await rig.watch(handle).wait()
        assert folders.stdout.read_text() == "old\nnew\n"

    async def test_times_are_in_order_and_now(self, rig: Rig) -> None:
        launch, handle, folders = rig.launch(rig.programs.runs(0.2))
        started = await rig.backend.start(launch, handle, folders)
        ended = rig.watch(handle)
        await ended.wait()
        _, started_at, ended_at = ended.told[0]
        assert started_at == started.started_at
        assert 0.15 < ended_at - started_at < DEADLINE_S

    async def test_what_cannot_start_says_why_and_stays_unstarted(self, rig: Rig) -> None:
        spec, words = rig.programs.cannot_start()
        launch, handle, folders = rig.launch(spec)
        with pytest.raises(BackendFailed, match=words):
            await rig.backend.start(launch, handle, folders)
        finding = await rig.backend.adopt(handle)
        if finding.found is Found.ENDED:
            assert finding.exit is not None
            assert finding.exit.cause is Cause.START_FAILED
        else:
            assert finding.found is Found.NEVER_STARTED
        with pytest.raises(BackendFailed):
            await rig.backend.start(launch, handle, folders)

    async def test_it_is_prepared_by_any_number_at_once_and_again(self, rig: Rig) -> None:
        launch, handle, folders = rig.launch(rig.programs.prints("ready\n", ""))
        said: list[str] = []
        await asyncio.gather(*(rig.backend.prepare(launch, said.append) for _ in range(3)))
        said.clear()
        await rig.backend.prepare(launch, said.append)
        assert said == [], "what is there already needs no words"
        await rig.backend.start(launch, handle, folders)
        await rig.watch(handle).wait()
        assert folders.stdout.read_text() == "ready\n"

    async def test_what_nobody_wants_is_removed_and_nothing_else(self, rig: Rig) -> None:
        works = rig.programs.works()
        wanted, unwanted = (await rig.start(works))[0], (await rig.start(works))[0]
        _, planned, _ = rig.launch(works)

        async def is_gone() -> bool:
            await rig.backend.tidy([wanted, planned])
            finding = await rig.backend.adopt(unwanted)
            return finding.found not in (Found.RUNNING, Found.PAUSED)

        await rig.restart()
        await until(is_gone)
        assert await rig.backend.read(unwanted) is None
        assert (await rig.backend.adopt(wanted)).found is Found.RUNNING

    async def test_it_is_well_and_says_so(self, rig: Rig) -> None:
        assert rig.backend.trouble == ""

    async def test_the_first_process_of_the_machine_is_no_task(self, rig: Rig) -> None:
        assert rig.backend.owner(1, "0::/init.scope\n") is None

    async def test_a_kill_without_grace_ends_the_whole_tree(self, rig: Rig) -> None:
        handle = await rig.start_ready(rig.programs.refuses_term(), 2)
        ended = rig.watch(handle)
        await rig.backend.kill(handle, 0)
        assert (await ended.wait()).signal == signal.SIGKILL
        assert await rig.backend.read(handle) is None

    async def test_a_tree_that_refuses_has_its_grace_and_not_more(self, rig: Rig) -> None:
        handle = await rig.start_ready(rig.programs.refuses_term(), 2)
        ended, clock = rig.watch(handle), asyncio.get_running_loop().time
        asked = clock()
        await rig.backend.kill(handle, 0.5)
        assert clock() - asked < 0.4, "kill does not wait"
        assert (await ended.wait()).signal == signal.SIGKILL
        assert clock() - asked >= 0.45

    async def test_a_program_may_end_in_its_own_way(self, rig: Rig) -> None:
        handle = await rig.start_ready(rig.programs.handles_term(42), 1)
        ended = rig.watch(handle)
        await rig.backend.kill(handle, 30)
        assert await ended.wait() == Exit(Cause.EXITED, code=42)

    async def test_a_second_kill_changes_nothing_and_its_end_is_told_once(self, rig: Rig) -> None:
        handle = await rig.start_ready(rig.programs.refuses_term(), 2)
        ended = rig.watch(handle)
        await asyncio.gather(*(rig.backend.kill(handle, 0.3) for _ in range(5)))
        await ended.wait()
        await rig.backend.kill(handle, 0.3)
        await rig.backend.kill(handle, 0)
        await asyncio.sleep(0.05)
        assert len(ended.told) == 1

    async def test_paused_it_stands_still_and_resumed_it_goes_on(self, rig: Rig) -> None:
        handle, _ = await rig.start(rig.programs.works())

        async def has_worked(more_s: float = 0.0, since_s: float = 0.0) -> bool:
            return await rig.read_cpu_s(handle) > since_s + more_s

        await until(lambda: has_worked(0.05))
        await rig.backend.pause(handle)
        await rig.backend.pause(handle)
        held_s = await rig.read_cpu_s(handle)
        await asyncio.sleep(0.3)
        assert await rig.read_cpu_s(handle) - held_s <= 0.02
        assert (await rig.backend.adopt(handle)).found is Found.PAUSED
        await rig.backend.resume(handle)
        await rig.backend.resume(handle)
        await until(lambda: has_worked(0.05, held_s))
        assert (await rig.backend.adopt(handle)).found is Found.RUNNING

    @pytest.mark.parametrize("grace_s", [0.0, 5.0])
    async def test_a_paused_tree_is_ended_too(self, rig: Rig, grace_s: float) -> None:
        handle, _ = await rig.start(rig.programs.works())
        ended = rig.watch(handle)
        await rig.backend.pause(handle)
        await rig.backend.kill(handle, grace_s)
        number = signal.SIGTERM if grace_s else signal.SIGKILL
        assert await ended.wait() == Exit(Cause.SIGNALLED, signal=number)

    async def test_what_it_uses_is_read_while_it_runs(self, rig: Rig) -> None:
        launch, handle, folders = rig.launch(rig.programs.works())
        await rig.backend.start(launch, handle, folders)

        async def is_read() -> bool:
            reading = await rig.backend.read(handle)
            assert reading is not None
            assert reading.task == launch.task
            return reading.cpu_s > 0.05 and reading.processes >= 1 and reading.cpu_percent > 10

        await until(is_read)

    async def test_an_oom_is_told_exactly_where_memory_is_said_to_be_enforced(
        self, rig: Rig
    ) -> None:
        exit_, _ = await rig.run(rig.programs.exceeds_memory(64 << 20), Claim(memory=64 << 20))
        if "memory" in rig.info.enforces:
            assert (exit_.cause, exit_.signal) == (Cause.OOM, signal.SIGKILL)
            assert exit_.oom_kills >= 1
        else:
            assert exit_.cause is Cause.EXITED
            assert exit_.oom_kills == 0

    async def test_it_is_adopted_while_it_runs(self, rig: Rig) -> None:
        handle, _ = await rig.start(rig.programs.works())
        await rig.restart()
        finding = await rig.backend.adopt(handle)
        assert finding.found is Found.RUNNING
        assert finding.started_at > 0
        ended = rig.watch(handle)
        await rig.backend.kill(handle, 5)
        assert await ended.wait() == Exit(Cause.SIGNALLED, signal=signal.SIGTERM)

    async def test_it_is_adopted_while_it_is_paused(self, rig: Rig) -> None:
        handle, _ = await rig.start(rig.programs.works())
        await rig.backend.pause(handle)
        await rig.restart()
        assert (await rig.backend.adopt(handle)).found is Found.PAUSED
        await rig.backend.resume(handle)
        assert (await rig.backend.adopt(handle)).found is Found.RUNNING

    async def test_an_end_nobody_saw_is_found(self, rig: Rig) -> None:
        handle, _ = await rig.start(rig.programs.exits(23))
        await rig.backend.close()

        rig.backend = rig.make()
        await rig.backend.open()

        async def has_ended() -> bool:
            return (await rig.backend.adopt(handle)).found is Found.ENDED

        await until(has_ended)
        finding = await rig.backend.adopt(handle)
        assert finding.exit == Exit(Cause.EXITED, code=23)
        assert 0 < finding.started_at <= finding.ended_at
        assert await rig.watch(handle).wait() == Exit(Cause.EXITED, code=23)

    async def test_what_was_given_up_never_starts(self, rig: Rig) -> None:
        launch, handle, folders = rig.launch(rig.programs.prints("it ran\n", ""))
        await rig.restart()
        assert (await rig.backend.adopt(handle)).found is Found.NEVER_STARTED
        with pytest.raises(BackendFailed):
            await rig.backend.start(launch, handle, folders)
        assert (await rig.backend.adopt(handle)).found is Found.NEVER_STARTED
        assert not folders.stdout.exists()

    async def test_started_again_it_still_runs_once(self, rig: Rig) -> None:
        launch, handle, folders = rig.launch(rig.programs.prints("once\n", ""))
        first, second = await asyncio.gather(
            *(rig.backend.start(launch, handle, folders) for _ in range(2))
        )
        assert isinstance(first, Started)
        assert first.started_at == second.started_at
        await rig.watch(handle).wait()
        assert folders.stdout.read_text() == "once\n"

    async def test_many_start_at_once(self, rig: Rig) -> None:
        exits = await asyncio.gather(*(rig.run(rig.programs.exits(n)) for n in range(self.many)))
        assert [exit_.code for exit_, _ in exits] == list(range(self.many))

    async def test_remove_waits_for_the_end_and_may_be_repeated(self, rig: Rig) -> None:
        handle, folders = await rig.start(rig.programs.works())
        with pytest.raises(BackendFailed, match="has not ended"):
            await rig.backend.remove(handle)
        ended = rig.watch(handle)
        await rig.backend.kill(handle, 0)
        await ended.wait()
        await rig.backend.remove(handle)
        await rig.backend.remove(handle)
        assert folders.scratch.is_dir(), "the folders are the runner's"
        assert await rig.backend.read(handle) is None

    async def test_nothing_happens_to_a_launch_nobody_knows(self, rig: Rig) -> None:
        _, handle, _ = rig.launch(rig.programs.exits(0))
        await rig.backend.kill(handle, 0)
        await rig.backend.pause(handle)
        await rig.backend.resume(handle)
        assert await rig.backend.read(handle) is None
        with pytest.raises(BackendFailed):
            rig.watch(handle)
        await rig.backend.remove(handle)

    async def test_a_foreign_handle_is_refused(self, rig: Rig) -> None:
        handle = Handle(backend=rig.backend.name, data={"of": "something else"})
        with pytest.raises(BackendFailed, match="no handle"):
            await rig.backend.adopt(handle)
