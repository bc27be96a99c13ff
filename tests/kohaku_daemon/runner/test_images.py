"""Where a node's images come from: shared storage, the host behind it, and the link."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kohaku_daemon.backends.base import Backend, BackendAway, BackendFailed, OnProgress
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.packing.pieces import PIECE, Damaged, PieceReader, list_name
from kohaku_daemon.runner import images as module
from kohaku_daemon.runner.downloads import Downloads
from kohaku_daemon.runner.images import HostImages, ImageHolder, ImageKeeper
from protocol.connection import Connection
from protocol.errors import KohakuError, NotFound, Unavailable
from protocol.ids import BatchId
from protocol.messages.runner import PinImage, PinnedImage
from protocol.models.environment import ImageReading, Version, WantedImage
from tests.support.host import until
from tests.support.packs import damage, pack_noise, read_pack


class FakeDownloads(Downloads):
    """The host, as far as this test goes: a folder."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.asked: list[int] = []
        self.given = self.ended = 0
        self.swept = 0

    async def pieces(self, version: Version, first: int = 0) -> AsyncGenerator[bytes]:
        self.asked.append(first)
        try:
            for start in range(first * PIECE, len(self.data), PIECE):
                self.given += 1
                yield self.data[start : start + PIECE]
        finally:
            self.ended += 1

    def sweep(self) -> None:
        self.swept += 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    monkeypatch.setattr(module, "_PULL_AGAIN_S", 0.01)
    monkeypatch.setattr(module, "_COLLECT_S", 0.01)


async def whole(source: HostImages, version: Version) -> bytes:
    return b"".join([piece async for piece in source.pieces(version)])


async def test_shared_storage_is_read_where_the_file_is_there(tmp_path: Path) -> None:
    version = await pack_noise(tmp_path / "environments", 2)
    downloads = FakeDownloads()
    data = await whole(HostImages(downloads, tmp_path), version)
    assert data == read_pack(tmp_path / "environments", version)
    assert downloads.asked == []


@pytest.mark.parametrize("has_shared", [True, False])
async def test_the_host_is_asked_for_what_is_not_shared(
    tmp_path: Path, *, has_shared: bool
) -> None:
    version = await pack_noise(tmp_path / "elsewhere", 2)
    downloads = FakeDownloads(read_pack(tmp_path / "elsewhere", version))
    source = HostImages(downloads, tmp_path if has_shared else None)
    assert await whole(source, version) == downloads.data
    assert downloads.asked == [0]


async def test_shared_storage_that_fails_is_made_up_for_by_the_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "environments"
    version = await pack_noise(folder, 2)
    downloads = FakeDownloads(read_pack(folder, version))
    (folder / list_name(version.digest)).unlink()
    (folder / list_name(version.digest)).mkdir()
    assert await whole(HostImages(downloads, tmp_path), version) == downloads.data
    assert "shared storage fails" in caplog.text


async def test_shared_storage_that_hangs_is_made_up_for_by_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "environments"
    version = await pack_noise(folder, 2)
    downloads = FakeDownloads(read_pack(folder, version))
    hangs = threading.Event()
    monkeypatch.setattr(module, "_SHARED_S", 0.05)
    monkeypatch.setattr(PieceReader, "_read_list", lambda _: hangs.wait())
    try:
        assert await whole(HostImages(downloads, tmp_path), version) == downloads.data
    finally:
        hangs.set()


@pytest.mark.usefixtures("quick")
async def test_a_damaged_file_on_shared_storage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "environments"
    version = await pack_noise(folder, 2)
    damage(folder, version, 1)
    pieces = HostImages(FakeDownloads(), tmp_path).pieces(version)
    assert len(await anext(pieces)) == PIECE
    with pytest.raises(Damaged, match=f"{folder}/{version.digest}.tar.zst is damaged: piece 1 of"):
        await anext(pieces)


@pytest.mark.usefixtures("quick")
async def test_a_piece_that_is_right_after_all_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "environments"
    version = await pack_noise(folder, 2)
    right = read_pack(folder, version)
    damage(folder, version, 1)

    async def mend(seconds: float) -> None:
        damage(folder, version, 1)  # the same bit back

    monkeypatch.setattr(asyncio, "sleep", mend)
    assert await whole(HostImages(FakeDownloads(), tmp_path), version) == right


async def test_some_pieces_are_fetched_ahead_and_not_all(tmp_path: Path) -> None:
    version = await pack_noise(tmp_path / "elsewhere", 1)
    downloads = FakeDownloads(bytes(20 * PIECE))
    async with aclosing(HostImages(downloads, None).pieces(version)) as pieces:
        await anext(pieces)
        for _ in range(20):
            await asyncio.sleep(0)
        assert 2 <= downloads.given <= 5
    assert downloads.ended == 1, "who leaves lets go of it"


