"""Packed environments on disk: what is written, what is checked, what is left after a failure."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import pytest

from kohaku_daemon.packing.pieces import (
    PIECE,
    Damaged,
    PieceReader,
    check_pieces,
    list_name,
    pack_name,
)
from kohaku_daemon.packing.unpacking import unpack
from kohaku_daemon.packing.writer import Packed, PackFailed, PackWriter, remove_unfinished
from kohaku_daemon.supervise import spawn
from protocol.models.environment import Version

#: Random, so that it does not become smaller: two whole pieces and a bit.
NOISE = os.urandom(2 * PIECE + 12345)


async def pack(folder: Path, data: bytes) -> Packed:
    async with PackWriter(folder) as writer:
        for start in range(0, len(data), 1_000_003):
            await writer.write(data[start : start + 1_000_003])
        return await writer.finish()


def names(folder: Path) -> list[str]:
    return os.listdir(folder)


async def drain(parts: AsyncIterator[bytes]) -> int:
    return len([part async for part in parts])


def version_of(packed: Packed) -> Version:
    return Version(digest=packed.digest, size=packed.size, pieces=packed.pieces, image="sha256:0")


async def unpacked(folder: Path, packed: Packed) -> bytes:
    reader = PieceReader(folder, version_of(packed))
    return b"".join([part async for part in unpack(reader.pieces())])


@pytest.mark.parametrize(
    "data",
    [b"", b"x", NOISE, bytes(40 * 1024 * 1024)],
    ids=["nothing", "a byte", "noise", "zeros"],
)
async def test_what_is_packed_comes_out_again(tmp_path: Path, data: bytes) -> None:
    packed = await pack(tmp_path / "new", data)
    assert await unpacked(tmp_path / "new", packed) == data


async def test_names_and_lists_are_digests_of_what_is_on_the_disk(tmp_path: Path) -> None:
    packed = await pack(tmp_path, NOISE)
    whole = (tmp_path / pack_name(packed.digest)).read_bytes()
    listed = (tmp_path / list_name(packed.digest)).read_bytes()
    pieces = [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]
    assert hashlib.sha256(whole).hexdigest() == packed.digest
    assert len(whole) == packed.size
    assert listed.decode().split() == [hashlib.sha256(piece).hexdigest() for piece in pieces]
    assert hashlib.sha256(listed).hexdigest() == packed.pieces
    assert len(names(tmp_path)) == 2


async def test_reading_begins_at_any_piece(tmp_path: Path) -> None:
    packed = await pack(tmp_path, NOISE)
    whole = (tmp_path / pack_name(packed.digest)).read_bytes()
    reader = PieceReader(tmp_path, version_of(packed))
    assert b"".join([piece async for piece in reader.pieces(first=1)]) == whole[PIECE:]


async def test_a_damaged_piece_is_named_and_those_before_it_are_given(tmp_path: Path) -> None:
    packed = await pack(tmp_path, NOISE)
    path = tmp_path / pack_name(packed.digest)
    with path.open("r+b") as file:
        file.seek(PIECE + 5)
        byte = file.read(1)[0]
        file.seek(PIECE + 5)
        file.write(bytes([byte ^ 1]))
    pieces = PieceReader(tmp_path, version_of(packed)).pieces()
    assert len(await anext(pieces)) == PIECE
    with pytest.raises(Damaged, match=rf"{path} is damaged: piece 1 of 3"):
        await anext(pieces)


async def test_a_file_that_was_cut_is_noticed_before_anything_is_given(tmp_path: Path) -> None:
    packed = await pack(tmp_path, NOISE)
    path = tmp_path / pack_name(packed.digest)
    os.truncate(path, packed.size - 1)
    with pytest.raises(Damaged, match=str(path)):
        await anext(PieceReader(tmp_path, version_of(packed)).pieces())


@pytest.mark.parametrize("change", ["cut", "turned", "another"])
async def test_a_list_that_is_not_the_version_s_is_refused(tmp_path: Path, change: str) -> None:
    packed = await pack(tmp_path, NOISE)
    listed = (tmp_path / list_name(packed.digest)).read_bytes()
    lines = listed.splitlines(keepends=True)
    wrong = {"cut": listed[:-65], "turned": b"".join(reversed(lines)), "another": b"x" * 195}
    with pytest.raises(Damaged, match="the list of the moon is damaged"):
        check_pieces(wrong[change], version_of(packed), "the list of the moon")
    assert len(check_pieces(listed, version_of(packed), "it")) == 3


@pytest.mark.parametrize("cut", [1, 100, PIECE])
async def test_a_tar_that_ends_too_early_is_no_tar(tmp_path: Path, cut: int) -> None:
    packed = await pack(tmp_path, NOISE)
    whole = (tmp_path / pack_name(packed.digest)).read_bytes()

    async def half() -> AsyncIterator[bytes]:
        yield whole[:-cut]

    with pytest.raises(Damaged, match="ends too early"):
        await drain(unpack(half()))


async def test_what_nobody_compressed_is_told() -> None:
    async def garbage() -> AsyncIterator[bytes]:
        yield b"not zstd at all" * 10

    with pytest.raises(Damaged, match="cannot be decompressed"):
        await drain(unpack(garbage()))


async def test_a_file_of_zeros_comes_in_parts(tmp_path: Path) -> None:
    packed = await pack(tmp_path, bytes(600 * 1024 * 1024))
    reader = PieceReader(tmp_path, version_of(packed))
    assert max([len(part) async for part in unpack(reader.pieces())]) <= 130 * 1024 * 1024


async def test_nothing_is_left_of_who_did_not_finish(tmp_path: Path) -> None:
    async def give_up() -> None:
        async with PackWriter(tmp_path) as writer:
            await writer.write(NOISE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await give_up()
    assert names(tmp_path) == []


async def test_nothing_is_left_of_who_was_cancelled(tmp_path: Path) -> None:
    began = asyncio.Event()

    async def endless() -> None:
        async with PackWriter(tmp_path) as writer:
            while True:
                await writer.write(NOISE)
                began.set()

    job = spawn(endless(), name="pack")
    await began.wait()
    assert len(names(tmp_path)) == 1
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    assert job.cancelled()
    assert names(tmp_path) == []


async def test_a_full_disk_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def open_full(path: Path, mode: str = "r") -> BinaryIO:
        if mode == "xb":
            opened(path, mode).close()
            return open("/dev/full", "wb")
        return opened(path, mode)  # type: ignore[return-value]

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(PackFailed, match=os.strerror(errno.ENOSPC)) as caught:
        await pack(tmp_path, NOISE)
    assert "make room" in caught.value.hint
    assert names(tmp_path) == []


async def test_what_a_killed_host_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    packed = await pack(tmp_path, b"x")
    (tmp_path / ".unfinished-0123").write_bytes(b"half")
    assert remove_unfinished(tmp_path) == 1
    assert await unpacked(tmp_path, packed) == b"x"
