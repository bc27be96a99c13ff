"""Running commands in environments, for people who are connected to the host.

Knows: how what is typed and what is said travel between a data connection and the engine, each
no faster than the other side takes it; that a command ends with its reader.
Does not know: which container that is, who may enter it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

from kohaku_daemon.dockerd.connection import Dockerd, read_frame, reading
from kohaku_daemon.dockerd.errors import EngineRefused
from kohaku_daemon.host.environments import Workshop
from kohaku_daemon.host.guard import vouch
from kohaku_daemon.host.streams import Streams, next_message
from kohaku_daemon.supervise import spawn
from protocol.errors import KohakuError, Unavailable
from protocol.framing import MAX_CHUNK, decode_value
from protocol.ids import UserName
from protocol.messages.environment import (
    OpenShell,
    ShellEnd,
    ShellInput,
    ShellOutput,
    ShellSaid,
    ShellSent,
    ShellSize,
)
from protocol.messages.stream import Ticket

_log = logging.getLogger(__name__)

_PATH: Final = "/v1/stream/shell"
#: What an image has that was made to be worked in; else its plain shell.
_SHELL: Final = ("sh", "-c", "command -v bash >/dev/null && exec bash; exec sh")
#: The engine keeps these keys for itself, and the first of them back until the next is typed:
#: five that nobody types in this order (Docker's own are Ctrl-P Ctrl-Q).
_DETACH_KEYS: Final = "ctrl-@,ctrl-^,ctrl-@,ctrl-^,ctrl-@"
_STDERR: Final = 2
#: Seconds in which neither side has said anything: a forgotten terminal.
_IDLE_S: Final = 12 * 3600.0
#: Seconds the engine may need to note that a command has ended, or has begun.
_SETTLE_S: Final = 10.0
_STEP_S: Final = 0.01
#: Seconds between SIGHUP and SIGKILL for a command whose reader has gone.
_GRACE_S: Final = 3.0
#: What a shell shows for a command that it cannot run (POSIX, 2.8.2).
_NOT_RUN: Final = 126

_SENT: Final[Any] = ShellSent
_encode: Final = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class _Execution:
    """One command that the engine runs."""

    dockerd: Dockerd
    container: str
    id: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    terminal: bool
    #: It has ended by itself.
    is_over: bool = False

    async def read(self) -> ShellOutput | None:
        """Give what it says next; None at its end."""
        if not self.terminal:
            frame = await read_frame(self.reader)
            return None if frame is None else ShellOutput(frame[1], frame[0] == _STDERR)
        async with reading():
            data = await self.reader.read(MAX_CHUNK)
        return ShellOutput(data) if data else None

    async def write(self, data: bytes) -> None:
        """Type something; nothing is the end of all input."""
        with suppress(ConnectionError):  # it does not read any more, which is its affair
            if data:
                self.writer.write(data)
                await self.writer.drain()
            elif self.writer.can_write_eof():
                self.writer.write_eof()

    async def resize(self, columns: int, rows: int) -> None:
        """Tell it the size of its terminal, as soon as it has one."""
        params = {"h": rows, "w": columns}
        deadline = asyncio.get_running_loop().time() + _SETTLE_S
        while not self.is_over:
            try:
                await self.dockerd.ask(f"exec/{self.id}/resize", "POST", params=params)
            except EngineRefused as error:
                # Until the program has begun there is nothing to be resized, and after it.
                if asyncio.get_running_loop().time() > deadline:
                    _log.debug("a terminal keeps its size: %s", error)
                    return
                await asyncio.sleep(_STEP_S)
                continue
            return

    async def code(self) -> int:
        """Give its exit code, once its output has ended.

        Raises:
            Unavailable: The engine does not say.
        """
        deadline = asyncio.get_running_loop().time() + _SETTLE_S
        while True:
            found = await self._inspect()
            if not found["Running"] and found["ExitCode"] is not None:
                self.is_over = True
                return int(found["ExitCode"])
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("the command closed its output, and goes on without it")
            await asyncio.sleep(_STEP_S)

    async def end(self) -> None:
        """End it, as a terminal does that is closed: its reader has gone."""
        for number in (signal.SIGHUP, signal.SIGKILL):
            deadline = asyncio.get_running_loop().time() + _GRACE_S
            found = await self._inspect()
            if not found["Running"]:
                return
            self._signal(found["Pid"], number)
            while asyncio.get_running_loop().time() < deadline:
                if not (await self._inspect())["Running"]:
                    return
                await asyncio.sleep(5 * _STEP_S)
        _log.warning("a command in container %s goes on without its reader", self.container[:12])

    def _signal(self, pid: int, number: int) -> None:
        """Signal the process that the engine began, and those of its group.

        It leads a session of its own (runc), and the number is the host machine's.
        """
        try:
            if pid <= 1 or self.container not in Path(f"/proc/{pid}/cgroup").read_text():
                return
            os.killpg(pid, number)
        except (FileNotFoundError, ProcessLookupError):
            return
        except PermissionError as error:
            _log.warning("a command cannot be ended by this user: %s", error)

    async def _inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.dockerd.ask(f"exec/{self.id}/json")
        return found


class Shells:
    """All commands that people run in environments."""

    def __init__(self, streams: Streams, workshop: Workshop) -> None:
        self._streams = streams
        self._workshop = workshop

    def ticket(self, wanted: OpenShell, user: UserName) -> Ticket:
        """Make a ticket to run a command; whoever gets it has been let in already.

        Raises:
            Unavailable: Too many tickets wait to be used.
        """
        return self._streams.ticket(wanted, _PATH, user)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/stream/shell``: one ticket, one command.

        Raises:
            Unauthenticated: The ticket is unknown, used, or too old.
        """
        wanted = self._streams.punch(request, OpenShell, "environment.shell")
        vouch(request.transport)
        async with self._streams.accept(request, autoping=False) as socket:
            try:
                await _say(socket, await self._run(socket, wanted))
            except ConnectionError as error:
                _log.debug("somebody left an environment: %s", error)
        return socket

    async def _run(self, socket: web.WebSocketResponse, wanted: OpenShell) -> ShellEnd | None:
        """Run a command to its end, and give that; None if its reader goes before."""
        try:
            dockerd, container = await self._workshop.enter(wanted.environment)
            async with _begin(dockerd, container, wanted) as execution:
                return await _pass_on(socket, execution, wanted)
        except KohakuError as error:
            return _broken_off(error)
        except TimeoutError:
            quiet = Unavailable(f"nothing was typed or said for {_IDLE_S / 3600:.0f} h")
            return _broken_off(quiet)