class FakeConnection:
    def __init__(self, answer: PinnedImage | KohakuError) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    async def call(self, method: object, params: PinImage) -> PinnedImage:
        self.asked.append(params)
        if isinstance(self.answer, KohakuError):
            raise self.answer
        return self.answer


@contextmanager
def linked(source: HostImages, answer: PinnedImage | KohakuError) -> Iterator[FakeConnection]:
    connection = FakeConnection(answer)
    with source.linked(cast("Connection", connection)):
        yield connection


async def test_pins_are_asked_for_on_the_link_that_is_open() -> None:
    source = HostImages(FakeDownloads(), None)
    with pytest.raises(BackendAway, match="not connected"):
        await source.pin(BatchId(7), "x:1")
    with linked(source, PinnedImage("sha256:1")) as connection:
        assert await source.pin(BatchId(7), "x:1", "sha256:2") == PinnedImage("sha256:1")
        assert connection.asked == [PinImage(batch=BatchId(7), reference="x:1", digest="sha256:2")]
    with pytest.raises(BackendAway, match="not connected"):
        await source.pin(BatchId(7), "x:1")


async def test_a_link_that_breaks_says_nothing_of_the_image_and_a_refusal_does() -> None:
    source = HostImages(FakeDownloads(), None)
    with linked(source, Unavailable("the link ended")), pytest.raises(BackendAway):
        await source.pin(BatchId(7), "x:1")
    with linked(source, NotFound("no such batch")), pytest.raises(NotFound):
        await source.pin(BatchId(7), "x:1")


class FakeHolder:
    """A backend's images."""

    def __init__(self, *outcomes: KohakuError | None) -> None:
        self.outcomes = list(outcomes)
        self.fetched: list[str] = []
        self.collected: list[set[str]] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def fetch(self, image: WantedImage, on_progress: OnProgress) -> None:
        await self.goes_on.wait()
        self.fetched.append(image.environment)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome

    async def collect(self, wanted: Collection[str] = ()) -> int:
        self.collected.append(set(wanted))
        if len(self.collected) == 1:
            raise Unavailable("the engine is away")
        return 0

    def name_of(self, launch: Launch) -> str:
        return str(launch.task)

    def readings(self) -> tuple[ImageReading, ...]:
        return (ImageReading("abc", present=True),)


def keeper_of(holder: FakeHolder, *, tasks: Collection[int] = ()) -> ImageKeeper:
    assert isinstance(holder, ImageHolder)
    backends = {
        "docker": cast("Backend", SimpleNamespace(images=holder)),
        "process": cast("Backend", SimpleNamespace()),
    }
    live = [cast("Any", SimpleNamespace(launch=SimpleNamespace(task=task))) for task in tasks]
    return ImageKeeper(backends, lambda: live, FakeDownloads().sweep)


def wanted(name: str, digest: str = "d") -> WantedImage:
    version = Version(digest=digest, size=1, pieces="", image="sha256:0")
    return WantedImage(environment=name, version=version)


@pytest.mark.usefixtures("quick")
async def test_an_order_is_met_once_and_however_long_the_engine_is_away() -> None:
    holder = FakeHolder(BackendAway("away"), Unavailable("away"))
    holder.goes_on.clear()
    keeper = keeper_of(holder)
    keeper.pull(wanted("demo"))
    keeper.pull(wanted("demo"))
    holder.goes_on.set()
    await until(lambda: len(holder.fetched) == 3)

    # Once it is met, the same order is a new one.
    def ask_again() -> bool:
        if len(holder.fetched) == 3:
            keeper.pull(wanted("demo"))
        return len(holder.fetched) == 4

    await until(ask_again)
    await keeper.close()
    assert holder.fetched == ["demo"] * 4


@pytest.mark.usefixtures("quick")
async def test_what_cannot_be_brought_is_told_and_left(caplog: pytest.LogCaptureFixture) -> None:
    holder = FakeHolder(BackendFailed("it is damaged"))
    keeper = keeper_of(holder)
    keeper.pull(wanted("demo"))
    await until(lambda: "it is damaged" in caplog.text)
    await keeper.close()
    assert holder.fetched == ["demo"]


async def test_closing_gives_up_what_is_being_brought() -> None:
    holder = FakeHolder()
    holder.goes_on.clear()
    keeper = keeper_of(holder)
    keeper.pull(wanted("demo"))
    await asyncio.sleep(0)
    await keeper.close()
    assert holder.fetched == []


@pytest.mark.usefixtures("quick")
async def test_what_runs_is_wanted_and_a_look_that_fails_is_followed_by_another() -> None:
    holder = FakeHolder()
    keeper = keeper_of(holder, tasks=(4, 5))
    async with asyncio.TaskGroup() as jobs:
        job = jobs.create_task(keeper.run())
        await until(lambda: len(holder.collected) >= 3)
        job.cancel()
    assert holder.collected[2] == {"4", "5"}


async def test_readings_are_those_of_the_backends_that_have_images() -> None:
    assert keeper_of(FakeHolder()).readings() == (ImageReading("abc", present=True),)
