"""The client of scripts: a cluster, reached by as many connections as it takes.

Knows: which host is meant, when to dial again and what may then be said again, how waiting,
watching and reading logs go on after a cut.
Does not know: WebSockets (``connection``), the daemons.

    async with connect() as cluster:
        submitted = await cluster.submit(["python", "train.py"], gpus=1)
        (task,) = await cluster.wait(submitted)
"""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Any, Final, TypedDict, Unpack

import msgspec

from protocol import contexts
from protocol.backoff import LONGEST_S, delay_s
from protocol.connection import Connection, parse_url
from protocol.errors import BadRequest, Conflict, TimedOut, Unavailable
from protocol.framing import decode_answer
from protocol.ids import BatchId, TaskId
from protocol.messages.cluster import Event, GetStatus, ListEvents, Status, Topic, Update, Watch
from protocol.messages.environment import ListEnvironments, OneEnvironment, OpenShell
from protocol.messages.hello import Welcome
from protocol.messages.node import ListNodes
from protocol.messages.stream import LogChunk, LogEnd, LogItem, OpenLogs, Source
from protocol.messages.task import (
    ListTasks,
    OneTask,
    Retried,
    RetryTask,
    SteerResult,
    SteerTasks,
    SubmitTask,
    Submitted,
    WaitTasks,
)
from protocol.methods import (
    ENVIRONMENT_LIST,
    ENVIRONMENT_SHELL,
    ENVIRONMENT_SHOW,
    EVENT_LIST,
    NODE_LIST,
    STATUS,
    TASK_EXPLAIN,
    TASK_KILL,
    TASK_LIST,
    TASK_LOGS,
    TASK_PAUSE,
    TASK_RESUME,
    TASK_RETRY,
    TASK_SHOW,
    TASK_SUBMIT,
    TASK_WAIT,
    WATCH,
    Method,
    P,
    R,
)
from protocol.models.environment import Environment
from protocol.models.node import Node
from protocol.models.target import Target, parse_target
from protocol.models.task import Explanation, Task, TaskSpec, TaskState
from protocol.shell import Shell
from protocol.units import parse_duration, parse_size

__all__ = [
    "Cluster",
    "Connection",
    "SubmitOptions",
    "TaskFilter",
    "Tasks",
    "connect",
    "parse_url",
]

#: Seconds a call may go on finding a host that was lost.
PATIENCE_S: Final = 60.0
#: Seconds one ``task.wait`` is held by the host: shorter than what middle boxes cut.
_HOLD_S: Final = 30.0
#: Names in one message; the table's limit of ``task.wait`` and of steering.
_MOST_NAMES: Final = 1000
_PAGE: Final = 200
#: ``task.show`` calls at once where tasks are asked one by one.
_AT_ONCE: Final = 32

_LOG_ITEMS: Final[Any] = LogItem

#: How tasks are named: one id, several, or what a submission gave.
Tasks = int | Iterable[int] | Submitted


class SubmitOptions(TypedDict, total=False):
    """What ``submit`` takes beside the command; as in TaskSpec and SubmitTask."""

    name: str
    env: Mapping[str, str]
    workdir: str
    cores: int
    #: Bytes, or text such as ``4G``.
    memory: int | str
    gpus: int
    labels: Mapping[str, str]
    priority: int
    backend: str
    grace_s: float
    #: Seconds, or text such as ``2h``.
    time_limit: float | str
    retries: int
    requeue_on_lost: bool
    #: Such as ``node1`` or ``node1:0:0,1``; one task for each.
    targets: Iterable[str | Target]
    array: int
    rows: Iterable[Mapping[str, str]]
    #: Tasks and batches that must complete first.
    after: Iterable[int]
    gang: bool
    #: Made at random if not given; give one to submit the same thing once across programs.
    request_id: str


class TaskFilter(TypedDict, total=False):
    """Which tasks to list; as in ListTasks."""

    states: Iterable[TaskState]
    batch: int
    node: str
    owner: str
    #: Stop after so many.
    most: int


