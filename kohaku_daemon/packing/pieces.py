"""A packed environment as a list of pieces: names, digests, and reading with a check of each.

Knows: which files there are, how long a list is, what makes a piece the right one.
Does not know: how a file is written (``writer``), compression, where else pieces come from.

The list is text, one SHA-256 in hexadecimal a line, and is itself checked against the version,
so that whoever has the version need trust neither a disk nor a network.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final

from protocol.errors import KohakuError
from protocol.models.environment import Version

#: Folder of packed environments: in the shared folder, or in the data of host and runner.
ENVIRONMENTS: Final = "environments"
#: Bytes of a piece; the last one is what is left.
PIECE: Final = 4 * 1024 * 1024
#: Of the files of a version, after its digest.
PACK_SUFFIX: Final = ".tar.zst"
LIST_SUFFIX: Final = ".pieces"
#: Bytes of a digest and the end of its line.
_LINE: Final = 65


class Damaged(KohakuError):
    """A file, or what came over a network, is not what it was when it was packed."""


def pack_name(digest: str) -> str:
    """Name the file of a version."""
    return digest + PACK_SUFFIX


def list_name(digest: str) -> str:
    """Name the file with the digests of its pieces."""
    return digest + LIST_SUFFIX


def list_size(version: Version) -> int:
    """Give the bytes of a version's list, to read no more than that."""
    return -(-version.size // PIECE) * _LINE


def piece_size(version: Version, index: int) -> int:
    """Give the bytes of one piece."""
    return min(PIECE, version.size - index * PIECE)


def check_pieces(listed: bytes, version: Version, where: object) -> tuple[bytes, ...]:
    """Take a list apart into digests, if it is the one of that version.

    Raises:
        Damaged: It is not; ``where`` says whose list that is.
    """
    if hashlib.sha256(listed).hexdigest() != version.pieces or len(listed) != list_size(version):
        raise Damaged(f"{where} is damaged: it is not the list of pieces of {version.digest}")
    return tuple(bytes.fromhex(line.decode()) for line in listed.split())


def is_piece(data: bytes, digest: bytes) -> bool:
    """Say whether a piece is the right one. 4 MiB take 2 to 3 ms: not on an event loop."""
    return hashlib.sha256(data).digest() == digest


class PieceReader:
    """Reads a version from a folder of this machine, a checked piece at a time.

    Disks may be network disks that hang, so each reader has a thread of its own.
    """

    def __init__(self, folder: Path, version: Version) -> None:
        self._file = folder / pack_name(version.digest)
        self._list = folder / list_name(version.digest)
        self._version = version

    async def pieces(self, first: int = 0) -> AsyncGenerator[bytes]:
        """Give the pieces from ``first`` on. The next is read while one is worked with.

        Raises:
            Damaged: The list, or a piece, is not what was packed; it names file and piece.
            OSError: The file cannot be read.
        """
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, "pieces")
        opened: BinaryIO | None = None
        try:
            digests = await loop.run_in_executor(thread, self._read_list)
            opened = await loop.run_in_executor(thread, self._open)
            coming = loop.run_in_executor(thread, self._read, opened, digests, first)
            for index in range(first, len(digests)):
                piece = await coming
                if index + 1 < len(digests):
                    coming = loop.run_in_executor(thread, self._read, opened, digests, index + 1)
                yield piece
        finally:
            if opened is not None:
                thread.submit(opened.close)  # after the reading that may be under way
            thread.shutdown(wait=False)

    def _read_list(self) -> tuple[bytes, ...]:
        with self._list.open("rb") as file:
            listed = file.read(list_size(self._version) + 1)
        return check_pieces(listed, self._version, self._list)

    def _open(self) -> BinaryIO:
        file = self._file.open("rb")
        size = os.fstat(file.fileno()).st_size
        if size != self._version.size:
            file.close()
            raise Damaged(f"{self._file} is damaged: {size} bytes instead of {self._version.size}")
        return file

    def _read(self, file: BinaryIO, digests: tuple[bytes, ...], index: int) -> bytes:
        file.seek(index * PIECE)
        piece = file.read(piece_size(self._version, index))
        if not is_piece(piece, digests[index]):
            raise Damaged(f"{self._file} is damaged: piece {index} of {len(digests)}")
        return piece
