"""Writing a packed environment: what ``docker save`` says becomes a file named by its digest.

Knows: compression, that a file has its name only once all of it is on the disk.
Does not know: whose image it is.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, TypeVar

from kohaku_daemon.packing.pieces import PIECE, list_name, pack_name
from protocol.errors import KohakuError

T = TypeVar("T")

#: Measured with two threads on 400 MB of programs: level 1 packs 800 MB/s to 34 %, 2 770 MB/s
#: to 31 %, 3 600 MB/s to 30 %; an engine saves some 200 MB/s.
_LEVEL: Final = 2
#: Each thread has some 10 MiB of its own.
_MOST_THREADS: Final = 4
#: Of files that are being written. Hidden, so that nobody takes them for environments.
_UNFINISHED: Final = ".unfinished-"


class PackFailed(KohakuError):
    """An environment could not be written. Nothing is left of the attempt."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A file that was written, as ``Version`` tells of it."""

    #: SHA-256 of the file, hexadecimal: its name.
    digest: str
    #: Bytes.
    size: int
    #: SHA-256 of the list of pieces, hexadecimal.
    pieces: str


def remove_unfinished(folder: Path) -> int:
    """Remove what an earlier run left half-written; give how many. Only while nobody packs."""
    left = list(folder.glob(f"{_UNFINISHED}*"))
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


class PackWriter:
    """Writes one file: ``async with``, ``write`` any number of times, then ``finish``.

    Whoever leaves without ``finish``, by an error or because he was cancelled, leaves nothing
    behind. All that may block runs in one thread, one thing after the other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
        self._thread = ThreadPoolExecutor(1, "pack")
        self._file: BinaryIO | None = None
        threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        import zstandard  # half a megabyte: only where something is packed

        self._compressed = zstandard.ZstdCompressor(
            level=_LEVEL, threads=threads, write_checksum=True
        ).compressobj()
        self._whole = hashlib.sha256()
        self._piece = hashlib.sha256()
        self._size = 0
        self._digests: list[str] = []

    async def __aenter__(self) -> PackWriter:
        await self._do(self._open)
        return self

    async def write(self, data: bytes) -> None:
        """Take the next bytes of the tar; some MiB at once are quicker than many KiB.

        Raises:
            PackFailed: The disk does not take it.
        """
        await self._do(lambda: self._keep(self._compressed.compress(data)))

    async def finish(self) -> Packed:
        """Say that this was all; give the file, which is there for good and has its name.

        Raises:
            PackFailed: The disk does not take it.
        """
        return await self._do(self._finish)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await asyncio.wrap_future(self._thread.submit(self._drop))
        finally:
            self._thread.shutdown(wait=False)

    async def _do(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.wrap_future(self._thread.submit(work))
        except OSError as error:
            text = (
                f"no environment can be written to {self._folder}: {os.strerror(error.errno or 0)}"
            )
            hint = ""
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = f"make room on the disk of {self._folder}, then pack again"
            raise PackFailed(text, hint=hint) from error

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("xb")

    def _keep(self, data: bytes) -> None:
        assert self._file is not None, "it is written to within the context"
        rest = memoryview(data)
        while rest:
            part = rest[: PIECE - self._size % PIECE]
            rest = rest[len(part) :]
            self._file.write(part)
            self._whole.update(part)
            self._piece.update(part)
            self._size += len(part)
            if self._size % PIECE == 0:
                self._end_piece()

    def _end_piece(self) -> None:
        self._digests.append(self._piece.hexdigest())
        self._piece = hashlib.sha256()

    def _finish(self) -> Packed:
        assert self._file is not None, "it is finished within the context"
        self._keep(self._compressed.flush())
        if self._size % PIECE:
            self._end_piece()
        _sync(self._file)
        self._file.close()
        digest = self._whole.hexdigest()
        listed = "".join(f"{line}\n" for line in self._digests).encode()
        # First the list: whoever sees the file finds its list too.
        self._write_list(listed, self._folder / list_name(digest))
        self._path.replace(self._folder / pack_name(digest))
        self._file = None
        _sync_folder(self._folder)
        return Packed(digest, self._size, hashlib.sha256(listed).hexdigest())

    def _write_list(self, listed: bytes, path: Path) -> None:
        before = self._path.with_suffix(".list")
        try:
            with before.open("xb") as file:
                file.write(listed)
                _sync(file)
            before.replace(path)
        except BaseException:  # half a list is rubbish, whyever it is half
            before.unlink(missing_ok=True)
            raise

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            # What is buffered and cannot be written would be tried again: it is not wanted.
            file.close()
        except OSError:
            pass
        finally:
            self._path.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (man 2 fsync)."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
