"""Environments as clients read them, and as runners are told of them; no engine is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from kohaku_daemon.core.cluster.records import EnvironmentRecord, PutDocument
from kohaku_daemon.store.documents import Documents
from protocol.client import connect
from protocol.errors import NotFound
from protocol.messages.cluster import Topic, Update
from protocol.messages.environment import (
    ListEnvironments,
    OneEnvironment,
    PullEnvironment,
)
from protocol.messages.runner import OrderPull
from protocol.methods import (
    ENVIRONMENT_DELETE,
    ENVIRONMENT_LIST,
    ENVIRONMENT_PULL,
    ENVIRONMENT_SHOW,
)
from protocol.models.access import Role
from protocol.models.environment import EnvironmentState, ImageReading, Presence, Version
from protocol.models.node import BackendInfo
from protocol.models.task import TaskSpec
from tests.support.builders import an_inventory
from tests.support.host import TOKENS, RunningHost, linked_runner, running_host, until

VERSION = Version(digest="ab" * 32, size=5, pieces="cd" * 32, image="sha256:" + "ef" * 32)
DOCKER = an_inventory(backends=[BackendInfo("docker")])


def an_environment(name: str, **more: object) -> EnvironmentRecord:
    """Make one that was packed."""
    plain = {"source": "python:3.12", "state": EnvironmentState.READY, "versions": (VERSION,)}
    return EnvironmentRecord(name=name, **{**plain, **more})  # type: ignore[arg-type]


def give(data: Path, *records: EnvironmentRecord) -> None:
    """Put environments into the cluster.json of a host that does not run."""
    data.mkdir(parents=True, exist_ok=True)
    documents = Documents.open(data / "cluster.json", new_cluster="77")
    documents.apply([PutDocument(record) for record in records])


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RunningHost]:
    """A host that knows two environments and has no engine."""
    give(tmp_path / "data", an_environment("torch"), an_environment("jax", versions=()))
    socket = tmp_path / "no.sock"
    async with running_host(tmp_path / "data", docker_socket=socket) as running:
        yield running


async def test_many_are_listed_in_pages(tmp_path: Path) -> None:
    data = tmp_path / "data"
    names = [f"e{number:04}" for number in range(900)]
    give(data, *(an_environment(name, source="x" * 400) for name in names))
    async with (
        running_host(data) as host,
        connect(host.url, TOKENS[Role.VIEWER]) as cluster,
    ):
        first = await cluster.call(ENVIRONMENT_LIST, ListEnvironments())
        assert first.more
        assert [one.name for one in await cluster.environments()] == names
        async with aclosing(cluster.watch([Topic.ENVIRONMENTS])) as updates:
            seen: list[str] = []
            async for update in updates:
                seen += [one.name for one in update.environments]
                if update.ready:
                    break
        assert seen == names


async def test_what_changes_is_told_to_those_who_watch(host: RunningHost) -> None:
    told: asyncio.Queue[Update] = asyncio.Queue()

    async def read() -> None:
        async with connect(host.url, TOKENS[Role.VIEWER]) as viewer:
            async for update in viewer.watch([Topic.ENVIRONMENTS]):
                told.put_nowait(update)

    reading = asyncio.create_task(read())
    try:
        names: list[str] = []
        while not (update := await asyncio.wait_for(told.get(), 10)).ready:
            names += [one.name for one in update.environments]
        assert names == ["jax", "torch"]
        async with await host.connect(Role.OPERATOR) as operator:
            await operator.call(ENVIRONMENT_DELETE, OneEnvironment("jax"))
        update = await asyncio.wait_for(told.get(), 10)
        assert (update.gone_environments, update.environments) == (("jax",), ())
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_a_deleted_one_is_forgotten_also_without_an_engine(host: RunningHost) -> None:
    folder = host.data / "environments"
    folder.mkdir(exist_ok=True)
    async with await host.connect(Role.OPERATOR) as operator:
        await operator.call(ENVIRONMENT_DELETE, OneEnvironment("torch"))
        with pytest.raises(NotFound, match="no environment is called 'torch'"):
            await operator.call(ENVIRONMENT_SHOW, OneEnvironment("torch"))
        path = host.data / "cluster.json"
        await until(lambda: '"torch"' not in path.read_text(), "it is forgotten")


async def test_nodes_are_told_to_pull_and_say_how_far_they_are(host: RunningHost) -> None:
    async with linked_runner(host, inventory=DOCKER) as runner, await host.connect() as admin:
        told = await admin.call(ENVIRONMENT_PULL, PullEnvironment(environment="torch"))
        assert told.nodes == ("n1",)
        order = await runner.order()
        assert isinstance(order, OrderPull)
        assert (order.image.environment, order.image.version) == ("torch", VERSION)

        await runner.beat(images=(ImageReading(VERSION.digest, percent=41.7),))
        shown = (await admin.call(ENVIRONMENT_SHOW, OneEnvironment("torch"))).environment
        assert [(one.node, one.state) for one in shown.nodes] == [("n1", "42 %")]
        await runner.beat(images=(ImageReading(VERSION.digest, present=True),))
        shown = (await admin.call(ENVIRONMENT_SHOW, OneEnvironment("torch"))).environment
        assert shown.nodes == (Presence(shown.nodes[0].node, "present"),)


async def test_a_task_is_ordered_with_the_version_it_runs_in(host: RunningHost) -> None:
    async with (
        linked_runner(host, inventory=DOCKER) as runner,
        connect(host.url, TOKENS[Role.USER]) as cluster,
    ):
        await cluster.submit(TaskSpec(command=("true",), container="torch"))
        order = await runner.start()
        assert order.image is not None
        assert (order.image.environment, order.image.version) == ("torch", VERSION)
        assert not order.trusted
