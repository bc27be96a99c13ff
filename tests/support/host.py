"""A real host in the test's event loop, and a runner at its door that does as the test says.

Knows: how a host is started on a free port of loopback, tokens of every role, the runner's
side of the wire.
Does not know: what any test wants to find out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from kohaku_daemon.clock import SystemClock
from kohaku_daemon.core.access.tokens import TokenKind, make_token, token_digest, token_prefix
from kohaku_daemon.core.cluster.records import PutDocument, TokenRecord
from kohaku_daemon.host.config import HostConfig
from kohaku_daemon.host.daemon import run_host
from kohaku_daemon.store.documents import Documents
from protocol.connection import Connection, ItemStream
from protocol.ids import UserName
from protocol.messages.node import MakeJoinToken
from protocol.messages.runner import (
    AttemptReport,
    AttemptState,
    Join,
    Order,
    Orders,
    OrdersEnded,
    OrderStart,
    OrderStream,
    Register,
    Registered,
    Report,
    TakeOrders,
)
from protocol.methods import (
    NODE_JOIN_TOKEN,
    RUNNER_HEARTBEAT,
    RUNNER_JOIN,
    RUNNER_ORDERS,
    RUNNER_REGISTER,
    RUNNER_REPORT,
)
from protocol.models.access import Role
from protocol.models.node import Inventory, Readings
from protocol.models.task import Cause, Exit
from tests.support.builders import an_inventory

#: One token of each role; the user of each is called like the role.
TOKENS: Final = {
    role: make_token(TokenKind.API, bytes([number]) * 32)
    for number, role in enumerate(Role)
    if role is not Role.ANONY
}
_LONGEST_S: Final = 10.0


def a_token_record(token: str, role: Role, **more: Any) -> TokenRecord:
    """Make what the host keeps of a token."""
    user = UserName(more.pop("user", str(role)))
    return TokenRecord(
        digest=token_digest(token), prefix=token_prefix(token), user=user, role=role, **more
    )


def give_tokens(data: Path, *records: TokenRecord) -> None:
    """Put tokens into the cluster.json of a host that does not run."""
    data.mkdir(parents=True, exist_ok=True)
    documents = Documents.open(data / "cluster.json", new_cluster="77")
    documents.apply([PutDocument(record) for record in records])


async def until(holds: Callable[[], object], what: str = "") -> None:
    """Wait until something holds, and fail if it does not in time."""
    deadline = asyncio.get_running_loop().time() + _LONGEST_S
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, f"not in time: {what or holds}"
        await asyncio.sleep(0.005)


@dataclass(slots=True)
class RunningHost:
    """One run of a host."""

    url: str
    data: Path
    _stop: asyncio.Event
    _job: asyncio.Task[None]

    async def connect(self, role: Role = Role.ADMIN, **more: Any) -> Connection:
        """Connect as somebody of a role; ``ANONY`` shows no token."""
        token = "" if role is Role.ANONY else TOKENS[role]
        return await Connection.dial(self.url, token=token, **more)

    async def stop(self) -> None:
        """Stop it, and wait until it has."""
        self._stop.set()
        if not self._job.cancelled():
            await self._job

    async def kill(self) -> None:
        """End it without a last commit."""
        self._job.cancel()
        await asyncio.wait({self._job})

    @property
    def authority(self) -> tuple[str, int]:
        """Address and port."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)


@asynccontextmanager
async def running_host(data: Path, **settings: Any) -> AsyncIterator[RunningHost]:
    """Run a host that knows ``TOKENS``."""
    now = SystemClock().now()
    give_tokens(
        data, *(a_token_record(token, role, created_at=now) for role, token in TOKENS.items())
    )
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    config = HostConfig(data=data, **{"port": 0, **settings})
    job = asyncio.create_task(run_host(config, stop=stop, on_ready=ready.set_result))
    job.add_done_callback(lambda _: ready.cancel())
    try:
        url = await ready
    except asyncio.CancelledError:
        await job  # it failed to start: tell why
        raise
    host = RunningHost(url, data, stop, job)
    try:
        yield host
    finally:
        await host.stop()


