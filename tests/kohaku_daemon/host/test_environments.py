"""Environments made and packed by a real host, in a real Docker engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from kohaku_daemon.host import environments
from kohaku_daemon.packing.pieces import PieceReader, list_name, pack_name
from kohaku_daemon.packing.unpacking import unpack
from kohaku_daemon.packing.writer import PackFailed, PackWriter
from protocol.errors import Conflict, NotFound, Unavailable
from protocol.messages.cluster import Topic
from protocol.messages.environment import (
    CreateEnvironment,
    OneEnvironment,
    SetRegistry,
)
from protocol.methods import (
    ENVIRONMENT_CREATE,
    ENVIRONMENT_DELETE,
    ENVIRONMENT_PACK,
    REGISTRY_SET,
)
from protocol.models.environment import EnvironmentState
from tests.support.docker_fixtures import TEST_IMAGE, StartDockerds
from tests.support.docker_images import bare_image
from tests.support.docker_registry import PASSWORD, USER, Registry
from tests.support.dockerds import Dockerd
from tests.support.environments import (
    LONGEST_S,
    an_operator,
    create,
    host_with_engine,
    left_in,
    pack,
    run,
    settled,
)
from tests.support.host import RunningHost, running_host, until


@pytest.fixture
async def host(tmp_path: Path, dockerd: Dockerd) -> AsyncIterator[RunningHost]:
    """A host with the engine of all tests."""
    async with host_with_engine(tmp_path / "data", dockerd) as running:
        yield running


async def test_what_is_done_in_an_environment_is_in_its_next_version(
    host: RunningHost, dockerd: Dockerd
) -> None:
    async with an_operator(host) as cluster:
        made = await create(cluster, "torch")
        assert (made.state, made.trouble, made.versions) == (EnvironmentState.READY, "", ())
        assert (made.source, made.created_by) == (TEST_IMAGE, "operator")

        code, _, _ = await run(cluster, "torch", "sh", "-c", "echo hello > /hello; id -u")
        assert code == 0
        packed = await pack(cluster, "torch")
        assert packed.trouble == ""
        (version,) = packed.versions
        assert version.packed_by == "operator"

        folder = host.data / "environments"
        assert {path.name for path in folder.iterdir()} == {
            pack_name(version.digest), list_name(version.digest)
        }  # fmt: skip
        tar = b"".join([p async for p in unpack(PieceReader(folder, version).pieces())])
        with_images = await asyncio.to_thread(dockerd.ask, "GET", "/images/json?all=1")
        assert [image["Id"] for image in with_images if image["Id"] == version.image] == []
        await asyncio.to_thread(dockerd.load, tar)
        try:
            said = await asyncio.to_thread(dockerd.run, version.image, "cat", "/hello")
            assert said == (0, "hello\n")
            config = dockerd.ask("GET", f"/images/{version.image}/json")["Config"]
            assert config["Cmd"] == ["/bin/sh"]
            assert not config["Entrypoint"]
            # A task's container must not be taken for the environment's own.
            assert not any(config["Labels"].values())
        finally:
            dockerd.ask("DELETE", f"/images/{version.image}")


async def test_progress_is_told_to_those_who_watch(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "_SHOWN_EACH_S", 0.0)
    said: list[str] = []
    async with an_operator(host) as cluster:
        await create(cluster, "torch")
        watching = asyncio.create_task(
            settled(cluster, "torch", lambda seen: said.append(seen.progress))
        )
        await asyncio.wait_for(watching, LONGEST_S)  # it is ready: one look
        async with aclosing(cluster.watch([Topic.ENVIRONMENTS])) as updates:
            async for update in updates:
                if update.ready:
                    await cluster.call(ENVIRONMENT_PACK, OneEnvironment("torch"))
                said += [one.progress for one in update.environments]
                if any(one.versions for one in update.environments):
                    break
        listed = {one.name: one.progress for one in await cluster.environments()}
        assert listed == {"torch": ""}
    assert any(re.fullmatch(r"packing( [0-9]+ %)?", text) for text in said), said


async def test_only_the_newest_versions_are_kept_as_files(tmp_path: Path, dockerd: Dockerd) -> None:
    shared = tmp_path / "shared"
    async with (
        host_with_engine(
            tmp_path / "data", dockerd, shared_dir=shared, environment_versions=2
        ) as host,
        an_operator(host) as cluster,
    ):
        await create(cluster, "torch")
        digests = []
        for _ in range(3):
            await run(cluster, "torch", "sh", "-c", "date +%N >> /file")
            digests.append((await pack(cluster, "torch")).versions[0].digest)
        kept = {pack_name(digest) for digest in digests[1:]}
        folder = shared / "environments"
        await until(lambda: {path.name for path in folder.glob("*.zst")} == kept, "retention")
        assert len([*folder.iterdir()]) == 4

        await cluster.call(ENVIRONMENT_DELETE, OneEnvironment("torch"))
        await until(lambda: not any(folder.iterdir()), "its files are gone")
        with pytest.raises(NotFound):
            await cluster.environment("torch")
    assert left_in(dockerd) == []


async def test_a_host_that_is_killed_takes_up_its_work(
    tmp_path: Path, dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, engine = tmp_path / "data", {"docker_socket": dockerd.socket}
    folder = data / "environments"
    began = asyncio.Event()
    write = PackWriter.write

    async def stall(writer: PackWriter, part: bytes) -> None:
        await write(writer, part)
        began.set()
        await asyncio.Event().wait()

    async with running_host(data, **engine) as host, an_operator(host) as cluster:
        await create(cluster, "torch")
        monkeypatch.setattr(PackWriter, "write", stall)
        monkeypatch.setattr(environments, "_FAREWELL_S", 0.0)  # it has no time for its image
        await cluster.call(ENVIRONMENT_PACK, OneEnvironment("torch"))
        await asyncio.wait_for(began.wait(), LONGEST_S)
        await host.kill()
    monkeypatch.undo()
    (folder / ".unfinished-0").write_bytes(b"of a host that lost its power")
    (folder / pack_name("f" * 64)).write_bytes(b"renamed, and never told of")

    async with host_with_engine(data, dockerd) as host, an_operator(host) as cluster:
        again = await settled(cluster, "torch")
        assert (again.trouble, len(again.versions)) == ("", 1)
        digest = again.versions[0].digest
        assert {path.name for path in folder.iterdir()} == {pack_name(digest), list_name(digest)}
        images = await asyncio.to_thread(dockerd.ask, "GET", "/images/json?all=1")
        tags = [tag for image in images for tag in image["RepoTags"] or ()]
        assert not [tag for tag in tags if tag.startswith("kohaku-packing")]
        await cluster.call(ENVIRONMENT_DELETE, OneEnvironment("torch"))
        await until(lambda: not left_in(dockerd), "deleted")


async def test_a_host_that_is_killed_while_it_makes_one_goes_on(
    tmp_path: Path, dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = asyncio.Event()

    async def stall(self: Any, *_: Any) -> None:
        made.set()
        await asyncio.Event().wait()

    engine = {"docker_socket": dockerd.socket}
    async with running_host(tmp_path / "data", **engine) as host, an_operator(host) as cluster:
        monkeypatch.setattr(environments.Workshop, "_make_container", stall)
        wanted = CreateEnvironment(environment="torch", image=TEST_IMAGE)
        await cluster.call(ENVIRONMENT_CREATE, wanted)
        await asyncio.wait_for(made.wait(), LONGEST_S)
        await host.kill()
    monkeypatch.undo()
    async with host_with_engine(tmp_path / "data", dockerd) as host, an_operator(host) as cluster:
        assert (await settled(cluster, "torch")).state is EnvironmentState.READY
        await cluster.call(ENVIRONMENT_DELETE, OneEnvironment("torch"))
        await until(lambda: not left_in(dockerd), "deleted")


async def test_one_that_is_being_made_is_given_up_when_it_is_deleted(
    host: RunningHost, dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def stall(self: Any, *_: Any) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(environments.Workshop, "_bring", stall)
    async with an_operator(host) as cluster:
        wanted = CreateEnvironment(environment="torch", image=TEST_IMAGE)
        await cluster.call(ENVIRONMENT_CREATE, wanted)
        await asyncio.wait_for(began.wait(), LONGEST_S)
        await cluster.call(ENVIRONMENT_DELETE, OneEnvironment("torch"))
        await asyncio.wait_for(ended.wait(), LONGEST_S)
        documents = host.data / "cluster.json"
        await until(lambda: '"torch"' not in documents.read_text(), "it is forgotten")
        monkeypatch.undo()
        assert (await create(cluster, "torch")).state is EnvironmentState.READY


async def test_a_container_that_is_gone_is_told_and_made_again(
    host: RunningHost, dockerd: Dockerd
) -> None:
    async with an_operator(host) as cluster:
        await create(cluster, "torch")
        first = (await pack(cluster, "torch")).versions
        (container,) = dockerd.containers().values()
        dockerd.ask("DELETE", f"/containers/{container}?force=1")
        with pytest.raises(Conflict, match="is not on the host machine any more"):
            await run(cluster, "torch", "true")
        gone = await pack(cluster, "torch")
        assert gone.state is EnvironmentState.FAILED
        assert "kohaku environment create torch --from" in gone.trouble
        again = await create(cluster, "torch")
        assert (again.state, again.versions) == (EnvironmentState.READY, first)
        assert (await run(cluster, "torch", "echo", "there"))[1] == b"there\n"


async def test_containers_of_others_are_left_alone(host: RunningHost, dockerd: Dockerd) -> None:
    labels = {"kohaku.environment": "torch", "kohaku.cluster": "another"}
    body = {"Image": TEST_IMAGE, "Cmd": ["true"], "Labels": labels}
    other = dockerd.ask("POST", "/containers/create?name=kohaku-env-torch", body)["Id"]
    try:
        async with an_operator(host) as cluster:
            await create(cluster, "torch")
            own = [one for one in dockerd.containers() if one != "kohaku-env-torch"]
            assert own == ["kohaku-env-torch-77"]
            await cluster.call(ENVIRONMENT_DELETE, OneEnvironment("torch"))
            await until(lambda: list(dockerd.containers()) == ["kohaku-env-torch"], "deleted")
    finally:
        dockerd.ask("DELETE", f"/containers/{other}")


async def test_an_image_without_a_shell_is_packed_and_not_entered(
    host: RunningHost, dockerd: Dockerd
) -> None:
    await asyncio.to_thread(dockerd.load, bare_image("bare:1"))
    try:
        async with an_operator(host) as cluster:
            made = await create(cluster, "bare", "bare:1")
            assert made.state is EnvironmentState.READY
            with pytest.raises(Conflict, match="cannot be entered: there is no sh in bare:1"):
                await run(cluster, "bare")
            packed = await pack(cluster, "bare")
            assert (packed.trouble, len(packed.versions)) == ("", 1)
            await cluster.call(ENVIRONMENT_DELETE, OneEnvironment("bare"))
            await until(lambda: not left_in(dockerd), "deleted")
    finally:
        dockerd.ask("DELETE", "/images/bare:1")


async def test_without_an_engine_it_is_said_what_to_install(tmp_path: Path) -> None:
    nowhere = tmp_path / "no.sock"
    async with (
        running_host(tmp_path / "data", docker_socket=nowhere) as host,
        an_operator(host) as cluster,
    ):
        wanted = CreateEnvironment(environment="torch", image=TEST_IMAGE)
        with pytest.raises(Unavailable, match="there is no Docker engine at") as caught:
            await cluster.call(ENVIRONMENT_CREATE, wanted)
        assert "apt install docker.io" in caught.value.hint
        assert await cluster.environments() == ()


async def test_an_image_that_is_not_there_is_named_with_what_to_do(
    host: RunningHost, dockerd: Dockerd
) -> None:
    async with an_operator(host) as cluster:
        made = await create(cluster, "torch", "127.0.0.1:1/lab/torch:1")
        assert made.state is EnvironmentState.FAILED
        assert made.trouble.startswith("image 127.0.0.1:1/lab/torch:1 cannot be pulled: ")
        assert "can the host machine reach that registry" in made.trouble
        again = await create(cluster, "torch")
        assert (again.state, again.trouble) == (EnvironmentState.READY, "")


async def test_an_image_is_pulled_under_the_name_the_cluster_has_there(
    host: RunningHost, dockerd: Dockerd, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry", port=5017)
    try:
        await asyncio.to_thread(registry.serve, dockerd)
        await asyncio.to_thread(registry.push, dockerd, TEST_IMAGE, "lab/bb:1")
        reference = registry.reference("lab/bb:1")
        async with an_operator(host) as cluster:
            refused = await create(cluster, "torch", reference)
            assert refused.state is EnvironmentState.FAILED
            assert f"kohaku registry set {registry.address} --username" in refused.trouble

            account = SetRegistry(registry=registry.address, username=USER, password=PASSWORD)
            await cluster.call(REGISTRY_SET, account)
            made = await create(cluster, "torch", reference)
            assert (made.state, made.trouble) == (EnvironmentState.READY, "")
            await cluster.call(ENVIRONMENT_DELETE, OneEnvironment("torch"))
            await until(lambda: not left_in(dockerd), "deleted")
        dockerd.ask("DELETE", f"/images/{reference}")
    finally:
        await asyncio.to_thread(registry.close)
    assert PASSWORD not in (host.data / "tasks.sqlite").read_bytes().decode(errors="replace")


async def test_a_full_disk_is_told_and_leaves_nothing(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(writer: PackWriter, part: bytes) -> None:
        raise PackFailed("no environment can be written: no space left", hint="make room")

    async with an_operator(host) as cluster:
        await create(cluster, "torch")
        monkeypatch.setattr(PackWriter, "write", full)
        packed = await pack(cluster, "torch")
        assert packed.state is EnvironmentState.READY
        assert packed.trouble == "no environment can be written: no space left; make room"
        assert packed.versions == ()
        assert [*(host.data / "environments").iterdir()] == []
        monkeypatch.undo()
        assert (await pack(cluster, "torch")).trouble == ""


async def test_an_engine_that_stops_in_the_middle_is_told_and_the_next_try_succeeds(
    tmp_path: Path, start_dockerds: StartDockerds, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Dockerd()
    await asyncio.to_thread(start_dockerds, own)
    async with host_with_engine(tmp_path / "data", own) as host, an_operator(host) as cluster:
        await create(cluster, "torch")
        write = PackWriter.write

        async def stop_first(writer: PackWriter, part: bytes) -> None:
            monkeypatch.undo()
            await asyncio.to_thread(own.kill)
            await write(writer, part)

        monkeypatch.setattr(PackWriter, "write", stop_first)
        packed = await pack(cluster, "torch")
        assert packed.state is EnvironmentState.READY
        assert "Docker engine" in packed.trouble
        assert [*(host.data / "environments").iterdir()] == []
        with pytest.raises(Unavailable, match="Docker engine"):
            await cluster.call(ENVIRONMENT_PACK, OneEnvironment("torch"))

        await asyncio.to_thread(own.start)
        await asyncio.to_thread(own.wait_ready)
        again = await pack(cluster, "torch")
        assert (again.trouble, len(again.versions)) == ("", 1)
        assert (await run(cluster, "torch", "echo", "there"))[1] == b"there\n"