def connect(
    url: str | None = None,
    token: str | None = None,
    *,
    context: str | None = None,
    agent: str = "",
    patience_s: float = PATIENCE_S,
) -> Cluster:
    """Name a cluster; connected by ``async with``.

    The host is, in this order: ``url``, the saved ``context`` of that name, ``KOHAKU_HOST``,
    the saved context in use. The token is ``token``, or what belongs to that host:
    ``KOHAKU_TOKEN``, or the context's own.

    Raises:
        Unavailable: No host is named anywhere.
        BadRequest, NotFound: The address or context makes no sense.
    """
    saved = _find_context(url, token, context)
    return Cluster(saved, agent=agent or "kohaku-client", patience_s=patience_s)


class Cluster:
    """A cluster, through its host. Reconnects by itself; made by ``connect``.

    A call that finds the connection lost dials again with growing pauses, for up to the
    cluster's patience, and is repeated if that is safe: reading is, and submitting, because
    of its request id. Anything else ends with Unavailable, which says that it is not known
    whether it happened.
    """

    def __init__(self, context: contexts.Context, *, agent: str, patience_s: float) -> None:
        self._context = context
        self._agent = agent
        self._patience_s = patience_s
        self._connection: Connection | None = None
        self._dialling = asyncio.Lock()
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._is_connected else "not connected"
        return f"<Cluster {self._context.url} {state}>"

    async def __aenter__(self) -> Cluster:
        """Connect, once: a host that is not there is told at once.

        Raises:
            Unavailable: It cannot be reached.
            KohakuError: It refused, such as Unauthenticated.
        """
        self._connection = await self._dial()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        reason: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """Where the host is."""
        return self._context.url

    @property
    def welcome(self) -> Welcome:
        """What the host said at the last hello: who one is, its version.

        Raises:
            Unavailable: Not connected yet.
        """
        if self._connection is None:
            raise Unavailable("not connected: use the cluster inside 'async with'")
        return self._connection.welcome

    async def close(self) -> None:
        """Close the connection. Watches and waits end with Unavailable."""
        self._closed = True
        if self._connection is not None:
            await self._connection.close()

    # -- Calls ------------------------------------------------------------------------

    async def call(self, method: Method[P, R], params: P, *, timeout_s: float = 30.0) -> R:
        """Call any method of the table.

        Raises:
            KohakuError: The host refused, or could not be reached for all of the patience.
        """
        patience = _Patience(self._patience_s)
        while True:
            connection = await self._connected(patience)
            try:
                return await connection.call(method, params, timeout_s)
            except Unavailable as reason:
                if connection.is_open or self._closed:
                    raise  # the host itself says that something is unavailable
                if not _may_repeat(method):
                    raise Unavailable(
                        f"the host was lost during {method.name}: "
                        "it is not known whether it happened",
                        hint="look at the cluster before you repeat it",
                    ) from reason
                await patience.pause(reason)

    async def call_raw(self, name: str, params: Any, *, timeout_s: float = 30.0) -> Any:
        """Call by name with plain values, and give plain values. Never repeated."""
        connection = await self._connected(_Patience(self._patience_s))
        return await connection.call_raw(name, params, timeout_s)

    # -- Submitting and reading -------------------------------------------------------

    async def submit(
        self, command: Sequence[str] | TaskSpec, **options: Unpack[SubmitOptions]
    ) -> Submitted:
        """Submit one task, or a batch by ``targets``, ``array`` or ``rows``.

        Answered once it is durable. With a whole TaskSpec as ``command``, only the options
        that say how many, and ``request_id``, may be given.

        Raises:
            BadRequest, NoFit, QuotaExceeded, Forbidden: The cluster does not take it.
        """
        return await self.call(TASK_SUBMIT, _make_submission(command, options))

    async def retry(
        self, task: int | None = None, *, batch: int | None = None, request_id: str = ""
    ) -> Retried:
        """Try a task again, or all of a batch that is lost or ended without completing.

        Lost ones get a new attempt; those that ended are made anew, under new ids.

        Raises:
            Conflict: There is nothing to try again.
            NotFound: There is no such task or batch.
        """
        return await self.call(
            TASK_RETRY,
            RetryTask(
                request_id=request_id or uuid.uuid4().hex,
                task=None if task is None else TaskId(task),
                batch=None if batch is None else BatchId(batch),
            ),
        )

    async def task(self, task: int) -> Task:
        """Give one task with its history.

        Raises:
            NotFound: There is none.
        """
        return (await self.call(TASK_SHOW, OneTask(TaskId(task)))).task

    async def explain(self, task: int) -> Explanation:
        """Say why a task is where it is, node by node."""
        return (await self.call(TASK_EXPLAIN, OneTask(TaskId(task)))).explanation

    async def tasks(self, **only: Unpack[TaskFilter]) -> AsyncGenerator[Task, None]:
        """Give tasks, newest first, a page at a time."""
        most, before = only.get("most"), None
        batch = only.get("batch")
        while most is None or most > 0:
            page = await self.call(
                TASK_LIST,
                ListTasks(
                    states=tuple(only.get("states", ())),
                    batch=None if batch is None else BatchId(batch),
                    node=only.get("node", ""),
                    owner=only.get("owner", ""),
                    before=before,
                    limit=_PAGE if most is None else min(most, _PAGE),
                ),
            )
            for task in page.tasks:
                yield task
            if not page.more or not page.tasks:
                return
            before = page.tasks[-1].id
            most = None if most is None else most - len(page.tasks)

    async def events(self, most: int = 100) -> list[Event]:
        """Give the newest lines of the cluster's diary, newest first."""
        found: list[Event] = []
        before: int | None = None
        while len(found) < most:
            limit = min(most - len(found), _PAGE)
            page = await self.call(EVENT_LIST, ListEvents(before=before, limit=limit))
            found += page.events
            if not page.more or not page.events:
                break
            before = page.events[-1].id
        return found

    async def nodes(self) -> tuple[Node, ...]:
        """Give all nodes, by name."""
        page = await self.call(NODE_LIST, ListNodes())
        found = page.nodes
        while page.more and page.nodes:
            page = await self.call(NODE_LIST, ListNodes(after=page.nodes[-1].name))
            found += page.nodes
        return found

    async def environments(self) -> tuple[Environment, ...]:
        """Give all environments, by name."""
        page = await self.call(ENVIRONMENT_LIST, ListEnvironments())
        found = page.environments
        while page.more and page.environments:
            after = page.environments[-1].name
            page = await self.call(ENVIRONMENT_LIST, ListEnvironments(after=after))
            found += page.environments
        return found

    async def environment(self, name: str) -> Environment:
        """Give one environment, with where its newest version is.

        Raises:
            NotFound: There is none.
        """
        return (await self.call(ENVIRONMENT_SHOW, OneEnvironment(name))).environment

    async def status(self) -> Status:
        """Give the cluster at a glance."""
        return await self.call(STATUS, GetStatus())

    # -- Waiting and steering ---------------------------------------------------------

    async def wait(
        self, tasks: Tasks = (), *, batch: int | None = None, timeout_s: float | None = None
    ) -> list[Task]:
        """Wait until tasks are over (final or lost) and give them, in their order.

        Raises:
            TimedOut: Some are not over in time; they go on.
            NotFound: There is no such task.
        """
        names, batch = _name_tasks(tasks, batch)
        try:
            async with asyncio.timeout(timeout_s):
                if batch is not None:
                    await self._wait_group(WaitTasks(batch=BatchId(batch), hold_s=_HOLD_S))
                for group in _groups(names, _MOST_NAMES):
                    await self._wait_group(WaitTasks(tasks=group, hold_s=_HOLD_S))
        except TimeoutError:
            raise TimedOut(
                f"not all tasks were over within {timeout_s:g} s",
                hint="they go on; wait again, or see why: kohaku task explain ID",
            ) from None
        return await self._gather(names, batch)

    async def kill(self, tasks: Tasks = (), *, batch: int | None = None) -> SteerResult:
        """End tasks: SIGTERM, their grace, SIGKILL. Answered when it is ordered."""
        return await self._steer(TASK_KILL, tasks, batch)

    async def pause(self, tasks: Tasks = (), *, batch: int | None = None) -> SteerResult:
        """Hold running tasks still."""
        return await self._steer(TASK_PAUSE, tasks, batch)

    async def resume(self, tasks: Tasks = (), *, batch: int | None = None) -> SteerResult:
        """Let paused tasks go on."""
        return await self._steer(TASK_RESUME, tasks, batch)

    # -- Streams ----------------------------------------------------------------------

    async def watch(
        self, topics: Iterable[Topic | str], *, batch: int | None = None, tasks: Iterable[int] = ()
    ) -> AsyncGenerator[Update, None]:
        """Give a snapshot, then what changes, for ever.

        After a lost connection it goes on where it was; if the host cannot tell what was
        missed, the next update has ``start`` set and a new snapshot follows.
        """
        question = Watch(
            topics=tuple(Topic(topic) for topic in topics),
            batch=None if batch is None else BatchId(batch),
            tasks=tuple(TaskId(task) for task in tasks),
        )
        patience = _Patience(self._patience_s)
        while True:
            connection = await self._connected(patience)
            try:
                async with connection.stream(WATCH, question) as updates:
                    async for update in updates:
                        if update.revision:
                            question = msgspec.structs.replace(question, since=update.revision)
                        patience.restore()
                        yield update
                reason = Unavailable("the host ended the watch")
            except Unavailable as lost:
                if connection.is_open or self._closed:
                    raise
                reason = lost
            await patience.pause(reason)

    async def logs(
        self,
        task: int,
        *,
        follow: bool = False,
        sources: Iterable[Source | str] = (Source.STDOUT, Source.STDERR),
        attempt: int | None = None,
        tail_lines: int = 0,
    ) -> AsyncGenerator[LogChunk | LogEnd, None]:
        """Give a task's output, and how it ended as the last item.

        With ``follow`` until the task ends. A cut connection is made again and goes on with
        the byte after the last one that came.
        """
        reader = _LogReader(
            OpenLogs(
                task=TaskId(task),
                attempt=attempt,
                sources=tuple(Source(source) for source in sources),
                tail_lines=tail_lines,
                follow=follow,
            )
        )
        patience = _Patience(self._patience_s)
        while True:
            try:
                async with aclosing(self._read_logs(reader, patience)) as items:
                    async for item in items:
                        patience.restore()
                        yield item
                        if isinstance(item, LogEnd):
                            return
                reason = Unavailable(f"the output of task {task} stopped short")
            except Unavailable as lost:
                # What cannot be read from the beginning is told at once; what was being read
                # is worth waiting for.
                if self._closed or (self._is_connected and not reader.began):
                    raise
                reason = lost
            await patience.pause(reason)

    @asynccontextmanager
    async def shell(
        self,
        environment: str,
        command: Sequence[str] = (),
        *,
        terminal: bool = False,
        columns: int = 80,
        rows: int = 24,
    ) -> AsyncIterator[Shell]:
        """Run a command in an environment, on the host machine; without one a shell.

        It ends with the block, and with a connection that breaks: it is not gone on with.

        Raises:
            NotFound, Conflict, Unavailable: It cannot be entered.
        """
        wanted = OpenShell(
            environment=environment,
            command=tuple(command),
            terminal=terminal,
            columns=columns,
            rows=rows,
        )
        ticket = await self.call(ENVIRONMENT_SHELL, wanted)
        connection = await self._connected(_Patience(self._patience_s))
        async with await connection.open_data(ticket.path, ticket.ticket) as data:
            yield Shell(data)

    # -- Inside -----------------------------------------------------------------------

    @property
    def _is_connected(self) -> bool:
        return self._connection is not None and self._connection.is_open

    async def _dial(self) -> Connection:
        saved = self._context
        connection = await Connection.dial(saved.url, token=saved.token, agent=self._agent)
        if saved.cluster and connection.welcome.cluster != saved.cluster:
            await connection.close()
            raise Conflict(
                f"{saved.url} is another cluster than the one saved as {saved.name!r}",
                hint=f"if that is right, log in again: kohaku login {saved.url}",
            )
        return connection

    async def _connected(self, patience: _Patience) -> Connection:
        """Give an open connection, dialling as long as the patience lasts."""
        while True:
            async with self._dialling:
                if self._closed:
                    raise Unavailable(f"the connection to {self.url} was closed here")
                if self._connection is not None and self._connection.is_open:
                    return self._connection
                try:
                    self._connection = await self._dial()
                except Unavailable as reason:
                    lost = reason
                else:
                    return self._connection
            await patience.pause(lost)

    async def _wait_group(self, question: WaitTasks) -> None:
        while not (await self.call(TASK_WAIT, question, timeout_s=_HOLD_S + 30)).done:
            pass

    async def _gather(self, names: tuple[TaskId, ...], batch: int | None) -> list[Task]:
        found: list[Task] = []
        if batch is not None:
            found = [task async for task in self.tasks(batch=batch)]
            found.sort(key=lambda task: task.index)
        for group in _groups(names, _AT_ONCE):
            found += await asyncio.gather(*(self.task(name) for name in group))
        return found

    async def _steer(
        self, method: Method[SteerTasks, SteerResult], tasks: Tasks, batch: int | None
    ) -> SteerResult:
        names, batch = _name_tasks(tasks, batch)
        questions = [SteerTasks(tasks=group) for group in _groups(names, _MOST_NAMES)]
        if batch is not None:
            questions = [SteerTasks(batch=BatchId(batch))]
        results = [await self.call(method, question) for question in questions]
        refused = tuple(refusal for result in results for refusal in result.refused)
        return SteerResult(sum(result.asked for result in results), refused)

    async def _read_logs(
        self, reader: _LogReader, patience: _Patience
    ) -> AsyncGenerator[LogChunk | LogEnd, None]:
        """Give what comes over one data connection, without what came before."""
        ticket = await self.call(TASK_LOGS, reader.question())
        connection = await self._connected(patience)
        async with await connection.open_data(ticket.path, ticket.ticket) as data:
            reader.began = True
            async for message in data:
                item = reader.take(message)
                if item is not None:
                    yield item


