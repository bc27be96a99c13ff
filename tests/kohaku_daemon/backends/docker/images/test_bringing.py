"""Images in a real engine: brought once for all, never half, and removed when nobody uses them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from kohaku_daemon.backends.base import BackendAway, BackendFailed
from kohaku_daemon.backends.docker.images.bringing import Images
from kohaku_daemon.clock import SystemClock
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.dockerd.connection import Dockerd as Connection
from kohaku_daemon.packing.pieces import PieceReader
from kohaku_daemon.packing.unpacking import unpack
from kohaku_daemon.supervise import spawn
from protocol.errors import Conflict
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import PinnedImage
from protocol.models.environment import Credential, ImageReading, Version, WantedImage
from tests.support.builders import a_spec
from tests.support.docker_fixtures import TEST_IMAGE, StartDockerds, need_registry
from tests.support.docker_images import busybox_image
from tests.support.docker_registry import PASSWORD, USER, Registry
from tests.support.dockerds import Dockerd, DockerRefused
from tests.support.host import until
from tests.support.packs import damage, no_socket_left, pack_image


class FolderSource:
    """A source that reads a folder, and holds back what a test wants held back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun = self.ended = 0
        self.forgotten: list[str] = []
        #: Cleared: no piece after the first is given.
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.pins: dict[BatchId, str] = {}
        self.pinned: list[tuple[BatchId, str, str]] = []
        self.credential: Credential | None = None
        self.is_away = False

    async def pieces(self, version: Version) -> AsyncGenerator[bytes]:
        self.begun += 1
        try:
            async for piece in PieceReader(self.folder, version).pieces():
                yield piece
                await self.goes_on.wait()
        finally:
            self.ended += 1

    async def forget(self, version: Version) -> None:
        self.forgotten.append(version.digest)

    async def pin(self, batch: BatchId, reference: str, digest: str = "") -> PinnedImage:
        self.pinned.append((batch, reference, digest))
        if self.is_away:
            raise BackendAway("no link")
        if batch == 404:
            raise Conflict("batch 404 does not run it")
        if digest:
            self.pins.setdefault(batch, digest)
        return PinnedImage(self.pins.get(batch, ""), self.credential)


class FakeClock(SystemClock):
    """The machine's, and as much later as a test says."""

    later_s = 0.0

    def now(self) -> float:
        return super().now() + self.later_s


class Rig:
    """One engine with images that are brought to it."""

    def __init__(self, dockerd: Dockerd, folder: Path, **more: Any) -> None:
        self.dockerd = dockerd
        self.connection = Connection(dockerd.socket)
        self.source = FolderSource(folder / "environments")
        self.notes = folder / "images.json"
        self.clock = FakeClock()
        self.more = more
        self.images = self.begin()
        self.said: list[str] = []

    def begin(self) -> Images:
        return Images(self.connection, self.source, notes=self.notes, clock=self.clock, **self.more)

    async def version(self, name: str, size: int = 6_000_000, **more: Any) -> Version:
        """Pack an image that nobody has."""
        files = {f"/{name}": os.urandom(size)}
        return await pack_image(self.source.folder, busybox_image("any:1", files=files, **more))

    async def bring(self, launch: Launch) -> str:
        await self.images.bring(launch, self.said.append)
        return await self.images.find(launch)

    def has(self, name: str) -> bool:
        with suppress(DockerRefused):
            self.dockerd.ask("GET", f"/images/{name}/json")
            return True
        return False

    def forget(self, *names: str) -> None:
        for name in names:
            with suppress(DockerRefused):
                self.dockerd.ask("DELETE", f"/images/{name}?force=1")

    def count(self) -> int:
        return len(self.dockerd.ask("GET", "/images/json?all=1"))


def launch_of(version: Version, name: str = "demo", **more: Any) -> Launch:
    return a_launch(WantedImage(environment=name, version=version), **more)


def a_launch(image: WantedImage | None, *, task: int = 1, batch: int = 9) -> Launch:
    return Launch(task=TaskId(task), attempt=1, batch=BatchId(batch), spec=a_spec(), image=image)


