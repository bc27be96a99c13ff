"""GET /v1/runner/environment/NAME: packed environments, for nodes without shared storage.

Knows: which names files may have, ranges, that a disk may be slow and a node slower.
Does not know: what is in a file; whoever fetches it checks it piece by piece.

The kernel could send a file by itself (sendfile), but would read it from the disk on the event
loop, which a network disk may hold up for minutes. So it is read in threads, of these alone.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from aiohttp import web

from kohaku_daemon.packing.pieces import LIST_SUFFIX, list_name, pack_name
from protocol.ids import NodeName

_log = logging.getLogger(__name__)

ROUTE: Final = "/v1/runner/environment/{name}"

_NAME: Final = re.compile(r"([0-9a-f]{64})(\.pieces)?")
_RANGE: Final = re.compile(r"bytes=([0-9]{1,18})-")
#: Bytes read at once, and bytes handed to the kernel in one step of the loop, some 50 us.
_READ: Final = 1024 * 1024
_STEP: Final = 256 * 1024
#: Seconds in which a node takes one step; it may have stopped for its own disk.
_STALLED_S: Final = 300.0
#: Files one node may fetch at once, and threads that read for all.
_MOST_PER_NODE: Final = 16
_THREADS: Final = 8


class EnvironmentFiles:
    """Serves one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = ThreadPoolExecutor(_THREADS, "environment files")
        self._open = Counter[NodeName]()
        self._sending: set[asyncio.Transport] = set()

    async def serve(self, request: web.Request, node: NodeName) -> web.StreamResponse:
        """Send a file, or its list of pieces, from the byte that is asked for."""
        found = _NAME.fullmatch(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound(text="there is no such file\n")
        digest, suffix = found.groups()
        name = list_name(digest) if suffix == LIST_SUFFIX else pack_name(digest)
        with self._counted(node):
            loop = asyncio.get_running_loop()
            try:
                file, size = await loop.run_in_executor(self._threads, self._find, name)
            except FileNotFoundError:
                raise web.HTTPNotFound(text="there is no such file\n") from None
            except OSError as error:
                _log.warning("cannot read an environment: %s", error, extra={"file": name})
                raise web.HTTPServiceUnavailable(text="it cannot be read now\n") from None
            with file, self._abortable(request):
                return await self._send(request, file, size)

    def close(self) -> None:
        """Break off what is being sent: the nodes go on with the next run of the host."""
        for transport in tuple(self._sending):
            transport.abort()

    @contextmanager
    def _abortable(self, request: web.Request) -> Iterator[None]:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the node has gone already")
        self._sending.add(transport)
        try:
            yield
        finally:
            self._sending.discard(transport)

    @contextmanager
    def _counted(self, node: NodeName) -> Iterator[None]:
        if self._open[node] >= _MOST_PER_NODE:
            raise web.HTTPServiceUnavailable(text=f"{node} fetches {_MOST_PER_NODE} files\n")
        self._open[node] += 1
        try:
            yield
        finally:
            self._open[node] -= 1
            if not self._open[node]:
                del self._open[node]

    def _find(self, name: str) -> tuple[BinaryIO, int]:
        file = (self._folder / name).open("rb")
        return file, file.seek(0, 2)

    async def _send(self, request: web.Request, file: BinaryIO, size: int) -> web.StreamResponse:
        start = _start_of(request, size)
        response = web.StreamResponse(status=206 if start else 200)
        response.content_type = "application/octet-stream"
        response.content_length = size - start
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        response.force_close()
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        coming = loop.run_in_executor(self._threads, _read, file, start)
        try:
            while data := await coming:
                start += len(data)
                coming = loop.run_in_executor(self._threads, _read, file, start)
                for step in range(0, len(data), _STEP):
                    async with asyncio.timeout(_STALLED_S):
                        await response.write(memoryview(data)[step : step + _STEP])
        except (ConnectionError, TimeoutError, OSError) as error:
            # Half a file was sent: the node sees that, and asks for the rest.
            _log.debug("an environment was not sent to its end: %s", error)
            if request.transport is not None:
                request.transport.abort()
        finally:
            # It may be what failed, and is not to be read while the file is closed.
            await asyncio.gather(coming, return_exceptions=True)
        return response


def _start_of(request: web.Request, size: int) -> int:
    """Read ``Range: bytes=START-``, the only kind that nodes send (RFC 9110 section 14.2)."""
    text = request.headers.get("Range", "")
    found = _RANGE.fullmatch(text)
    if found is None:
        return 0  # whoever asks otherwise is sent all, as the RFC allows
    start = int(found[1])
    if start >= size:
        raise web.HTTPRequestRangeNotSatisfiable(
            text=f"it has {size} bytes\n", headers={"Content-Range": f"bytes */{size}"}
        )
    return start


def _read(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.read(_READ)