class _Patience:
    """How long one call goes on looking for the host."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._began_at: float | None = None
        self._paused_at = 0.0
        self._attempt = 0

    def restore(self) -> None:
        """Begin anew: something came through."""
        self._began_at, self._attempt = None, 0

    async def pause(self, reason: Unavailable) -> None:
        """Wait before the next try.

        Raises:
            Unavailable: The time is over; as ``reason``.
        """
        loop = asyncio.get_running_loop()
        if loop.time() - self._paused_at > LONGEST_S:
            self.restore()  # a quiet watch that held for long was no failure
        if self._began_at is None:
            self._began_at = loop.time()
        left_s = self._began_at + self._most_s - loop.time()
        if left_s <= 0:
            raise reason
        await asyncio.sleep(min(delay_s(self._attempt, random.random()), left_s))
        self._attempt += 1
        self._paused_at = loop.time()


class _LogReader:
    """Where reading one task's output stands, over however many data connections."""

    def __init__(self, question: OpenLogs) -> None:
        self._question = question
        #: Offset of the first byte that has not come, where any has.
        self._next: dict[Source, int] = {}
        #: A data connection has been opened.
        self.began = False

    def question(self) -> OpenLogs:
        """Ask for what has not come yet."""
        if not self._next:
            return self._question
        # An output of which nothing came had nothing, or its tail would have: all from its start.
        return msgspec.structs.replace(
            self._question,
            stdout_from=self._next.get(Source.STDOUT, 0),
            stderr_from=self._next.get(Source.STDERR, 0),
            tail_lines=0,
        )

    def take(self, message: bytes) -> LogChunk | LogEnd | None:
        """Read one message; None if all of it came before.

        Raises:
            Unavailable: The output was cut off on the way, and more can be had.
        """
        item = decode_log(message)
        if isinstance(item, LogEnd):
            if self._question.follow and item.error and item.error[0] == Unavailable.code:
                raise Unavailable(item.error[1])
            return item
        known = self._next.get(item.source, item.offset)
        repeated = known - item.offset
        if repeated > 0:
            item = LogChunk(item.source, known, item.data[repeated:])
        self._next[item.source] = max(known, item.offset + len(item.data))
        return item if item.data else None


