"""The client for scripts and notebooks that do not use asyncio.

    with connect() as cluster:
        submitted = cluster.submit(["hostname"])
        (task,) = cluster.wait(submitted)

Knows: a thread with an event loop of its own, and how to stop waiting when interrupted.
Does not know: anything ``client`` knows; every method here is one of there, waited for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractAsyncContextManager, contextmanager
from types import TracebackType
from typing import Any, Final, TypeVar, Unpack, cast

from protocol import client
from protocol.client import PATIENCE_S, SubmitOptions, TaskFilter, Tasks
from protocol.errors import Unavailable
from protocol.messages.cluster import Event, Status, Topic, Update
from protocol.messages.environment import ShellEnd, ShellOutput
from protocol.messages.hello import Welcome
from protocol.messages.stream import LogChunk, LogEnd, Source
from protocol.messages.task import Retried, SteerResult, Submitted
from protocol.methods import Method, P, R
from protocol.models.environment import Environment
from protocol.models.node import Node
from protocol.models.task import Explanation, Task, TaskSpec
from protocol.shell import Shell

T = TypeVar("T")

_STOP: Final = object()
#: Seconds that the loop's jobs have to end when the cluster is closed.
_STOP_TIMEOUT_S: Final = 5.0


def connect(
    url: str | None = None,
    token: str | None = None,
    *,
    context: str | None = None,
    agent: str = "",
    patience_s: float = PATIENCE_S,
) -> BlockingCluster:
    """Name a cluster; connected by ``with``. Arguments and errors are ``client.connect``'s."""

    def make() -> client.Cluster:
        return client.connect(url, token, context=context, agent=agent, patience_s=patience_s)

    return BlockingCluster(make)


