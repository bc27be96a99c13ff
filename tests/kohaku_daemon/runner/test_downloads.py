"""Environments fetched from a real host over a line that breaks."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from msgspec.structs import replace

from kohaku_daemon.packing.pieces import PIECE, Damaged
from kohaku_daemon.runner import downloads
from kohaku_daemon.runner.downloads import Downloads
from kohaku_daemon.supervise import spawn
from protocol.errors import NotFound
from tests.support.host import RunningHost, linked_runner, running_host, until
from tests.support.packs import BadLine, bad_line, damage, damage_list, pack_noise, read_pack


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any network counts as slow, so that all that is fetched is kept."""
    monkeypatch.setattr(downloads, "_SLOW_S", 0.0)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RunningHost]:
    async with running_host(tmp_path / "host") as host:
        yield host


@pytest.fixture
async def credential(host: RunningHost) -> AsyncIterator[str]:
    async with linked_runner(host) as runner:
        yield runner.credential


@pytest.fixture
async def line(host: RunningHost) -> AsyncIterator[BadLine]:
    async with bad_line(host.url) as line:
        yield line


@pytest.fixture
def folder(host: RunningHost) -> Path:
    """Where the host has its files."""
    return host.data / "environments"


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Where the runner keeps what it has fetched."""
    return tmp_path / "parts"


@pytest.fixture
def begin(line: BadLine, credential: str, parts: Path) -> Callable[[], Downloads]:
    """Start a runner, as it were."""
    return lambda: Downloads(line.url, lambda: credential, parts)


async def whole(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


def starts(line: BadLine) -> list[int]:
    """From which byte on each request for a file asked."""
    found = []
    for head in line.asked:
        if ".pieces" not in head.partition("\r\n")[0]:
            _, _, text = head.partition("bytes=")
            found.append(int(text.partition("-")[0]) if text else 0)
    return found


async def test_a_file_comes_whole_and_nothing_is_left(
    begin: Callable[[], Downloads], folder: Path, parts: Path
) -> None:
    version = await pack_noise(folder, 2)
    fetching = begin()
    assert await whole(fetching.pieces(version)) == read_pack(folder, version)
    assert os.listdir(parts) == [f"{version.digest}.part"]
    await fetching.forget(version)
    assert os.listdir(parts) == []


async def test_what_comes_faster_than_from_a_disk_is_not_kept(
    begin: Callable[[], Downloads], folder: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_SLOW_S", 60.0)
    version = await pack_noise(folder, 2)
    assert await whole(begin().pieces(version)) == read_pack(folder, version)
    assert not parts.exists()  # noqa: ASYNC240


async def test_holes_in_what_was_kept_are_filled(
    begin: Callable[[], Downloads], line: BadLine, folder: Path, parts: Path
) -> None:
    version = await pack_noise(folder, 5)
    await whole(begin().pieces(version))
    (kept,) = parts.iterdir()  # noqa: ASYNC240
    data = kept.read_bytes()
    kept.unlink()
    with kept.open("wb") as file:
        for index in (1, 4):
            file.seek(index * PIECE)
            file.write(data[index * PIECE : (index + 1) * PIECE])
    line.asked.clear()
    assert await whole(begin().pieces(version)) == data == read_pack(folder, version)
    assert starts(line) == [0, 2 * PIECE, 5 * PIECE]


async def test_a_broken_line_goes_on_at_the_piece_it_broke_in(
    begin: Callable[[], Downloads], line: BadLine, folder: Path
) -> None:
    version = await pack_noise(folder, 3)
    line.cut_after = 3 * PIECE - PIECE // 2
    assert await whole(begin().pieces(version)) == read_pack(folder, version)
    first, second = starts(line)
    assert first == 0
    # What was still on its way when the line broke may be lost with it.
    assert second in (PIECE, 2 * PIECE)


async def test_a_host_that_is_away_is_waited_for(
    begin: Callable[[], Downloads], line: BadLine, folder: Path
) -> None:
    version = await pack_noise(folder, 1)
    line.is_down = True
    job = spawn(whole(begin().pieces(version)), name="fetch")
    await asyncio.sleep(0.3)  # some tries
    assert not job.done()
    line.is_down = False
    async with asyncio.timeout(20):
        assert await job == read_pack(folder, version)


async def test_a_restart_fetches_only_what_is_missing(
    begin: Callable[[], Downloads], line: BadLine, folder: Path
) -> None:
    version = await pack_noise(folder, 3)
    async with aclosing(begin().pieces(version)) as before:
        assert len([await anext(before) for _ in range(2)]) == 2
    assert await whole(begin().pieces(version)) == read_pack(folder, version)
    assert starts(line) == [0, 2 * PIECE]


async def test_what_was_kept_is_checked_like_anything_else(
    begin: Callable[[], Downloads], line: BadLine, folder: Path, parts: Path
) -> None:
    version = await pack_noise(folder, 3)
    async with aclosing(begin().pieces(version)) as before:
        assert len([await anext(before) for _ in range(3)]) == 3
    (kept,) = parts.iterdir()  # noqa: ASYNC240
    with kept.open("r+b") as file:
        file.seek(PIECE)
        file.write(b"rust")
    assert await whole(begin().pieces(version)) == read_pack(folder, version)
    assert starts(line) == [0, PIECE, 3 * PIECE]


async def test_a_file_that_is_damaged_at_the_host_is_told_after_some_tries(
    begin: Callable[[], Downloads], line: BadLine, folder: Path
) -> None:
    version = await pack_noise(folder, 2)
    damage(folder, version, 1)
    fetching = begin().pieces(version)
    assert len(await anext(fetching)) == PIECE
    with pytest.raises(Damaged, match=f"{version.digest} of the host is damaged: piece 1 of 3"):
        await anext(fetching)
    assert starts(line) == [0, PIECE, PIECE]


async def test_a_list_that_is_damaged_at_the_host_is_told(
    begin: Callable[[], Downloads], folder: Path
) -> None:
    version = await pack_noise(folder, 2)
    damage_list(folder, version)
    with pytest.raises(Damaged, match=f"{version.digest}.pieces of the host is damaged"):
        await anext(begin().pieces(version))


async def test_a_version_that_lies_about_its_size_is_no_reason_to_read_on(
    begin: Callable[[], Downloads], folder: Path
) -> None:
    version = await pack_noise(folder, 3)
    lie = replace(version, size=PIECE, pieces=hashlib.sha256(b"").hexdigest())
    with pytest.raises(Damaged):
        await anext(begin().pieces(lie))


async def test_what_the_host_does_not_have_is_no_use_to_wait_for(
    begin: Callable[[], Downloads], folder: Path
) -> None:
    version = await pack_noise(folder, 1)
    with pytest.raises(NotFound, match="no file 0000"):
        await anext(begin().pieces(replace(version, digest="0" * 64)))


async def test_a_full_disk_here_costs_the_head_start_only(
    begin: Callable[[], Downloads], folder: Path, parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = await pack_noise(folder, 1)
    os.mkdir(parts)
    (parts / f"{version.digest}.part").symlink_to("/dev/full")
    assert await whole(begin().pieces(version)) == read_pack(folder, version)
    assert "cannot keep" in caplog.text


async def test_parts_that_nobody_wants_go_after_a_day(
    begin: Callable[[], Downloads], folder: Path, parts: Path
) -> None:
    old, new = await pack_noise(folder, 1), await pack_noise(folder, 1)
    fetching = begin()
    for version in (old, new):
        await whole(fetching.pieces(version))
    os.utime(parts / f"{old.digest}.part", (1, 1))
    fetching.sweep()
    assert os.listdir(parts) == [f"{new.digest}.part"]


async def test_who_does_not_read_on_makes_the_host_wait(
    begin: Callable[[], Downloads], line: BadLine, folder: Path
) -> None:
    version = await pack_noise(folder, 12)
    fetching = begin().pieces(version)
    await anext(fetching)
    passed = -1

    def has_stopped() -> bool:
        nonlocal passed
        before, passed = passed, line.passed[-1]
        return passed == before

    await until(has_stopped)
    assert line.passed[-1] < 10 * PIECE
    await fetching.aclose()