@asynccontextmanager
async def _begin(dockerd: Dockerd, container: str, wanted: OpenShell) -> AsyncIterator[_Execution]:
    """Have the engine run a command, and end it if it has not ended at the end of the block."""
    made = await dockerd.ask(
        f"containers/{container}/exec",
        "POST",
        body={
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "Tty": wanted.terminal,
            "DetachKeys": _DETACH_KEYS,
            "Cmd": list(wanted.command or _SHELL),
            # Whoever prepares an environment installs things, whoever its tasks run as.
            "User": "0",
        },
    )
    begin = {"Detach": False, "Tty": wanted.terminal}
    async with dockerd.converse(f"exec/{made['Id']}/start", begin) as (reader, writer):
        execution = _Execution(dockerd, container, made["Id"], reader, writer, wanted.terminal)
        try:
            yield execution
        finally:
            if not execution.is_over:
                # Not cancelled with the connection, whose end is the reason for it.
                spawn(_end(execution), name=f"end a command in {container[:12]}")


async def _end(execution: _Execution) -> None:
    try:
        await execution.end()
    except KohakuError as error:
        _log.warning("a command may go on without its reader: %s", error)


async def _pass_on(
    socket: web.WebSocketResponse, execution: _Execution, wanted: OpenShell
) -> ShellEnd | None:
    """Pass on what both sides say until the command has ended, or its reader has gone."""
    async with asyncio.timeout(_IDLE_S) as idle:
        saying = spawn(_pass_output(socket, execution, idle), name="output of a command")
        typing = spawn(_pass_input(socket, execution, wanted, idle), name="input of a command")
        try:
            await asyncio.wait({saying, typing}, return_when=asyncio.FIRST_COMPLETED)
            return saying.result() if saying.done() else None
        finally:
            for job in (saying, typing):
                job.cancel()
            await asyncio.gather(saying, typing, return_exceptions=True)


async def _pass_output(
    socket: web.WebSocketResponse, execution: _Execution, idle: asyncio.Timeout
) -> ShellEnd | None:
    """Pass on what a command says, and give its end; None if nobody reads it any more."""
    try:
        while (said := await execution.read()) is not None:
            _keep_awake(idle)
            for start in range(0, len(said.data), MAX_CHUNK):
                part = said.data[start : start + MAX_CHUNK]
                await _say(socket, ShellOutput(part, said.is_error))
        return ShellEnd(await execution.code())
    except ConnectionError as error:
        _log.debug("somebody left a command: %s", error)
        return None
    except KohakuError as error:
        return _broken_off(error)


async def _pass_input(
    socket: web.WebSocketResponse,
    execution: _Execution,
    wanted: OpenShell,
    idle: asyncio.Timeout,
) -> None:
    """Pass on what is typed, until whoever types has gone."""
    try:
        if wanted.terminal:
            await execution.resize(wanted.columns, wanted.rows)
        while (message := await next_message(socket)) is not None:
            _keep_awake(idle)
            match decode_value(message, _SENT, "a message of a shell"):
                case ShellInput(data):
                    await execution.write(data)
                case ShellSize(columns, rows) if wanted.terminal:
                    await execution.resize(columns, rows)
                case _:
                    pass
    except KohakuError as error:
        # The engine has gone, which its output tells; or a client that makes no sense.
        _log.debug("the input of a command breaks off: %s", error)


def _keep_awake(idle: asyncio.Timeout) -> None:
    if not idle.expired():
        idle.reschedule(asyncio.get_running_loop().time() + _IDLE_S)


def _broken_off(error: KohakuError) -> ShellEnd:
    return ShellEnd(_NOT_RUN, (error.code, error.message, error.hint))


async def _say(socket: web.WebSocketResponse, said: ShellSaid | None) -> None:
    if said is not None:
        await socket.send_bytes(_encode(said))