@pytest.fixture
async def rig(dockerd: Dockerd, tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(dockerd, tmp_path)
    before = {image["Id"] for image in dockerd.ask("GET", "/images/json?all=1")}
    async with no_socket_left():
        await rig.connection.open()
        await rig.images.open()
        yield rig
        await rig.images.close()
        await rig.connection.close()
    rig.forget(*({image["Id"] for image in dockerd.ask("GET", "/images/json?all=1")} - before))


# Environments -------------------------------------------------------------------------


async def test_an_environment_is_brought_and_runs(rig: Rig) -> None:
    version = await rig.version("mark")
    image = await rig.bring(launch_of(version))
    assert image == version.image
    assert (await asyncio.to_thread(rig.dockerd.run, image, "ls", "/mark"))[0] == 0
    assert rig.has(f"kohaku/demo:{version.digest[:12]}")
    assert rig.said[0] == "preparing 0 %"
    assert rig.said[-1] == "preparing 99 %"
    assert len(rig.said) >= 3
    assert rig.images.readings() == (ImageReading(version.digest, present=True),)
    assert rig.source.forgotten == [version.digest]


async def test_what_is_here_is_not_brought_again(rig: Rig) -> None:
    version = await rig.version("mark")
    await rig.bring(launch_of(version))
    again = rig.begin()  # a restart
    await again.open()
    await again.bring(launch_of(version), rig.said.append)
    assert rig.source.begun == 1
    assert again.readings() == (ImageReading(version.digest, present=True),)


async def test_a_launch_without_image_wants_nothing(rig: Rig) -> None:
    await rig.images.bring(a_launch(None), rig.said.append)
    assert rig.said == []


async def test_twenty_tasks_are_one_download(rig: Rig) -> None:
    version = await rig.version("mark")
    found = await asyncio.gather(
        *(rig.bring(launch_of(version, task=task)) for task in range(1, 21))
    )
    assert found == [version.image] * 20
    assert rig.source.begun == 1


async def test_two_images_load_side_by_side(rig: Rig) -> None:
    one, two = await rig.version("one"), await rig.version("two")
    rig.source.goes_on.clear()
    jobs = [spawn(rig.bring(launch_of(version)), name="bring") for version in (one, two)]
    await until(lambda: rig.source.begun == 2)
    coming = rig.images.readings()
    assert {reading.digest for reading in coming} == {one.digest, two.digest}
    assert not any(reading.present for reading in coming)
    rig.source.goes_on.set()
    assert await asyncio.gather(*jobs) == [one.image, two.image]


async def test_it_goes_on_while_anybody_waits_and_no_longer(rig: Rig) -> None:
    version = await rig.version("mark")
    rig.source.goes_on.clear()
    jobs = [spawn(rig.bring(launch_of(version)), name="bring") for _ in range(2)]
    await until(lambda: rig.source.begun == 1)
    jobs[0].cancel()
    await asyncio.sleep(0)
    assert rig.source.ended == 0
    jobs[1].cancel()
    await until(lambda: rig.source.ended == 1)
    await asyncio.gather(*jobs, return_exceptions=True)
    assert not rig.has(version.image)
    assert rig.images.readings() == ()
    rig.source.goes_on.set()
    assert await rig.bring(launch_of(version)) == version.image


async def test_a_damaged_file_is_named_and_makes_no_image(rig: Rig) -> None:
    version = await rig.version("mark")
    damage(rig.source.folder, version, 1)
    before = rig.count()
    with pytest.raises(BackendFailed, match="pack it again: kohaku environment pack demo") as told:
        await rig.bring(launch_of(version))
    assert f"{version.digest}.tar.zst is damaged: piece 1 of 2" in told.value.message
    assert rig.count() == before
    (reading,) = rig.images.readings()
    assert reading.trouble == told.value.message
    damage(rig.source.folder, version, 1)  # the same bit back
    assert await rig.bring(launch_of(version)) == version.image
    assert rig.images.readings() == (ImageReading(version.digest, present=True),)


async def test_a_file_that_holds_another_image_is_told(rig: Rig) -> None:
    version = replace(await rig.version("mark", 1000), image="sha256:" + "0" * 64)
    with pytest.raises(BackendFailed, match="holds another image"):
        await rig.bring(launch_of(version))


async def test_an_image_that_was_removed_by_hand_is_brought_again(rig: Rig) -> None:
    version = await rig.version("mark")
    launch = launch_of(version)
    await rig.bring(launch)
    rig.forget(version.image)
    with pytest.raises(BackendFailed, match="removed from this node"):
        await rig.images.find(launch)
    await rig.images.collect()
    assert rig.images.readings() == ()
    assert await rig.bring(launch) == version.image
    assert rig.source.begun == 2


async def test_what_came_after_it_was_given_up_is_found_and_named(rig: Rig) -> None:
    """The engine goes on with what it has whole, though nobody listens any more."""
    version = await rig.version("mark")
    rig.source.goes_on.clear()
    job = spawn(rig.bring(launch_of(version)), name="bring")
    await until(lambda: rig.source.begun == 1)
    job.cancel()
    await until(lambda: rig.source.ended == 1)
    assert rig.images.readings() == ()
    reader = PieceReader(rig.source.folder, version)
    rig.dockerd.load(b"".join([part async for part in unpack(reader.pieces())]))
    await rig.images.collect()
    assert rig.images.readings() == (ImageReading(version.digest, present=True),)
    assert rig.has(f"kohaku/demo:{version.digest[:12]}")


async def test_an_engine_that_is_away_is_no_fault_of_the_image(
    start_dockerds: StartDockerds, tmp_path: Path
) -> None:
    engine = Dockerd()
    start_dockerds(engine)
    rig = Rig(engine, tmp_path)
    await rig.connection.open()
    version = await rig.version("mark")
    rig.source.goes_on.clear()
    job = spawn(rig.bring(launch_of(version)), name="bring")
    await until(lambda: rig.source.begun == 1)
    await asyncio.to_thread(engine.kill)
    rig.source.goes_on.set()
    with pytest.raises(BackendAway):
        await job
    with pytest.raises(BackendAway):
        await rig.bring(launch_of(version))
    await asyncio.to_thread(engine.start)
    await asyncio.to_thread(engine.wait_ready)
    assert await rig.bring(launch_of(version)) == version.image
    await rig.images.close()
    await rig.connection.close()


# A disk that is short -----------------------------------------------------------------


class TestSmallDisk:
    """An engine with a disk of 80 MiB."""

    @pytest.fixture
    async def small(self, tmp_path: Path) -> AsyncIterator[Rig]:
        engine = Dockerd(disk_mib=80)
        try:
            await asyncio.to_thread(engine.start)
            await asyncio.to_thread(engine.wait_ready)
            rig = Rig(engine, tmp_path)
            async with no_socket_left():
                await rig.connection.open()
                yield rig
                await rig.images.close()
                await rig.connection.close()
        finally:
            await asyncio.to_thread(engine.close)

    async def test_no_room_is_told_with_the_disk_and_leaves_nothing(self, small: Rig) -> None:
        version = await small.version("large", 60_000_000)
        with pytest.raises(BackendFailed, match="no space left for environment demo") as told:
            await small.bring(launch_of(version))
        assert str(small.dockerd.data_root) in told.value.message
        assert "docker system df" in told.value.message
        assert small.count() == 0
        assert small.source.forgotten == [version.digest]
        (reading,) = small.images.readings()
        assert "no space left" in reading.trouble

    async def test_unused_images_make_room(self, small: Rig) -> None:
        old = await small.version("old", 20_000_000)
        await small.bring(launch_of(old))
        small.clock.later_s = 3600
        new = await small.version("new", 32_000_000)
        assert await small.bring(launch_of(new, "other")) == new.image
        assert not small.has(old.image)

    async def test_images_in_use_do_not(self, small: Rig) -> None:
        old = await small.version("old", 20_000_000)
        await small.bring(launch_of(old))
        made = small.dockerd.ask("POST", "/containers/create", {"Image": old.image})
        small.clock.later_s = 3600
        new = await small.version("new", 32_000_000)
        with pytest.raises(BackendFailed, match="no space left"):
            await small.bring(launch_of(new, "other"))
        assert small.has(old.image)
        assert made["Id"]


async def test_when_the_disk_is_short_the_one_unused_longest_goes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [await rig.version(name, 1000) for name in ("one", "two", "three", "four")]
    for version in versions:
        await rig.bring(launch_of(version))
        rig.clock.later_s += 100
    one, two, three, four = versions
    await rig.images.find(launch_of(one))  # now two is the oldest
    made = rig.dockerd.ask("POST", "/containers/create", {"Image": two.image, "Cmd": ["true"]})
    rig.clock.later_s += 3600
    rest = iter([True, False, True])

    async def is_short(_: Images) -> bool:
        return next(rest)

    monkeypatch.setattr(Images, "_is_short", is_short)
    wanted = rig.images.name_of(launch_of(three))
    assert await rig.images.collect([wanted]) == 1
    assert [rig.has(version.image) for version in versions] == [True, True, True, False]
    assert rig.has(TEST_IMAGE), "what this node did not bring is not its own to remove"
    rig.dockerd.ask("DELETE", f"/containers/{made['Id']}")
    assert four.image not in str(rig.images.readings())


async def test_what_was_just_used_stays(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    version = await rig.version("mark", 1000)
    await rig.bring(launch_of(version))

    async def is_short(_: Images) -> bool:
        return True

    monkeypatch.setattr(Images, "_is_short", is_short)
    assert await rig.images.collect() == 0
    assert rig.has(version.image)


async def test_a_disk_with_room_keeps_all(rig: Rig) -> None:
    version = await rig.version("mark", 1000)
    await rig.bring(launch_of(version))
    rig.clock.later_s = 1e9
    rig.images._free = 0
    assert await rig.images.collect() == 0
    rig.images._free = 2**62  # 10 % of the disk then
    before = rig.has(version.image)
    await rig.images.collect()
    assert before


# Registries ---------------------------------------------------------------------------


class TestRegistry:
    """A registry that wants a login."""

    @pytest.fixture(scope="class")
    def engine(self, start_dockerds: StartDockerds) -> Dockerd:
        need_registry()
        engine = Dockerd()
        start_dockerds(engine)
        engine.load(busybox_image("second:1", files={"/second": b"2"}))
        return engine

    @pytest.fixture(scope="class")
    def registry(
        self, engine: Dockerd, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Registry]:
        with Registry(tmp_path_factory.mktemp("registry")) as registry:
            registry.serve(engine)
            yield registry

    @pytest.fixture
    async def rig(self, engine: Dockerd, registry: Registry, tmp_path: Path) -> AsyncIterator[Rig]:
        registry.push(engine, TEST_IMAGE, "lab/bb:1")
        rig = Rig(engine, tmp_path)
        rig.source.credential = Credential(USER, PASSWORD)
        async with no_socket_left():
            await rig.connection.open()
            yield rig
            await rig.images.close()
            await rig.connection.close()

    def wanted(self, registry: Registry, name: str, **more: Any) -> Launch:
        return a_launch(WantedImage(reference=registry.reference(name)), **more)

    async def test_an_image_is_pulled_by_digest_and_pinned(
        self, rig: Rig, registry: Registry
    ) -> None:
        image = await rig.bring(self.wanted(registry, "lab/bb:1"))
        assert rig.has(image)
        first, second = rig.source.pinned
        assert first == (9, registry.reference("lab/bb:1"), "")
        assert second[2].startswith("sha256:")
        assert rig.images.name_of(self.wanted(registry, "lab/bb:1")).endswith(second[2])
        await rig.bring(self.wanted(registry, "lab/bb:1", task=2))
        assert len(rig.source.pinned) == 2, "what is here is not asked for again"

    async def test_a_batch_runs_one_image_though_the_tag_moves(
        self, rig: Rig, registry: Registry
    ) -> None:
        before = await rig.bring(self.wanted(registry, "lab/bb:1"))
        registry.push(rig.dockerd, "second:1", "lab/bb:1")
        other_node = rig.begin()
        launch = self.wanted(registry, "lab/bb:1", task=2)
        await other_node.bring(launch, print)
        assert await other_node.find(launch) == before
        later = await rig.bring(self.wanted(registry, "lab/bb:1", batch=10))
        assert later != before

    async def test_the_first_word_of_another_node_counts(
        self, rig: Rig, registry: Registry
    ) -> None:
        pinned = registry.push(rig.dockerd, "second:1", "lab/bb:2").partition("@")[2]
        rig.source.pins[BatchId(9)] = pinned
        await rig.bring(self.wanted(registry, "lab/bb:1"))
        assert rig.images.name_of(self.wanted(registry, "lab/bb:1")).endswith(pinned)

    async def test_a_digest_in_the_reference_is_taken_at_its_word(
        self, rig: Rig, registry: Registry
    ) -> None:
        pinned = registry.push(rig.dockerd, "second:1", "lab/bb:3")
        launch = a_launch(WantedImage(reference=pinned))
        await rig.bring(launch)
        assert rig.images.name_of(launch) == pinned

    async def test_twenty_tasks_ask_once(self, rig: Rig, registry: Registry) -> None:
        await asyncio.gather(
            *(rig.bring(self.wanted(registry, "lab/bb:1", task=task)) for task in range(1, 21))
        )
        assert len(rig.source.pinned) == 2

    @pytest.mark.parametrize("credential", [None, Credential(USER, "wrong")])
    async def test_a_registry_that_refuses_is_told_with_what_to_do(
        self, rig: Rig, registry: Registry, credential: Credential | None
    ) -> None:
        rig.source.credential = credential
        with pytest.raises(BackendFailed, match=f"kohaku registry set {registry.address}") as told:
            await rig.bring(self.wanted(registry, "lab/bb:1"))
        assert "wrong" not in told.value.message
        assert not rig.source.pins

    async def test_an_image_that_does_not_exist_is_named(
        self, rig: Rig, registry: Registry
    ) -> None:
        with pytest.raises(BackendFailed, match=r"there is no image .*lab/bb:77 in"):
            await rig.bring(self.wanted(registry, "lab/bb:77"))

    async def test_what_is_no_reference_is_told(self, rig: Rig) -> None:
        launch = a_launch(WantedImage(reference="Not/A Reference"))
        with pytest.raises(BackendFailed, match="is not a reference to an image"):
            await rig.bring(launch)

    async def test_a_registry_that_is_not_there_is_told(self, rig: Rig) -> None:
        with pytest.raises(BackendFailed, match=r"127\.0\.0\.1:9, the registry of image"):
            await rig.bring(a_launch(WantedImage(reference="127.0.0.1:9/x:1")))

    async def test_a_host_that_is_away_is_no_fault_of_the_image(
        self, rig: Rig, registry: Registry
    ) -> None:
        rig.source.is_away = True
        with pytest.raises(BackendAway):
            await rig.bring(self.wanted(registry, "lab/bb:1"))
        rig.source.is_away = False
        with pytest.raises(BackendFailed, match="batch 404 does not run it"):
            await rig.bring(self.wanted(registry, "lab/bb:1", batch=404))

    async def test_pulled_images_are_collected_and_those_of_people_are_not(
        self, rig: Rig, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await asyncio.to_thread(registry.push, rig.dockerd, "second:1", "lab/bb:4")
        launch = self.wanted(registry, "lab/bb:4")
        image = await rig.bring(launch)

        async def is_short(_: Images) -> bool:
            return True

        monkeypatch.setattr(Images, "_is_short", is_short)
        rig.clock.later_s = 3600
        await rig.images.collect()
        assert rig.has("second:1"), "somebody loaded it under this name"
        assert rig.has(image)