class BlockingCluster:
    """``client.Cluster``, each of whose methods is waited for. May be used from many threads."""

    def __init__(self, make: Callable[[], client.Cluster]) -> None:
        """Not for use: ``connect`` makes one."""
        self._make = make
        self._thread: _LoopThread | None = None
        self._cluster: client.Cluster | None = None

    def __repr__(self) -> str:
        return f"<BlockingCluster of {self._cluster!r}>"

    def __enter__(self) -> BlockingCluster:
        self._thread = _LoopThread()
        try:
            self._cluster = self._thread.run(self._open())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        reason: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread. Closing again does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            if self._cluster is not None:
                thread.run(self._cluster.close())
        finally:
            thread.stop()

    @property
    def url(self) -> str:
        """Where the host is."""
        return self._open_cluster.url

    @property
    def welcome(self) -> Welcome:
        """What the host said at the last hello."""
        return self._open_cluster.welcome

    def call(self, method: Method[P, R], params: P, *, timeout_s: float = 30.0) -> R:
        """Call any method of the table; see ``Cluster.call``."""
        return self._run(self._open_cluster.call(method, params, timeout_s=timeout_s))

    def call_raw(self, name: str, params: Any, *, timeout_s: float = 30.0) -> Any:
        """Call by name with plain values; see ``Cluster.call_raw``."""
        return self._run(self._open_cluster.call_raw(name, params, timeout_s=timeout_s))

    def submit(
        self, command: Sequence[str] | TaskSpec, **options: Unpack[SubmitOptions]
    ) -> Submitted:
        """Submit one task or a batch; see ``Cluster.submit``."""
        return self._run(self._open_cluster.submit(command, **options))

    def retry(
        self, task: int | None = None, *, batch: int | None = None, request_id: str = ""
    ) -> Retried:
        """Try a task or a batch again; see ``Cluster.retry``."""
        return self._run(self._open_cluster.retry(task, batch=batch, request_id=request_id))

    def task(self, task: int) -> Task:
        """Give one task with its history."""
        return self._run(self._open_cluster.task(task))

    def explain(self, task: int) -> Explanation:
        """Say why a task is where it is, node by node."""
        return self._run(self._open_cluster.explain(task))

    def tasks(self, **only: Unpack[TaskFilter]) -> Iterator[Task]:
        """Give tasks, newest first."""
        return self._iterate(self._open_cluster.tasks(**only))

    def events(self, most: int = 100) -> list[Event]:
        """Give the newest lines of the cluster's diary, newest first."""
        return self._run(self._open_cluster.events(most))

    def nodes(self) -> tuple[Node, ...]:
        """Give all nodes, by name."""
        return self._run(self._open_cluster.nodes())

    def environments(self) -> tuple[Environment, ...]:
        """Give all environments, by name."""
        return self._run(self._open_cluster.environments())

    def environment(self, name: str) -> Environment:
        """Give one environment, with where its newest version is."""
        return self._run(self._open_cluster.environment(name))

    def status(self) -> Status:
        """Give the cluster at a glance."""
        return self._run(self._open_cluster.status())

    def wait(
        self, tasks: Tasks = (), *, batch: int | None = None, timeout_s: float | None = None
    ) -> list[Task]:
        """Wait until tasks are over and give them; see ``Cluster.wait``."""
        return self._run(self._open_cluster.wait(tasks, batch=batch, timeout_s=timeout_s))

    def kill(self, tasks: Tasks = (), *, batch: int | None = None) -> SteerResult:
        """End tasks."""
        return self._run(self._open_cluster.kill(tasks, batch=batch))

    def pause(self, tasks: Tasks = (), *, batch: int | None = None) -> SteerResult:
        """Hold running tasks still."""
        return self._run(self._open_cluster.pause(tasks, batch=batch))

    def resume(self, tasks: Tasks = (), *, batch: int | None = None) -> SteerResult:
        """Let paused tasks go on."""
        return self._run(self._open_cluster.resume(tasks, batch=batch))

    def watch(
        self, topics: Iterable[Topic | str], *, batch: int | None = None, tasks: Iterable[int] = ()
    ) -> Iterator[Update]:
        """Give a snapshot, then what changes, for ever; see ``Cluster.watch``."""
        return self._iterate(self._open_cluster.watch(topics, batch=batch, tasks=tasks))

    def logs(
        self,
        task: int,
        *,
        follow: bool = False,
        sources: Iterable[Source | str] = (Source.STDOUT, Source.STDERR),
        attempt: int | None = None,
        tail_lines: int = 0,
    ) -> Iterator[LogChunk | LogEnd]:
        """Give a task's output, and how it ended as the last item; see ``Cluster.logs``."""
        return self._iterate(
            self._open_cluster.logs(
                task, follow=follow, sources=sources, attempt=attempt, tail_lines=tail_lines
            )
        )

    @contextmanager
    def shell(
        self,
        environment: str,
        command: Sequence[str] = (),
        *,
        terminal: bool = False,
        columns: int = 80,
        rows: int = 24,
    ) -> Iterator[BlockingShell]:
        """Run a command in an environment; see ``Cluster.shell``."""
        entering = self._open_cluster.shell(
            environment, command, terminal=terminal, columns=columns, rows=rows
        )
        running = self._run(entering.__aenter__())
        try:
            yield BlockingShell(self._run, running)
        finally:
            if self._thread is not None:
                self._run(_leave(entering))

    @property
    def _open_cluster(self) -> client.Cluster:
        if self._thread is None or self._cluster is None:
            raise Unavailable("not connected: use the cluster inside 'with'")
        return self._cluster

    async def _open(self) -> client.Cluster:
        return await self._make().__aenter__()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._thread is None:
            work.close()
            raise Unavailable("the cluster was closed")
        return self._thread.run(work)

    def _iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Give the items of an async generator; it is closed when this one is."""
        turn = asyncio.Lock()
        try:
            while (item := self._run(_next_of(items, turn))) is not _STOP:
                yield cast("T", item)
        finally:
            if self._thread is not None:
                self._run(_close(items, turn))


class BlockingShell:
    """``shell.Shell``, each of whose methods is waited for."""

    def __init__(self, run: Callable[[Coroutine[Any, Any, Any]], Any], shell: Shell) -> None:
        """Not for use: ``BlockingCluster.shell`` makes one."""
        self._run = run
        self._shell = shell

    def __iter__(self) -> Iterator[ShellOutput | ShellEnd]:
        while (said := self._run(_said_next(self._shell))) is not _STOP:
            yield said

    def type(self, data: bytes) -> None:
        """Type something; see ``Shell.type``."""
        self._run(self._shell.type(data))

    def end_input(self) -> None:
        """Say that nothing more will be typed."""
        self._run(self._shell.end_input())

    def resize(self, columns: int, rows: int) -> None:
        """Say that the terminal has another size."""
        self._run(self._shell.resize(columns, rows))


class _LoopThread:
    """An event loop in a thread of its own, so that any other loop is left alone."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: a script that forgot to close still ends.
        self._thread = threading.Thread(target=self._serve, name="kohaku-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait. An interrupt cancels the work before it goes on."""
        job = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return job.result()
        except CancelledError:
            raise Unavailable("the cluster was closed meanwhile") from None
        except BaseException:
            job.cancel()
            raise

    def stop(self) -> None:
        """End all jobs, then the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_end_jobs())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


async def _next_of(items: AsyncGenerator[T, None], turn: asyncio.Lock) -> T | object:
    # StopAsyncIteration cannot pass through a future.
    async with turn:
        return await anext(items, _STOP)


async def _said_next(shell: Shell) -> ShellOutput | ShellEnd | object:
    try:
        return await anext(shell)
    except StopAsyncIteration:  # cannot pass through a future
        return _STOP


async def _leave(entered: AbstractAsyncContextManager[Shell]) -> None:
    await entered.__aexit__(None, None, None)


async def _close(items: AsyncGenerator[T, None], turn: asyncio.Lock) -> None:
    # After an interrupt the last step is still being cancelled: closing waits for its turn.
    async with turn:
        await items.aclose()


async def _end_jobs() -> None:
    jobs = asyncio.all_tasks() - {asyncio.current_task()}
    for job in jobs:
        job.cancel()
    if jobs:
        await asyncio.wait(jobs, timeout=_STOP_TIMEOUT_S)
