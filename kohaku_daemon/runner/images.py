"""Where this node's images come from, and who looks after those it has.

Knows: shared storage at this node's own path, the host behind it, the link that is open now, how
often to look for room.
Does not know: the Docker engine (the backend), how a file is fetched (``downloads``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, NoReturn, Protocol, runtime_checkable

from kohaku_daemon.backends.base import Backend, BackendAway, OnProgress
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.packing.pieces import ENVIRONMENTS, Damaged, PieceReader
from kohaku_daemon.runner.downloads import Downloads
from kohaku_daemon.supervise import spawn
from protocol.connection import Connection
from protocol.errors import KohakuError, TimedOut, Unavailable
from protocol.ids import BatchId
from protocol.messages.runner import PinImage, PinnedImage
from protocol.methods import RUNNER_PIN_IMAGE
from protocol.models.environment import ImageReading, Version, WantedImage

_log = logging.getLogger(__name__)

#: Pieces that are fetched while the engine is busy with an earlier one.
_AHEAD: Final = 2
#: How often a piece of shared storage is read that is not the right one, and seconds between:
#: what the host wrote a moment ago may be seen in part (NFS, "close-to-open").
_TRIES: Final = 3
_AGAIN_S: Final = 1.0
#: Seconds shared storage has for a piece: one that hangs is as good as none.
_SHARED_S: Final = 60.0
#: Seconds between looks for images that nobody uses, and after an order that could not be met.
_COLLECT_S: Final = 60.0
_PULL_AGAIN_S: Final = 5.0


class HostImages:
    """Gives the docker backend what it asks its ``ImageSource`` for."""

    def __init__(self, downloads: Downloads, shared: Path | None) -> None:
        """``shared`` is the folder of shared storage, at this node's own path."""
        self._downloads = downloads
        self._shared = shared / ENVIRONMENTS if shared is not None else None
        self._connection: Connection | None = None

    @contextmanager
    def linked(self, connection: Connection) -> Iterator[None]:
        """Ask the host on this connection while the block runs."""
        self._connection = connection
        try:
            yield
        finally:
            self._connection = None

    async def pieces(self, version: Version) -> AsyncGenerator[bytes]:
        """Give the pieces of a version, some ahead of who takes them. See ``ImageSource``."""
        async with _ahead(self._pieces(version)) as pieces:
            async for piece in pieces:
                yield piece

    async def forget(self, version: Version) -> None:
        """Remove what was kept of a version."""
        await self._downloads.forget(version)

    def sweep(self) -> None:
        """Remove what was fetched in part and nobody wants any more. Blocks."""
        self._downloads.sweep()

    async def pin(self, batch: BatchId, reference: str, digest: str = "") -> PinnedImage:
        """Ask the host. See ``ImageSource``."""
        connection = self._connection
        if connection is None:
            raise BackendAway("the host, which says what image a batch runs, is not connected")
        params = PinImage(batch=batch, reference=reference, digest=digest)
        try:
            return await connection.call(RUNNER_PIN_IMAGE, params)
        except (Unavailable, TimedOut) as error:
            text = f"the host, which says what image a batch runs, does not answer: {error.message}"
            raise BackendAway(text) from error

    async def _pieces(self, version: Version) -> AsyncGenerator[bytes]:
        done = 0
        if self._shared is not None:
            try:
                async with aclosing(self._read_shared(version)) as pieces:
                    async for piece in pieces:
                        yield piece
                        done += 1
                return
            except FileNotFoundError:
                _log.debug("not on shared storage", extra={"file": version.digest})
            except OSError as error:
                # TimeoutError is one, too.
                _log.warning("shared storage fails, the host is asked instead: %s", error)
        async with aclosing(self._downloads.pieces(version, done)) as pieces:
            async for piece in pieces:
                yield piece

    async def _read_shared(self, version: Version) -> AsyncGenerator[bytes]:
        assert self._shared is not None
        reader = PieceReader(self._shared, version)
        done = wrong = 0
        while True:
            try:
                async with aclosing(reader.pieces(done)) as pieces:
                    while True:
                        async with asyncio.timeout(_SHARED_S):
                            piece = await anext(pieces, b"")
                        if not piece:
                            return
                        wrong = 0
                        yield piece
                        done += 1
            except Damaged:
                wrong += 1
                if wrong >= _TRIES:
                    raise
            await asyncio.sleep(_AGAIN_S)


