"""Fetches packed environments from the host: in pieces, each checked, going on where it broke.

Knows: the route, when to try again, that what was fetched survives a restart of the runner.
Does not know: whether there is shared storage, who wants an environment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, ParamSpec, TypeVar

import aiohttp

from kohaku_daemon.packing.pieces import (
    LIST_SUFFIX,
    PIECE,
    Damaged,
    check_pieces,
    is_piece,
    list_size,
    piece_size,
)
from protocol.backoff import delay_s
from protocol.connection import parse_url
from protocol.errors import NotFound
from protocol.models.environment import Version

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

PATH: Final = "/v1/runner/environment/"
#: Of what was fetched of a file that is not whole yet.
_PART: Final = ".part"
#: Seconds to reach the host, and seconds that may pass without a byte of it.
_CONNECT_S: Final = 10.0
_SILENT_S: Final = 60.0
#: Seconds: longest wait between two tries.
_LONGEST_S: Final = 10.0
#: How often a piece is fetched that is not the right one: a network may garble it, but a file
#: that is damaged stays so.
_TRIES: Final = 3
#: Seconds: a piece that came sooner (200 MB/s) is not kept. To write 500 MB costs half a second
#: of a core (measured), and the network gives them again as soon as a disk would.
_SLOW_S: Final = 0.02
#: Seconds that parts stay which nobody asks for.
_KEEP_S: Final = 86400.0
#: Bytes that wait here for who reads.
_BUFFER: Final = 1024 * 1024


class Downloads:
    """Fetches files of versions from the host."""

    def __init__(self, host: str, credential: Callable[[], str], folder: Path) -> None:
        """``credential`` is asked each time: it changes when the runner joins anew.

        Parts are kept in ``folder``.
        """
        self._url = parse_url(host) + PATH
        self._credential = credential
        self._folder = folder

    async def pieces(self, version: Version, first: int = 0) -> AsyncGenerator[bytes]:
        """Give the pieces from ``first`` on; wait for the host as long as it takes.

        Raises:
            Damaged: The host's own file is damaged.
            NotFound: The host has no such file.
        """
        digests = await self._list(version)
        kept = _Part(self._folder / f"{version.digest}{_PART}")
        try:
            index = first
            while index < len(digests):
                piece = await kept.read(index, digests[index], piece_size(version, index))
                if piece:
                    yield piece
                    index += 1
                    continue
                stop = min(await kept.find_next(index), len(digests))
                async with aclosing(self._fetch(version, digests, index, stop, kept)) as pieces:
                    async for piece in pieces:
                        yield piece
                        index += 1
        finally:
            kept.close()

    async def forget(self, version: Version) -> None:
        """Remove what was kept of a version."""
        path = self._folder / f"{version.digest}{_PART}"
        with suppress(OSError):  # of a disk in trouble others tell
            await asyncio.to_thread(path.unlink, missing_ok=True)

    def sweep(self) -> None:
        """Remove parts that nobody has asked for lately. Blocks."""
        for path in self._folder.glob(f"*{_PART}"):
            if time.time() - path.stat().st_mtime > _KEEP_S:  # noqa: TID251  the disk's own clock
                path.unlink(missing_ok=True)
                _log.info("removed what was fetched of an environment that nobody wants")

    async def _list(self, version: Version) -> tuple[bytes, ...]:
        wrong = tries = 0
        while True:
            try:
                async with self._open(version.digest + LIST_SUFFIX) as response:
                    listed = await response.content.read(list_size(version) + 1)
                    while not response.content.at_eof() and len(listed) <= list_size(version):
                        listed += await response.content.read(list_size(version) + 1)
                return check_pieces(listed, version, f"{response.url} of the host")
            except Damaged:
                wrong += 1
                if wrong >= _TRIES:
                    raise
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                await self._wait(tries, version, error)
                tries += 1

    async def _fetch(
        self, version: Version, digests: tuple[bytes, ...], index: int, stop: int, kept: _Part
    ) -> AsyncGenerator[bytes]:
        clock = asyncio.get_running_loop()
        wrong = tries = 0
        while index < stop:
            try:
                async with self._open(version.digest, index * PIECE) as response:
                    while index < stop:
                        began = clock.time()
                        size = piece_size(version, index)
                        piece = await response.content.readexactly(size)
                        is_slow = clock.time() - began >= _SLOW_S
                        if not await asyncio.to_thread(is_piece, piece, digests[index]):
                            wrong += 1
                            break
                        if is_slow:
                            await kept.write(index, piece)
                        wrong = tries = 0
                        yield piece
                        index += 1
            except (aiohttp.ClientError, OSError, EOFError, TimeoutError) as error:
                await self._wait(tries, version, error)
                tries += 1
            if wrong >= _TRIES:
                raise Damaged(
                    f"file {version.digest} of the host is damaged: piece {index} of {len(digests)}"
                )

    @asynccontextmanager
    async def _open(self, name: str, start: int = 0) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for a file from a byte on.

        Raises:
            NotFound: There is none of that name.
            aiohttp.ClientError, OSError, TimeoutError: Another try may go better.
        """
        headers = {"Authorization": f"Bearer {self._credential()}"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_S, sock_read=_SILENT_S)
        async with (
            aiohttp.ClientSession(read_bufsize=_BUFFER, timeout=timeout) as http,
            http.get(self._url + name, headers=headers) as response,
        ):
            if response.status == 404:
                raise NotFound(f"the host has no file {name} any more")
            wanted = 206 if start else 200
            if response.status != wanted:
                raise aiohttp.ClientPayloadError(f"the host answers {response.status}")
            yield response

    async def _wait(self, tries: int, version: Version, error: Exception) -> None:
        if tries == 1:  # the second failure in a row: one is an ordinary restart of the host
            _log.warning(
                "cannot fetch an environment, trying on: %r", error, extra={"file": version.digest}
            )
        await asyncio.sleep(delay_s(tries, random.random(), longest_s=_LONGEST_S))


