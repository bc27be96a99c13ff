"""Packed environments for tests: made of any bytes, and of images as an engine saves them.

Knows: how a file is packed, how one is damaged. Does not know: who fetches it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from kohaku_daemon.packing.pieces import PIECE, list_name, pack_name
from kohaku_daemon.packing.writer import PackWriter
from protocol.models.environment import Version


async def pack(folder: Path, data: bytes, image: str = "sha256:0") -> Version:
    """Pack bytes into a folder."""
    async with PackWriter(folder) as writer:
        for start in range(0, len(data), 2**20):
            await writer.write(data[start : start + 2**20])
        packed = await writer.finish()
    return Version(digest=packed.digest, size=packed.size, pieces=packed.pieces, image=image)


async def pack_noise(folder: Path, pieces: int) -> Version:
    """Pack bytes that do not compress: so many pieces and a bit."""
    return await pack(folder, os.urandom(pieces * PIECE + 1000))


async def pack_image(folder: Path, saved: bytes) -> Version:
    """Pack what ``docker save`` writes of one image, with the image's own id and no name."""
    renamed, image = BytesIO(), ""
    with (
        tarfile.open(fileobj=BytesIO(saved)) as before,
        tarfile.open(fileobj=renamed, mode="w") as after,
    ):
        for entry in before:
            content = before.extractfile(entry)
            data = content.read() if content is not None else b""
            if entry.name == "manifest.json":
                manifest = json.loads(data)
                config = before.extractfile(manifest[0]["Config"])
                assert config is not None
                image = f"sha256:{hashlib.sha256(config.read()).hexdigest()}"
                manifest[0]["RepoTags"] = None
                data = json.dumps(manifest).encode()
                entry.size = len(data)
            after.addfile(entry, BytesIO(data))
    return await pack(folder, renamed.getvalue(), image)


def read_pack(folder: Path, version: Version) -> bytes:
    """Give the file of a version."""
    return (folder / pack_name(version.digest)).read_bytes()


def damage(folder: Path, version: Version, piece: int) -> None:
    """Turn one bit of a piece."""
    with (folder / pack_name(version.digest)).open("r+b") as file:
        file.seek(piece * PIECE + 100)
        byte = file.read(1)[0]
        file.seek(piece * PIECE + 100)
        file.write(bytes([byte ^ 1]))


def damage_list(folder: Path, version: Version) -> None:
    """Turn a list around."""
    path = folder / list_name(version.digest)
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))


@asynccontextmanager
async def no_socket_left() -> AsyncIterator[None]:
    """Wait until the sockets opened meanwhile are closed: what was on its way is flushed first."""
    before = _count_sockets()
    yield
    deadline = asyncio.get_running_loop().time() + 10
    while _count_sockets() > before:
        assert asyncio.get_running_loop().time() < deadline, "connections are left open"
        await asyncio.sleep(0.005)


def _count_sockets() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


@dataclass(slots=True)
class BadLine:
    """A line to a server, with faults at will."""

    address: tuple[str, int]
    #: Bytes from the server after which the next connection is cut; None for never.
    cut_after: int | None = None
    #: Connections are refused.
    is_down: bool = False
    #: Bytes that came from the server on each connection so far.
    passed: list[int] = field(default_factory=list)
    #: First line of each request.
    asked: list[str] = field(default_factory=list)
    url: str = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_down:
            writer.transport.abort()
            return
        number = len(self.passed)
        self.passed.append(0)
        there_reader, there_writer = await asyncio.open_connection(*self.address)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked.append(head.decode())
            there_writer.write(head)
            while data := await there_reader.read(65536):
                self.passed[number] += len(data)
                if self.cut_after is not None and self.passed[number] > self.cut_after:
                    self.cut_after = None
                    writer.transport.abort()
                    return
                writer.write(data)
                await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            there_writer.transport.abort()
            writer.close()


@asynccontextmanager
async def bad_line(url: str) -> AsyncIterator[BadLine]:
    """Stand between a client and the server at ``url``."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    line = BadLine((host, int(port)))
    server = await asyncio.start_server(line._serve, "127.0.0.1", 0)
    line.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield line
    finally:
        server.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(server.wait_closed(), 5)
