"""Environments of a real host in a real Docker engine, for tests of more than one part.

Knows: how one is made and packed, how a command in it is run to its end.
Does not know: what any test wants to find out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from protocol.client import Cluster, connect
from protocol.messages.cluster import Topic
from protocol.messages.environment import CreateEnvironment, OneEnvironment, ShellEnd
from protocol.methods import ENVIRONMENT_CREATE, ENVIRONMENT_DELETE, ENVIRONMENT_PACK
from protocol.models.access import Role
from protocol.models.environment import Environment, EnvironmentState
from tests.support.docker_fixtures import TEST_IMAGE
from tests.support.dockerds import Dockerd
from tests.support.host import TOKENS, RunningHost, running_host, until

#: Seconds.
LONGEST_S: Final = 60.0


@asynccontextmanager
async def host_with_engine(
    data: Path, dockerd: Dockerd, **settings: Any
) -> AsyncIterator[RunningHost]:
    """Run a host that makes environments in this engine, and leave nothing in it."""
    async with running_host(data, docker_socket=dockerd.socket, **settings) as host:
        yield host
        async with an_operator(host) as cluster:
            for environment in await cluster.environments():
                await cluster.call(ENVIRONMENT_DELETE, OneEnvironment(environment.name))
            await until(lambda: not left_in(dockerd), "no container is left")


def an_operator(host: RunningHost) -> Cluster:
    """Connect as an operator."""
    return connect(host.url, TOKENS[Role.OPERATOR], patience_s=5.0)


def left_in(dockerd: Dockerd) -> list[str]:
    """Give the names of the containers of environments."""
    return [name for name in dockerd.containers() if name.startswith("kohaku-env-")]


async def settled(
    cluster: Cluster, name: str, seen: Callable[[Environment], object] | None = None
) -> Environment:
    """Give an environment once nothing goes on with it."""
    async with (
        asyncio.timeout(LONGEST_S),
        aclosing(cluster.watch([Topic.ENVIRONMENTS])) as updates,
    ):
        async for update in updates:
            for environment in update.environments:
                if environment.name != name:
                    continue
                if seen is not None:
                    seen(environment)
                if environment.state in {EnvironmentState.READY, EnvironmentState.FAILED}:
                    return await cluster.environment(name)
    raise AssertionError("the watch ended")


async def create(cluster: Cluster, name: str, image: str = TEST_IMAGE) -> Environment:
    """Make an environment, or give what went wrong."""
    await cluster.call(ENVIRONMENT_CREATE, CreateEnvironment(environment=name, image=image))
    return await settled(cluster, name)


async def pack(cluster: Cluster, name: str) -> Environment:
    """Pack an environment, or give what went wrong."""
    await cluster.call(ENVIRONMENT_PACK, OneEnvironment(name))
    return await settled(cluster, name)


async def run(
    cluster: Cluster, name: str, *command: str, typed: bytes = b""
) -> tuple[int, bytes, bytes]:
    """Run a command to its end; give its code and both outputs."""
    out, err = b"", b""
    async with asyncio.timeout(LONGEST_S), cluster.shell(name, command) as shell:
        typing = asyncio.create_task(_type(shell, typed))
        try:
            async for said in shell:
                if isinstance(said, ShellEnd):
                    assert not said.error, said.error
                    return said.code, out, err
                if said.is_error:
                    err += said.data
                else:
                    out += said.data
        finally:
            typing.cancel()
    raise AssertionError("it never ended")


async def _type(shell: Any, typed: bytes) -> None:
    await shell.type(typed)
    await shell.end_input()
