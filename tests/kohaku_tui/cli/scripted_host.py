"""A host that says what a test told it to, over the real wire."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from kohaku_daemon.wire import ItemSink, Served
from protocol.errors import KohakuError, NotFound, Unauthenticated
from protocol.ids import BatchId, TaskId, UserName
from protocol.messages.cluster import Status, Update, WatchEnded
from protocol.messages.hello import Hello, Identity, Welcome
from protocol.messages.stream import LogChunk, LogEnd, Ticket
from protocol.messages.task import OneTask, SteerResult, TaskResult, WaitResult
from protocol.methods import (
    STATUS,
    TASK_KILL,
    TASK_LOGS,
    TASK_PAUSE,
    TASK_RESUME,
    TASK_SHOW,
    TASK_WAIT,
    WHOAMI,
    Method,
    StreamingMethod,
)
from protocol.models.access import Role
from protocol.models.task import Task, TaskSpec, TaskState

TOKEN = "kht_scripted"
LOGS_PATH = "/v1/stream/logs"

Answer = msgspec.Struct | KohakuError | Callable[[Any], msgspec.Struct | Awaitable[msgspec.Struct]]


class ScriptedHost:
    """Answers by script, remembers what was asked. Runs on a thread of its own."""

    def __init__(self) -> None:
        self.url = ""
        #: Every call but hello, as its method's name and its parameters.
        self.calls: list[tuple[str, Any]] = []
        #: What ``task.show`` gives, by id.
        self.tasks: dict[int, Task] = {}
        #: Sent to whoever watches; the watch stays open then.
        self.updates: list[Update] = []
        #: Sent to whoever reads logs; without a LogEnd the reading stays open.
        self.logs: list[LogChunk | LogEnd] = []
        #: Set when somebody has been sent all updates or logs.
        self.sent_all = threading.Event()
        self._answers: dict[str, Answer] = {}
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def answer(self, method: Method[Any, Any], answer: Answer) -> None:
        """Say what a method gives: a result, an error, or what a function makes of the call."""
        self._answers[method.name] = answer

    def asked(self, method: Method[Any, Any]) -> list[Any]:
        """Give the parameters of every call of a method."""
        return [params for name, params in self.calls if name == method.name]

    def answer_steering(self, *, asked: int, refused: tuple[tuple[TaskId, str], ...] = ()) -> None:
        """Say what every kill, pause and resume gives."""
        for method in (TASK_KILL, TASK_PAUSE, TASK_RESUME):
            self.answer(method, SteerResult(asked, refused))

    @staticmethod
    def show(task: Task) -> TaskResult:
        """Give an answer of ``task.show``."""
        return TaskResult(task)

    async def hold(self, params: object) -> msgspec.Struct:
        """Never answer; tell the test that somebody waits."""
        self.sent_all.set()
        await asyncio.Event().wait()
        raise AssertionError(params)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    # -- Responder --------------------------------------------------------------------

    async def hello(self, served: Served, params: Hello) -> Welcome:
        if params.token != TOKEN:
            raise Unauthenticated("the host does not know this token", hint="log in again")
        return Welcome(version=1, cluster="77", role=Role.ADMIN)

    async def call(
        self, served: Served, method: Method[Any, Any], params: msgspec.Struct
    ) -> msgspec.Struct:
        self.calls.append((method.name, params))
        answer = self._answers.get(method.name)
        if answer is None:
            answer = self._usual_answer(method)
        if isinstance(answer, KohakuError):
            raise answer
        if isinstance(answer, msgspec.Struct):
            return answer
        made = answer(params)
        return made if isinstance(made, msgspec.Struct) else await made

    async def stream(
        self,
        served: Served,
        method: StreamingMethod[Any, Any, Any],
        params: msgspec.Struct,
        sink: ItemSink,
    ) -> msgspec.Struct:
        self.calls.append((method.name, params))
        for update in self.updates:
            await sink.send(update)
        self.sent_all.set()
        await asyncio.Event().wait()
        return WatchEnded()

    def _usual_answer(self, method: Method[Any, Any]) -> Answer:
        usual: dict[str, Answer] = {
            WHOAMI.name: Identity(UserName("ada"), Role.ADMIN, "kht_sc", "77"),
            STATUS.name: Status(cluster="77", version="0", started_at=0.0, nodes={"online": 1}),
            TASK_SHOW.name: self._show,
            TASK_WAIT.name: WaitResult(done=True),
            TASK_LOGS.name: Ticket("t", LOGS_PATH, 0.0),
        }
        return usual[method.name]

    def _show(self, params: OneTask) -> TaskResult:
        if params.task not in self.tasks:
            raise NotFound(f"there is no task {params.task}")
        return TaskResult(self.tasks[params.task])

    # -- The thread -------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/ws", self._serve_client)
        app.router.add_get(LOGS_PATH, self._serve_logs)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._ready.set()
        await self._stopping.wait()
        await runner.cleanup()

    async def _serve_client(self, request: web.Request) -> web.StreamResponse:
        return await Served(request, self).run()

    async def _serve_logs(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for item in self.logs:
            await socket.send_bytes(msgspec.msgpack.encode(item))
        self.sent_all.set()
        if not self.logs or not isinstance(self.logs[-1], LogEnd):
            await socket.receive()
        await socket.close()
        return socket


def a_task(number: int, **changes: Any) -> Task:
    """Make a running task; ``changes`` are fields of it."""
    task = Task(
        id=TaskId(number),
        batch=BatchId(number),
        owner=UserName("ada"),
        state=TaskState.RUNNING,
        spec=TaskSpec(command=("true",)),
        attempt=1,
        started_at=1.0,
    )
    if changes.get("started_at") == 0.0:
        changes.setdefault("attempt", 0)
    return msgspec.structs.replace(task, **changes)
