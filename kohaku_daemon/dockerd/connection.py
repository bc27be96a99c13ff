"""Asking a Docker engine over its socket.

Knows: the API's version, timeouts, that every answer is let go of, which errors mean that nothing
is known of what was asked.
Does not know: what is asked.

aiodocker's own methods read whole answers into memory, leave a connection acquired when a reader
breaks off, and time out what may take long; its raw query does what all of them are made of.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import aiohttp

from kohaku_daemon.dockerd.errors import EngineAbsent, EngineAway, EngineRefused

if TYPE_CHECKING:
    import aiodocker

Body: TypeAlias = Mapping[str, Any] | bytes | AsyncIterator[bytes] | None
Params: TypeAlias = Mapping[str, str | int | bool]

#: What aiodocker says instead of a status of HTTP when there was no answer.
_NO_ANSWER: Final = 900
#: Seconds a question may take: the engine starts containers one after the other, and a machine
#: may be busy.
_ASK_S: Final = 120.0
#: Seconds until the engine takes a connection.
_CONNECT_S: Final = 10.0
#: Bytes of a refusal that are read, and what is told of it.
_LONGEST_REFUSAL: Final = 4096
_MESSAGE: Final = re.compile(r'"message":\s*"((?:[^"\\]|\\.)*)"')
#: What to do about an engine that is away.
_LOOK: Final = "is it running? see: systemctl status docker"
#: The oldest version of the API we speak: that of Docker 20.10.
_OLDEST: Final = (1, 41)


class Dockerd:
    """The engine behind one socket. ``open`` it first; ``close`` it last."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._docker: aiodocker.Docker | None = None
        #: Of the engine's software; empty before ``open``.
        self.version = ""

    def __repr__(self) -> str:
        return f"Dockerd({str(self._socket)!r}, version={self.version!r})"

    @property
    def socket(self) -> Path:
        """Where it is."""
        return self._socket

    async def open(self) -> None:
        """Reach the engine. Again after it was away: that does no harm.

        Raises:
            EngineAbsent: There is no socket, it is not ours to use, or the engine is too old.
            EngineAway: There is a socket, and nobody answers.
        """
        if not self._socket.exists():
            raise EngineAbsent(f"there is no Docker engine at {self._socket}")
        if self._docker is None:
            # Where there is no engine, no daemon gives 2 MB for this.
            import aiodocker

            # Without a limit: aiohttp's own would let 100 streams block everything else.
            connector = aiohttp.UnixConnector(str(self._socket), limit=0)
            try:
                docker = aiodocker.Docker(url="unix://localhost", connector=connector)
            except BaseException:  # a cancelled caller's socket is closed as well
                await connector.close()
                raise
            self._docker = docker
            self._connector = connector
        try:
            told = await self.ask("version", timeout_s=_CONNECT_S)
        except EngineAway as error:
            if isinstance(error.__cause__, PermissionError):
                raise EngineAbsent(
                    f"this user may not use the Docker engine at {self._socket}",
                    hint="run as root, or as a member of the group docker",
                ) from error
            raise
        self.version = str(told.get("Version", ""))
        spoken = tuple(int(part) for part in str(told.get("ApiVersion", "0.0")).split("."))
        if spoken < _OLDEST:
            raise EngineAbsent(
                f"the Docker engine at {self._socket} is {self.version}, which is too old",
                hint="install Docker 20.10 or newer",
            )

    async def accepts(self, timeout_s: float) -> bool:
        """Say whether it takes a new connection, and answers.

        One that is stopping first closes its door, then ends its containers, and all the while
        answers those who are in (dockerd 20.10).
        """
        fresh = Dockerd(self._socket)
        try:
            async with asyncio.timeout(timeout_s):
                await fresh.open()
        except (EngineAbsent, EngineAway, EngineRefused, TimeoutError):
            return False
        finally:
            await fresh.close()
        return True

    async def close(self) -> None:
        """Let go of it."""
        docker, self._docker = self._docker, None
        if docker is not None:
            try:
                await docker.close()
            finally:  # also when it was cancelled: nobody has the connections but we
                await self._connector.close()

    async def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        params: Params | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = _ASK_S,
    ) -> Any:
        """Ask one question; give what the JSON of the answer says, None if it is empty.

        Raises:
            EngineRefused: The answer is no.
            EngineAway: There is no answer.
        """
        data = None if body is None else json.dumps(body).encode()
        async with (
            self.stream(
                path, method, params=params, body=data, headers=headers, timeout_s=timeout_s
            ) as response,
            _known(timeout_s),
        ):
            text = await response.read()
        return json.loads(text) if text.strip() else None

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        method: str = "GET",
        *,
        params: Params | None = None,
        body: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask, and give the answer to be read piece by piece: wrap that in ``reading``.

        ``timeout_s`` is for the beginning of the answer; None for what may take any time.

        Raises:
            EngineRefused: The answer is no.
            EngineAway: There is no answer.
        """
        if self._docker is None:
            raise EngineAway(f"the Docker engine at {self._socket} has not been reached yet")
        kind = "application/json" if isinstance(body, bytes) else "application/x-tar"
        async with _known(timeout_s):
            response = await self._docker._do_query(
                path,
                method,
                params=dict(params or {}),
                data=body,
                headers={"Content-Type": kind, **(headers or {})},
                timeout=aiohttp.ClientTimeout(sock_connect=_CONNECT_S),
                chunked=None if body is None or isinstance(body, bytes) else True,
            )
        try:
            yield response
        finally:
            response.close()

    @asynccontextmanager
    async def converse(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Begin a conversation over one raw connection, as ``attach`` and ``exec`` are.

        What is written reaches the program; ``write_eof`` ends that half alone. What is read is
        the terminal's own bytes, or without a terminal frames (``read_frame``). Not by aiohttp:
        its streams end with both halves at once.

        Raises:
            EngineRefused: The answer is no.
            EngineAway: There is no answer.
        """
        if self._docker is None:
            raise EngineAway(f"the Docker engine at {self._socket} has not been reached yet")
        data = json.dumps(body).encode()
        async with _known(_CONNECT_S):
            reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            async with _known(_ASK_S):
                head = (
                    f"POST /{self._docker.api_version}/{path} HTTP/1.1\r\nHost: docker\r\n"
                    "Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(data)}\r\n\r\n"
                )
                writer.write(head.encode() + data)
                await writer.drain()
                await _read_upgrade(reader)
            yield reader, writer
        finally:
            writer.close()


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes] | None:
    """Read what was said next without a terminal: 1 or 2 for which output, and the bytes.

    None at the end. A frame has a header of 8 bytes: the output, three zeros, and the length
    (Docker's API, "Attach to a container").

    Raises:
        EngineAway: The connection broke.
    """
    async with reading():
        try:
            head = await reader.readexactly(8)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise ConnectionResetError("it ended within a frame") from error
            return None
        return head[0], await reader.readexactly(int.from_bytes(head[4:]))