class _Part:
    """What was kept of one file, with holes. All that blocks runs in one thread.

    It is nobody's only copy: a disk that does not take it costs a restart its head start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "part")
        self._file: BinaryIO | None = None
        self._is_bad = False

    async def read(self, index: int, digest: bytes, size: int) -> bytes:
        """Give a piece; empty if it is not there, or not the right one."""
        return await self._do(self._read, index, digest, size)

    async def find_next(self, index: int) -> int:
        """Give the next piece after ``index`` that may be there."""
        return await self._do(self._find_next, index)

    async def write(self, index: int, piece: bytes) -> None:
        """Keep a piece."""
        if not self._is_bad:
            await self._do(self._write, index, piece)

    def close(self) -> None:
        """Let go of it, once what was begun is done."""
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    async def _do(self, work: Callable[P, T], *args: P.args, **_: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(work, *args))

    def _read(self, index: int, digest: bytes, size: int) -> bytes:
        try:
            file = self._opened()
            file.seek(index * PIECE)
            piece = file.read(size)
        except OSError:
            return b""
        return piece if is_piece(piece, digest) else b""

    def _find_next(self, index: int) -> int:
        try:
            # Behind the last byte there is no data, which is an error (man 2 lseek).
            found = os.lseek(self._opened().fileno(), (index + 1) * PIECE, os.SEEK_DATA)
        except OSError:
            return sys.maxsize
        return max(found // PIECE, index + 1)

    def _write(self, index: int, piece: bytes) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            file = self._opened()
            file.seek(index * PIECE)
            file.write(piece)
        except OSError as error:
            _log.warning("cannot keep what is fetched of an environment: %s", error)
            self._is_bad = True
            self._path.unlink(missing_ok=True)

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = self._path.open("r+b", buffering=0)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