def decode_log(message: bytes) -> LogChunk | LogEnd:
    """Read one message of a data connection for logs.

    Raises:
        Unsupported: It is none that this version knows.
    """
    item: LogChunk | LogEnd = decode_answer(msgspec.Raw(message), _LOG_ITEMS, "a log message")
    return item


def _may_repeat(method: Method[Any, Any]) -> bool:
    """Say whether a call that may have been carried out can be made again."""
    return method is TASK_SUBMIT or not method.audited


def _find_context(url: str | None, token: str | None, name: str | None) -> contexts.Context:
    in_environment = os.environ.get("KOHAKU_HOST", "")
    token_in_environment = os.environ.get("KOHAKU_TOKEN", "")
    if url is None and name is None and not in_environment:
        saved = contexts.current()
        if saved is None:
            known = [context.name for context in contexts.load().contexts]
            choose = f"choose a saved one with: kohaku context use {known[0]}, or " if known else ""
            raise Unavailable(
                "no host is chosen" if known else "no host is known",
                hint=f"{choose}log in with: kohaku login URL, or set KOHAKU_HOST and KOHAKU_TOKEN",
            )
        return msgspec.structs.replace(saved, token=token or token_in_environment or saved.token)
    if url is None and name is not None:
        saved = contexts.load().find(name)
        return saved if token is None else msgspec.structs.replace(saved, token=token)
    address = parse_url(url or in_environment)
    if token is None:
        token = token_in_environment or _saved_token(address)
    return contexts.Context("", address, token)