async def _read_upgrade(reader: asyncio.StreamReader) -> None:
    """Read the head of the answer; what follows is the conversation if it says so."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = int(head.split(maxsplit=2)[1])
    if status in (101, 200):
        return
    text = (await reader.read(_LONGEST_REFUSAL)).decode(errors="replace")
    found = _MESSAGE.search(text)
    raise EngineRefused(status, found[1] if found else f"it answers {status}")


@asynccontextmanager
async def _known(timeout_s: float | None) -> AsyncIterator[None]:
    """Turn what aiodocker and aiohttp raise into our errors."""
    from aiodocker.exceptions import DockerError  # ``open`` has loaded it

    try:
        async with asyncio.timeout(timeout_s):
            yield
    except DockerError as error:
        if error.status == _NO_ANSWER:
            cause = error.__context__
            why = cause.os_error if isinstance(cause, aiohttp.ClientConnectorError) else cause
            raise EngineAway("the Docker engine does not answer", hint=_LOOK) from why
        raise EngineRefused(error.status, error.message.strip()) from error
    except TimeoutError as error:
        # aiohttp has a limit of its own for the connection.
        within = "" if timeout_s is None else f" in {timeout_s:g} s"
        raise EngineAway(f"the Docker engine did not answer{within}") from error
    except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
        raise EngineAway("the connection to the Docker engine broke") from error


@asynccontextmanager
async def reading() -> AsyncIterator[None]:
    """Wrap the reading of a streamed answer: what breaks off is told as EngineAway."""
    async with _known(None):
        yield
