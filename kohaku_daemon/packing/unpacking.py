"""From the pieces of a packed environment back to the tar that an engine loads.

Knows: decompression, beside the event loop.
Does not know: where pieces come from, or that they were checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kohaku_daemon.packing.pieces import Damaged

#: Bytes of a part, about.
_STEP: Final = 1024 * 1024
#: Compressed bytes that are taken at once. Files full of zeros are no bombs, but become 121 MiB of
#: these (measured; RFC 8878: 4 bytes say 128 KiB of one byte). With 1 KiB, 500 MB take 0.2 s more.
_INPUT: Final = 4096


async def unpack(pieces: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    """Give the tar in parts of some MiB.

    Raises:
        Damaged: This was compressed by nobody, or is not all.
    """
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, "unpack")
    unpacker = _Unpacker()
    try:
        async for piece in pieces:
            unpacker.take(piece)
            while part := await loop.run_in_executor(thread, unpacker.step):
                yield part
        if not unpacker.is_whole:
            raise Damaged("an environment ends too early: it was packed badly")
    finally:
        thread.shutdown(wait=False)


class _Unpacker:
    """Decompresses a piece in steps whose results are small, whatever it holds."""

    def __init__(self) -> None:
        import zstandard  # half a megabyte: only where something is unpacked

        self._error = zstandard.ZstdError
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._rest = memoryview(b"")

    @property
    def is_whole(self) -> bool:
        return bool(self._frame.eof)

    def take(self, piece: bytes) -> None:
        self._rest = memoryview(piece)

    def step(self) -> bytes:
        """Give the next part; empty once all of the piece is used up."""
        parts = list[bytes]()
        size = 0
        while self._rest and size < _STEP:
            now, self._rest = self._rest[:_INPUT], self._rest[_INPUT:]
            try:
                part = self._frame.decompress(now)
            except self._error as error:
                raise Damaged(f"an environment cannot be decompressed: {error}") from error
            parts.append(part)
            size += len(part)
        return b"".join(parts)
