"""Images of an engine: as streams of bytes, by name and by digest, and out of registries.

Knows: the requests, how far a pull is, what an engine's words mean.
Does not know: environments and tasks, when an image is wanted or not.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import aiohttp

from kohaku_daemon.dockerd.connection import Dockerd, reading
from kohaku_daemon.dockerd.errors import EngineAway, EngineRefused, NoSuchImage
from kohaku_daemon.supervise import spawn
from protocol.models.environment import Credential

#: Bytes of a part of what is saved.
_PART: Final = 1024 * 1024
#: Seconds a registry may take to say what a reference means; the engine asks it.
_RESOLVE_S: Final = 60.0
#: Longest line of an engine that tells how far it is: one of these is some hundred bytes.
_LONGEST_LINE: Final = 1024 * 1024


class EngineImages:
    """The images of one engine."""

    def __init__(self, dockerd: Dockerd) -> None:
        self._dockerd = dockerd

    async def inspect(self, name: str) -> dict[str, Any]:
        """Give what the engine knows of an image, named by id or reference.

        Raises:
            NoSuchImage: It is not on this machine.
            EngineRefused, EngineAway: As ``Dockerd.ask``.
        """
        try:
            found: dict[str, Any] = await self._dockerd.ask(f"images/{name}/json")
        except EngineRefused as error:
            if error.status == 404:
                raise NoSuchImage(f"there is no image {name} on this machine") from error
            raise
        return found

    async def find(self, name: str) -> str:
        """Give the id of an image; empty if it is not on this machine."""
        try:
            return str((await self.inspect(name))["Id"])
        except NoSuchImage:
            return ""

    async def load(self, parts: AsyncIterator[bytes]) -> None:
        """Take images from what ``save`` gave. If ``parts`` fails, none comes of it.

        Raises:
            EngineRefused: This is no image, or there is no room for it.
            EngineAway: The engine went away; what it took is not known.
            Exception: What ``parts`` raised.
        """
        async with _Body(parts) as body:
            try:
                async with self._dockerd.stream(
                    "images/load", "POST", params={"quiet": 1}, body=body.sent()
                ) as response:
                    async for line in _lines(response):
                        _raise_told(line)
            except (EngineAway, EngineRefused):
                # The engine only sees that the request breaks off, and aiohttp wraps what broke it.
                if body.failure is not None:
                    raise body.failure from None
                raise

    async def save(self, name: str) -> AsyncGenerator[bytes]:
        """Give an image as ``docker save`` writes it, in parts of at most 1 MiB.

        Named by its id it carries no name into the engine that loads it.

        Raises:
            NoSuchImage: It is not on this machine.
            EngineRefused, EngineAway: As ``Dockerd.ask``; also in the middle.
        """
        try:
            async with self._dockerd.stream(f"images/{name}/get") as response, reading():
                async for part in response.content.iter_chunked(_PART):
                    yield part
        except EngineRefused as error:
            # 20.10 says 500 here.
            if error.status == 404 or "no such image" in error.message.lower():
                raise NoSuchImage(f"there is no image {name} on this machine") from error
            raise

    async def tag(self, image: str, repository: str, tag: str) -> None:
        """Give an image another name."""
        params = {"repo": repository, "tag": tag}
        await self._dockerd.ask(f"images/{image}/tag", "POST", params=params)

    async def remove(self, name: str) -> bool:
        """Remove one name of an image, and the image with its last; say whether it was done.

        Not done is it where a container uses the image, whether or not that runs. What is not
        there is removed.
        """
        try:
            await self._dockerd.ask(f"images/{name}", "DELETE")
        except EngineRefused as error:
            if error.status == 409:
                return False
            if error.status != 404:
                raise
        return True

    async def resolve(self, reference: str, credential: Credential | None = None) -> str:
        """Ask the registry for the digest that a reference stands for now, ``sha256:...``.

        Raises:
            EngineRefused: The registry refuses, does not know it, or cannot be reached.
            EngineAway: The engine does not answer.
        """
        told = await self._dockerd.ask(
            f"distribution/{reference}/json",
            headers=_whom(credential),
            timeout_s=_RESOLVE_S,
        )
        return str(told["Descriptor"]["digest"])

    async def pull(
        self, reference: str, credential: Credential | None = None
    ) -> AsyncGenerator[float]:
        """Pull an image, ``NAME@sha256:...`` or ``NAME:TAG``; give how far it is, 0 to 1.

        Raises:
            EngineRefused: As the registry or the engine said it.
            EngineAway: One of both went away.
        """
        layers = _Layers()
        async with (
            self._dockerd.stream(
                "images/create", "POST", params={"fromImage": reference}, headers=_whom(credential)
            ) as response,
            aclosing(_lines(response)) as lines,
        ):
            async for line in lines:
                _raise_told(line)
                layers.take(line)
                yield layers.share


class _Body:
    """What is sent, taken from its source by a job of our own.

    aiohttp sends a body in a job of its own, which it neither waits for nor always ends when the
    request is over: a source that is still being read there could not be closed here.
    """

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self._parts = parts
        self._queue = asyncio.Queue[bytes | None](1)
        self._job: asyncio.Task[None] | None = None
        #: What went wrong with the source: that is lost on its way through aiohttp.
        self.failure: Exception | None = None

    async def __aenter__(self) -> _Body:
        self._job = spawn(self._take(), name="image for the engine")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._job is not None
        self._job.cancel()
        await asyncio.wait({self._job})
        # Whoever still waits for more must not take this for the end.
        self.failure = self.failure or ConnectionAbortedError("it is not sent any more")
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    async def sent(self) -> AsyncGenerator[bytes]:
        while (part := await self._queue.get()) is not None:
            yield part
        if self.failure is not None:
            raise self.failure

    async def _take(self) -> None:
        try:
            async for part in self._parts:
                await self._queue.put(part)
        except Exception as error:  # it is raised to whoever called
            self.failure = error
        await self._queue.put(None)


class _Layers:
    """How far the layers of a pull are, of those that were named so far."""

    #: Of a layer's time, the share of its download; extracting it is the rest.
    _DOWNLOAD: Final = 0.5

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        #: It never goes back, though more layers become known.
        self.share = 0.0

    def take(self, line: dict[str, Any]) -> None:
        layer, status = str(line.get("id", "")), str(line.get("status", ""))
        detail = line.get("progressDetail") or {}
        current, total = detail.get("current", 0), detail.get("total", 0)
        part = min(1.0, current / total) if total > 0 else 0.0
        match status:
            case "Pulling fs layer" | "Waiting":
                share = 0.0
            case "Downloading":
                share = part * self._DOWNLOAD
            case "Verifying Checksum" | "Download complete":
                share = self._DOWNLOAD
            case "Extracting":
                share = self._DOWNLOAD + part * (1 - self._DOWNLOAD)
            case "Pull complete" | "Already exists":
                share = 1.0
            case _:
                return  # of the whole, such as "Digest: ..."
        # Lines of one layer may come out of order.
        self._shares[layer] = max(share, self._shares.get(layer, 0.0))
        self.share = max(self.share, sum(self._shares.values()) / len(self._shares))


async def _lines(response: aiohttp.ClientResponse) -> AsyncGenerator[dict[str, Any]]:
    """Give what an engine tells of a work, an object a line."""
    rest = b""
    async with reading():
        async for part in response.content.iter_any():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.strip():
                    yield json.loads(line)
            if len(rest) > _LONGEST_LINE:
                raise EngineRefused(500, "the Docker engine answers in lines without an end")
    if rest.strip():
        yield json.loads(rest)


def _raise_told(line: dict[str, Any]) -> None:
    """Raise what an engine tells after it has begun to answer with 200."""
    if "error" in line:
        raise EngineRefused(500, str(line["error"]).strip())


def _whom(credential: Credential | None) -> dict[str, str]:
    """Make the header that says whom to be to a registry (Docker Engine API, Authentication)."""
    if credential is None:
        return {}
    told = json.dumps({"username": credential.username, "password": credential.password})
    return {"X-Registry-Auth": base64.urlsafe_b64encode(told.encode()).decode()}
