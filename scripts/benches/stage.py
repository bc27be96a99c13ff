"""The daemons of a measurement: a temporary home, and daemons that the bench itself starts.

Knows: how daemons are started, found ready, read (CPU, memory), killed and stopped; that tasks
must be ended before their daemons. Does not know: what is measured.

Not by ``kohakud up``: a host can be alone here, run under a profiler, be killed and started
again. Daemons are children of the bench in sessions of their own, so that Ctrl-C reaches the
bench alone, which then ends them by pid.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

import profiling

from protocol.client import Cluster, connect
from protocol.errors import KohakuError
from protocol.ids import NodeName
from protocol.messages.cluster import Topic
from protocol.messages.node import MakeJoinToken
from protocol.messages.task import SteerTasks
from protocol.methods import NODE_JOIN_TOKEN, TASK_KILL
from protocol.models.node import NodeState
from protocol.models.task import TaskState

BIN: Final = Path(sys.executable).parent
#: Seconds for a daemon to be ready, or to stop.
_PATIENCE_S: Final = 60.0
_LOOK_S: Final = 0.002
_LIVE: Final = tuple(state for state in TaskState if not state.is_final)


class Stage:
    """A temporary home, and the daemons started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {key: value for key, value in os.environ.items() if not key.startswith("KOHAKU_")}
        #: Of programs that belong to this home.
        self.environ = {**kept, "KOHAKU_HOME": str(folder)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._url = ""

    @property
    def url(self) -> str:
        """Where the host is."""
        return self._url

    @property
    def token(self) -> str:
        """The admin's."""
        return (self._host_data / "admin.token").read_text().strip()

    @property
    def _host_data(self) -> Path:
        return self.folder / "data" / "host"

    # Daemons ------------------------------------------------------------------------

    def start_host(self, **settings: str) -> float:
        """Start the host, on its earlier port if it had one; give the seconds to ready.

        Ready is when its address is published: clients can connect then.
        """
        port = self._url.rpartition(":")[2] or "0"
        published = self._host_data / "host.url"
        published.unlink(missing_ok=True)
        began = time.perf_counter()
        self._start("host", ["host", "--listen", f"127.0.0.1:{port}"], settings)
        self._until("host", lambda: published.exists() and published.read_text().strip() != "")
        ready_s = time.perf_counter() - began
        self._url = published.read_text().strip()
        return ready_s

    def start_runner(self, name: str = "node1", **settings: str) -> float:
        """Start a runner that joins the host; give the seconds until its node is online."""
        token = self.folder / f"{name}.token"
        if not (self.folder / "data" / "runners" / name).exists():
            token.write_text(self.join_token())
        flags = ["--name", name, "--host", self.url, "--join-token-file", str(token)]
        began = time.perf_counter()
        self._start(f"runner-{name}", ["runner", *flags], settings)
        asyncio.run(self._until_online(name))
        return time.perf_counter() - began

    def start_script(self, name: str, path: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program of the bench's own with pipes, stopped with the home."""
        with self._log(name) as log:
            process = subprocess.Popen(
                [sys.executable, str(path), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environ,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def kill(self, name: str) -> None:
        """kill -9 a daemon and reap it."""
        process = self._processes.pop(name)
        process.kill()
        process.wait(_PATIENCE_S)

    def stop(self) -> None:
        """End all tasks, then all daemons, newest first."""
        if any(name.startswith("runner-") for name in self._processes):
            with suppress(KohakuError, OSError, TimeoutError):
                asyncio.run(self._end_tasks())
        for name in reversed(list(self._processes)):
            self._stop_one(self._processes.pop(name))

    def find_dead(self) -> list[str]:
        """Say of each daemon that has ended by itself what it wrote last."""
        return [
            f"{name} had ended with status {process.returncode}; it wrote:\n"
            + (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
            for name, process in self._processes.items()
            if process.poll() is not None
        ]

    # Reading them -------------------------------------------------------------------

    def pid(self, name: str) -> int:
        """Give the process id of ``host`` or ``runner-NAME``."""
        return self._processes[name].pid

    def cpu_s(self, name: str) -> float:
        """Give the CPU seconds a daemon has used, its threads included (man 5 proc)."""
        return cpu_s(self.pid(name))

    def rss_mib(self, name: str) -> float:
        """Give the resident memory of a daemon."""
        return _rss_mib(self.pid(name))

    def find_all(self) -> list[int]:
        """Give the process ids of the daemons, and of all they started that outlives them.

        Those are no children of theirs, but carry this home in their command lines.
        """
        mark, found = os.fsencode(str(self.folder)), []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended meanwhile
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return sorted({*found, *(process.pid for process in self._processes.values())})

    def all_cpu_s(self) -> float:
        """Give the CPU seconds of the daemons, of what keeps their tasks, and of the tasks."""
        return family_cpu_s(*self.find_all())

    def all_rss_mib(self) -> float:
        """Give the resident memory of all these; pages that forks share count for each."""
        return sum(map(_rss_mib, self.find_all()))

    # Talking to them ----------------------------------------------------------------

    def connect(self) -> Cluster:
        """Name this cluster as its admin; for ``async with``."""
        return connect(self.url, self.token, agent="kohaku-bench")

    def join_token(self, uses: int = 1) -> str:
        """Have a join token made."""

        async def make() -> str:
            async with self.connect() as there:
                return (await there.call(NODE_JOIN_TOKEN, MakeJoinToken(uses=uses))).token

        return asyncio.run(make())

    def run(self, program: str, *arguments: str) -> str:
        """Run one of our programs against it; give what it printed."""
        done = subprocess.run(
            [BIN / program, *arguments],
            env={**self.environ, "KOHAKU_HOST": self.url, "KOHAKU_TOKEN": self.token},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout

    # Inside -------------------------------------------------------------------------

    def _start(self, name: str, arguments: list[str], settings: dict[str, str]) -> None:
        python = [sys.executable, "-P", *profiling.flags(name, self.folder)]
        with self._log(name) as log:
            self._processes[name] = subprocess.Popen(
                [*python, "-m", "kohaku_daemon", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
                env={**self.environ, **settings},
                start_new_session=True,
            )

    def _log(self, name: str) -> BinaryIO:
        return (self.folder / f"{name}.log").open("ab")

    def _until(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not ready():
            if self._processes[name].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not become ready")
            time.sleep(_LOOK_S)

    async def _until_online(self, name: str) -> None:
        async with asyncio.timeout(_PATIENCE_S), self.connect() as there:
            async for update in there.watch([Topic.NODES]):
                states = {node.name: node.state for node in update.nodes}
                if states.get(NodeName(name)) is NodeState.ONLINE:
                    return

    async def _end_tasks(self) -> None:
        async with asyncio.timeout(_PATIENCE_S), self.connect() as there:
            while live := [task.id async for task in there.tasks(states=_LIVE, most=1000)]:
                await there.call(TASK_KILL, SteerTasks(tasks=tuple(live)))
                await there.wait(live)

    def _stop_one(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def cpu_s(pid: int) -> float:
    """Give the CPU seconds, user and system, of a process and its threads (man 5 proc)."""
    return sum(_ticks(pid)[:2]) / os.sysconf("SC_CLK_TCK")


def _rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def family_cpu_s(*pids: int) -> float:
    """Give the same with all their children: those that live, and those that were waited for."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            children.setdefault(_parent(int(entry.name)), []).append(int(entry.name))
    # A set: one of them may be another one's child.
    every, unseen = set[int](), list(pids)
    while unseen:
        pid = unseen.pop()
        if pid not in every:
            every.add(pid)
            unseen += children.get(pid, ())
    return sum(map(_used_ticks, every)) / os.sysconf("SC_CLK_TCK")


def _used_ticks(pid: int) -> int:
    try:
        return sum(_ticks(pid))
    except OSError:
        return 0


def _ticks(pid: int) -> list[int]:
    """utime, stime, cutime, cstime."""
    return [int(field) for field in _stat(pid)[11:15]]


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    # The name may hold anything, also spaces and parentheses.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextmanager
def stage() -> Iterator[Stage]:
    """Give an empty home; what was started in it is stopped, and its folder removed, at the end."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="kohaku-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o711)  # tasks of root have users of their own and pass through it
        place = Stage(folder)
        stack.callback(profiling.show, folder)
        stack.callback(place.stop)
        try:
            yield place
        except Exception as error:
            for obituary in place.find_dead():
                error.add_note(obituary)
            raise


@contextmanager
def cluster(backend: str = "process", **settings: str) -> Iterator[Stage]:
    """Give a running host and a runner called node1; settings as environment variables."""
    with stage() as place:
        place.start_host(**settings)
        place.start_runner(KOHAKU_RUNNER_BACKENDS=backend, **settings)
        yield place