@dataclass(slots=True)
class ScriptedRunner:
    """The runner's end of a link. Does nothing by itself but take orders."""

    connection: Connection
    host: RunningHost
    name: str
    credential: str
    orders: asyncio.Queue[Order] = field(default_factory=asyncio.Queue)
    #: How many orders came in each group.
    groups: list[int] = field(default_factory=list)
    _job: asyncio.Task[None] | None = None

    async def register(
        self, inventory: Inventory | None = None, *, instance: str = "first", **more: Any
    ) -> Registered:
        """Say what the node has."""
        register = Register(instance=instance, inventory=inventory or an_inventory(), **more)
        return await self.connection.call(RUNNER_REGISTER, register)

    async def take_orders(self, window: int = 8) -> None:
        """Begin to take orders into the queue."""
        opened = asyncio.Event()
        self._job = asyncio.create_task(self._take(opened, window))
        await opened.wait()

    async def order(self) -> Order:
        """Give the next order."""
        return await asyncio.wait_for(self.orders.get(), _LONGEST_S)

    async def start(self) -> OrderStart:
        """Give the next order, which has to be one to launch."""
        order = await self.order()
        assert isinstance(order, OrderStart), order
        return order

    async def report(self, order: OrderStart, state: AttemptState, **more: Any) -> None:
        """Report on a launch; returns when the host has it for good."""
        report = AttemptReport(task=order.task, attempt=order.attempt, state=state, **more)
        await self.connection.call(RUNNER_REPORT, Report((report,)))

    async def run(self, order: OrderStart) -> None:
        """Report that a launch runs."""
        await self.report(order, AttemptState.RUNNING)

    async def end(self, order: OrderStart, code: int = 0) -> None:
        """Report that a launch ended."""
        await self.report(order, AttemptState.ENDED, exit=Exit(Cause.EXITED, code))

    async def beat(self, **readings: Any) -> None:
        """Send a heartbeat."""
        await self.connection.call(RUNNER_HEARTBEAT, Readings(**readings))

    @asynccontextmanager
    async def dial_back(
        self, order: OrderStream, credential: str | None = None
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse[bool]]:
        """Open the data connection that was ordered."""
        headers = {"Authorization": f"Bearer {credential or self.credential}"}
        url = f"{self.host.url}/v1/runner/stream/{order.stream}"
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(url, headers=headers, compress=0) as socket,
        ):
            yield socket

    async def close(self) -> None:
        """Close the link."""
        if self._job is not None:
            self._job.cancel()
            await asyncio.gather(self._job, return_exceptions=True)
        await self.connection.close()

    async def _take(self, opened: asyncio.Event, window: int) -> None:
        stream: ItemStream[Orders, OrdersEnded]
        async with self.connection.stream(RUNNER_ORDERS, TakeOrders(), window=window) as stream:
            opened.set()
            async for group in stream:
                self.groups.append(len(group.orders))
                for order in group.orders:
                    self.orders.put_nowait(order)


def a_credential(name: str) -> str:
    """Make the credential that the runner of this name uses in tests."""
    return make_token(TokenKind.RUNNER, token_digest(name).encode()[:32])


async def join_token(host: RunningHost, **more: Any) -> str:
    """Have the admin make a join token."""
    async with await host.connect() as admin:
        return (await admin.call(NODE_JOIN_TOKEN, MakeJoinToken(**more))).token


async def dial_runner(
    host: RunningHost, name: str = "n1", *, credential: str = "", is_node: bool = True
) -> ScriptedRunner:
    """Dial the runners' door, with the credential if the runner is a node already."""
    credential = credential or a_credential(name)
    connection = await Connection.dial(
        host.url, token=credential if is_node else "", path="/v1/runner"
    )
    return ScriptedRunner(connection, host, name, credential)


async def join(runner: ScriptedRunner, token: str, **more: Any) -> None:
    """Have a runner ask to become a node."""
    wanted = {"node": runner.name, "credential": runner.credential, **more}
    await runner.connection.call(RUNNER_JOIN, Join(token=token, **wanted))


@asynccontextmanager
async def linked_runner(
    host: RunningHost, name: str = "n1", inventory: Inventory | None = None
) -> AsyncIterator[ScriptedRunner]:
    """Let a new node join, register and take orders."""
    runner = await dial_runner(host, name, is_node=False)
    try:
        await join(runner, await join_token(host))
        await runner.register(inventory)
        await runner.take_orders()
        yield runner
    finally:
        await runner.close()