def _saved_token(address: str) -> str:
    """Give the token saved for this very address; empty if there is none."""
    tokens = (saved.token for saved in contexts.load().contexts if saved.url == address)
    return next(tokens, "")


def _make_submission(command: Sequence[str] | TaskSpec, options: SubmitOptions) -> SubmitTask:
    targets = options.get("targets", ())
    if isinstance(targets, str):
        targets = (targets,)
    return SubmitTask(
        request_id=options.get("request_id") or uuid.uuid4().hex,
        spec=_make_spec(command, options),
        targets=tuple(parse_target(t) if isinstance(t, str) else t for t in targets),
        array=options.get("array", 0),
        rows=tuple(dict(row) for row in options.get("rows", ())),
        after=tuple(map(TaskId, options.get("after", ()))),
        gang=options.get("gang", False),
    )


def _make_spec(command: Sequence[str] | TaskSpec, options: SubmitOptions) -> TaskSpec:
    if isinstance(command, TaskSpec):
        double = sorted(set(options) & {*TaskSpec.__struct_fields__, "time_limit"})
        if double:
            raise BadRequest(f"{', '.join(double)}: given beside a whole TaskSpec")
        return command
    if isinstance(command, str):
        raise BadRequest(
            "a command is a list of words, not one text",
            hint=f"for a shell line write ['sh', '-c', {command!r}]",
        )
    memory = options.get("memory", 0)
    time_limit = options.get("time_limit", 0.0)
    return TaskSpec(
        command=tuple(command),
        name=options.get("name", ""),
        env=dict(options.get("env", {})),
        workdir=options.get("workdir", ""),
        cores=options.get("cores", 1),
        memory=parse_size(memory) if isinstance(memory, str) else memory,
        gpus=options.get("gpus", 0),
        labels=dict(options.get("labels", {})),
        priority=options.get("priority", 0),
        backend=options.get("backend", ""),
        grace_s=options.get("grace_s", 10.0),
        time_limit_s=parse_duration(time_limit) if isinstance(time_limit, str) else time_limit,
        retries=options.get("retries", 0),
        requeue_on_lost=options.get("requeue_on_lost", False),
    )


def _name_tasks(tasks: Tasks, batch: int | None) -> tuple[tuple[TaskId, ...], int | None]:
    """Give names and batch of what is meant.

    Raises:
        BadRequest: Nothing is named, or both ways are used.
    """
    if isinstance(tasks, Submitted):
        if batch is None:
            return (), tasks.batch
        tasks = tuple(tasks.ids())
    names = (TaskId(tasks),) if isinstance(tasks, int) else tuple(map(TaskId, tasks))
    if bool(names) == (batch is not None):
        raise BadRequest("name either tasks or one batch")
    return names, batch


def _groups(names: tuple[TaskId, ...], size: int) -> list[tuple[TaskId, ...]]:
    return [names[first : first + size] for first in range(0, len(names), size)]
