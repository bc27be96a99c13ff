"""Images of a real engine: in and out as streams, what breaks off, what a registry says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kohaku_daemon.dockerd.connection import Dockerd as Connection
from kohaku_daemon.dockerd.errors import EngineAway, EngineRefused, NoSuchImage
from kohaku_daemon.dockerd.images import EngineImages
from protocol.models.environment import Credential
from tests.support.docker_fixtures import TEST_IMAGE, StartDockerds, need_registry
from tests.support.docker_images import big_image, busybox_image
from tests.support.docker_registry import PASSWORD, USER, Registry
from tests.support.dockerds import Dockerd, DockerRefused
from tests.support.packs import no_socket_left


@pytest.fixture
async def images(dockerd: Dockerd) -> AsyncIterator[EngineImages]:
    async with no_socket_left():
        connection = Connection(dockerd.socket)
        await connection.open()
        yield EngineImages(connection)
        await connection.close()


async def in_parts(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def forget(dockerd: Dockerd, *names: str) -> None:
    for name in names:
        with suppress(DockerRefused):  # it is not there
            dockerd.ask("DELETE", f"/images/{name}?force=1")


async def test_what_was_saved_is_loaded_with_the_same_id(
    dockerd: Dockerd, images: EngineImages
) -> None:
    await images.load(in_parts(busybox_image("kept:1", files={"/mark": b"1"})))
    image = await images.find("kept:1")
    saved = b"".join([part async for part in images.save(image)])
    forget(dockerd, "kept:1")
    assert await images.find(image) == ""
    await images.load(in_parts(saved, 1_000_000))
    # Saved by its id, it brought no name along.
    assert (await images.inspect(image))["RepoTags"] == []
    assert await asyncio.to_thread(dockerd.run, image, "cat", "/mark") == (0, "1")
    forget(dockerd, image)


async def test_what_is_not_there_is_named(images: EngineImages) -> None:
    with pytest.raises(NoSuchImage, match="no image absent:1"):
        await images.inspect("absent:1")
    with pytest.raises(NoSuchImage, match="no image absent:1"):
        await anext(images.save("absent:1"))
    assert await images.find("absent:1") == ""


@pytest.mark.parametrize("share", [0.3, 0.97])
async def test_a_stream_that_fails_makes_no_image(
    dockerd: Dockerd, images: EngineImages, share: float
) -> None:
    whole = busybox_image("broken:1", files={"/noise": bytes(range(256)) * 20_000})

    async def breaks() -> AsyncIterator[bytes]:
        async for part in in_parts(whole[: int(len(whole) * share)]):
            yield part
        raise ZeroDivisionError

    before = dockerd.ask("GET", "/images/json?all=1")
    with pytest.raises(ZeroDivisionError):
        await images.load(breaks())
    assert dockerd.ask("GET", "/images/json?all=1") == before


async def test_what_is_no_image_is_refused(images: EngineImages) -> None:
    with pytest.raises(EngineRefused):
        await images.load(in_parts(b"no tar" * 1000))


async def test_a_name_goes_and_an_image_that_is_used_stays(
    dockerd: Dockerd, images: EngineImages
) -> None:
    await images.load(in_parts(busybox_image("used:1", files={"/mark": b"2"})))
    image = await images.find("used:1")
    await images.tag(image, "kohaku/used", "abc")
    assert await images.remove("used:1")
    assert await images.find("kohaku/used:abc") == image
    made = dockerd.ask("POST", "/containers/create", {"Image": image, "Cmd": ["true"]})
    assert not await images.remove("kohaku/used:abc")
    assert await images.find("kohaku/used:abc") == image
    dockerd.ask("DELETE", f"/containers/{made['Id']}")
    assert await images.remove("kohaku/used:abc")
    assert await images.find(image) == ""
    assert await images.remove("kohaku/used:abc"), "it is gone, as was wanted"


async def test_a_reader_who_leaves_half_way_leaves_no_connection(
    dockerd: Dockerd, images: EngineImages, tmp_path: Path
) -> None:
    await asyncio.to_thread(dockerd.load, big_image(tmp_path / "big.tar", "big:1", 20_000_000))
    for _ in range(3):
        saving = images.save("big:1")
        assert await anext(saving)
        await saving.aclose()
    assert await images.find("big:1")
    forget(dockerd, "big:1")


async def test_an_engine_that_dies_while_it_loads_is_away(
    start_dockerds: StartDockerds, tmp_path: Path
) -> None:
    engine = Dockerd()
    start_dockerds(engine)
    connection = Connection(engine.socket)
    await connection.open()
    file = big_image(tmp_path / "big.tar", "big:1", 20_000_000)

    async def parts() -> AsyncIterator[bytes]:
        with file.open("rb") as opened:
            while part := opened.read(1_000_000):
                yield part
                if opened.tell() > 10_000_000:
                    await asyncio.to_thread(engine.kill)

    with pytest.raises(EngineAway):
        await EngineImages(connection).load(parts())
    await connection.close()


class TestRegistry:
    """Pulls from a registry that wants a login."""

    @pytest.fixture(scope="class")
    def pair(self, start_dockerds: StartDockerds) -> tuple[Dockerd, Dockerd]:
        need_registry()
        one, two = Dockerd(), Dockerd()
        start_dockerds(one, two)
        return one, two

    @pytest.fixture(scope="class")
    def registry(
        self, pair: tuple[Dockerd, Dockerd], tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Registry]:
        with Registry(tmp_path_factory.mktemp("registry")) as registry:
            for each in pair:
                registry.serve(each)
            registry.push(pair[0], TEST_IMAGE, "lab/bb:1")
            yield registry

    @pytest.fixture
    async def puller(self, pair: tuple[Dockerd, Dockerd]) -> AsyncIterator[EngineImages]:
        async with no_socket_left():
            connection = Connection(pair[1].socket)
            await connection.open()
            yield EngineImages(connection)
            await connection.close()

    async def test_a_reference_is_resolved_and_pulled_by_digest(
        self, registry: Registry, puller: EngineImages, pair: tuple[Dockerd, Dockerd]
    ) -> None:
        whom = Credential(USER, PASSWORD)
        digest = await puller.resolve(registry.reference("lab/bb:1"), whom)
        pinned = f"{registry.address}/lab/bb@{digest}"
        forget(pair[1], pinned, TEST_IMAGE)
        shares = [share async for share in puller.pull(pinned, whom)]
        assert await puller.find(pinned)
        assert shares == sorted(shares)
        assert shares[-1] == 1.0

    @pytest.mark.parametrize("whom", [None, Credential(USER, "wrong")], ids=["nobody", "wrong"])
    async def test_who_is_not_known_gets_nothing(
        self, registry: Registry, puller: EngineImages, whom: Credential | None
    ) -> None:
        with pytest.raises(EngineRefused, match=r"unauthorized|basic auth"):
            await puller.resolve(registry.reference("lab/bb:1"), whom)

    async def test_what_a_registry_does_not_have_is_refused(
        self, registry: Registry, puller: EngineImages
    ) -> None:
        with pytest.raises(EngineRefused, match="manifest unknown"):
            await puller.resolve(registry.reference("lab/bb:2"), Credential(USER, PASSWORD))