@runtime_checkable
class ImageHolder(Protocol):
    """A backend's images, if it has any: its attribute ``images``."""

    async def fetch(self, image: WantedImage, on_progress: OnProgress) -> None:
        """Have an environment here."""

    async def collect(self, wanted: Collection[str] = ()) -> int:
        """Remove what is not used, if the disk is short."""

    def name_of(self, launch: Launch) -> str:
        """Give what ``collect`` calls the image of a launch."""

    def readings(self) -> tuple[ImageReading, ...]:
        """Say what is here, or on its way."""


class ImageKeeper:
    """Brings images ahead of time, tells of them, and has those removed that nobody uses."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        live: Callable[[], list[LaunchRecord]],
        sweep: Callable[[], None],
    ) -> None:
        """``sweep`` removes what was fetched and is not wanted; it may block."""
        self._backends = backends
        self._live = live
        self._sweep = sweep
        self._pulls: dict[str, asyncio.Task[None]] = {}
        #: What went wrong the last time, said once.
        self._trouble = ""

    def pull(self, image: WantedImage) -> None:
        """Bring an image, by a job of its own; how far that is, the readings tell."""
        if image.version is None or image.version.digest in self._pulls:
            return
        digest = image.version.digest
        job = spawn(self._pull(image), name=f"pull {image.environment}")
        self._pulls[digest] = job
        job.add_done_callback(lambda _: self._pulls.pop(digest))

    def readings(self) -> tuple[ImageReading, ...]:
        """Say which images are here or on their way."""
        return tuple(reading for holder in self._holders() for reading in holder.readings())

    async def run(self) -> NoReturn:
        """Look for what nobody uses until cancelled."""
        while True:
            await asyncio.sleep(_COLLECT_S)
            try:
                await self._collect()
            except Exception as error:
                # An engine that is away, a disk, or a bug of ours: no reason to end a runner.
                if repr(error) != self._trouble:
                    _log.warning("cannot look after images: %r", error)
                self._trouble = repr(error)
            else:
                self._trouble = ""

    async def close(self) -> None:
        """Give up what was ordered ahead of time."""
        jobs = list(self._pulls.values())
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    def _holders(self) -> list[ImageHolder]:
        found = (getattr(backend, "images", None) for backend in self._backends.values())
        return [images for images in found if isinstance(images, ImageHolder)]

    async def _collect(self) -> None:
        launches = [record.launch for record in self._live()]
        for holder in self._holders():
            await holder.collect({holder.name_of(launch) for launch in launches})
        await asyncio.to_thread(self._sweep)

    async def _pull(self, image: WantedImage) -> None:
        for holder in self._holders():
            while True:
                try:
                    await holder.fetch(image, _say_nothing)
                except (BackendAway, Unavailable):
                    await asyncio.sleep(_PULL_AGAIN_S)
                except KohakuError as error:
                    _log.warning("an environment was not brought here: %s", error.message)
                    break
                else:
                    break


def _say_nothing(text: str) -> None:
    """The readings tell it."""


@asynccontextmanager
async def _ahead(pieces: AsyncGenerator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """Take pieces before they are wanted, some of them."""
    queue = asyncio.Queue[bytes | Exception | None](_AHEAD)

    async def take() -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:  # it is the reader's to see
            await queue.put(error)

    async def give() -> AsyncGenerator[bytes]:
        while (piece := await queue.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    job = spawn(take(), name="pieces of an environment")
    try:
        async with aclosing(give()) as given:
            yield given
    finally:
        job.cancel()
        await asyncio.wait({job})
