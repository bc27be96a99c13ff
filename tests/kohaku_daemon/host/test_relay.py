"""Data connections: tickets, runners that dial back, and readers that stall or go away."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from kohaku_daemon.host import relay, streams
from protocol.client import Cluster, connect
from protocol.connection import Connection, DataStream
from protocol.errors import Forbidden, NotFound, Unauthenticated, Unavailable
from protocol.framing import MAX_CHUNK, decode_value
from protocol.ids import NodeName, TaskId
from protocol.messages.node import OneNode
from protocol.messages.runner import OrderStream
from protocol.messages.stream import LogChunk, LogEnd, LogItem, OpenLogs, Source, Ticket
from protocol.messages.task import OneTask, SteerTasks, SubmitTask
from protocol.methods import (
    NODE_DRAIN,
    TASK_EXPLAIN,
    TASK_KILL,
    TASK_LOGS,
    TASK_SHOW,
    TASK_SUBMIT,
)
from protocol.models.access import Role
from protocol.models.task import TaskSpec
from protocol.session import CloseCode
from tests.support.host import (
    TOKENS,
    RunningHost,
    ScriptedRunner,
    a_credential,
    linked_runner,
)

Socket = aiohttp.ClientWebSocketResponse[bool]
LOG_ITEM: Any = LogItem
encode = msgspec.msgpack.Encoder().encode


async def submit(connection: Connection, **spec: Any) -> TaskId:
    wanted = TaskSpec(**{"command": ("true",), **spec})
    request = SubmitTask(request_id=secrets.token_hex(8), spec=wanted)
    (task,) = (await connection.call(TASK_SUBMIT, request)).ids()
    return task


async def stream_order(runner: ScriptedRunner) -> OrderStream:
    """Give the next order, which has to be one to open a stream."""
    order = await runner.order()
    assert isinstance(order, OrderStream), order
    return order


async def send(socket: Socket, *items: LogChunk | LogEnd) -> None:
    for item in items:
        await socket.send_bytes(encode(item))


async def items_of(data: DataStream) -> list[Any]:
    return [decode_value(message, LOG_ITEM, "a log message") async for message in data]


async def read(cluster: Cluster, task: TaskId, **how: Any) -> list[LogChunk | LogEnd]:
    return [item async for item in cluster.logs(task, **how)]


async def send_until_blocked(socket: Socket, message: bytes) -> int:
    """Send until nobody takes more; give how many were taken before the one that was not."""
    for sent in range(4000):  # 250 MiB
        try:
            await asyncio.wait_for(socket.send_bytes(message), 0.5)
        except TimeoutError:
            return sent
    return 4000


@asynccontextmanager
async def reading(admin: Connection, task: TaskId, **how: Any) -> AsyncIterator[DataStream]:
    """Open a data connection as a client does."""
    ticket = await admin.call(TASK_LOGS, OpenLogs(task=task, **how))
    async with await admin.open_data(ticket.path, ticket.ticket) as data:
        yield data


async def test_output_flows_from_the_runner_that_dialled_back_to_the_reader(
    host: RunningHost,
) -> None:
    async with (
        linked_runner(host) as runner,
        connect(host.url, TOKENS[Role.ADMIN]) as cluster,
    ):
        submitted = await cluster.submit(["true"])
        (task,) = submitted.ids()
        await runner.run(await runner.start())
        logs = asyncio.create_task(read(cluster, task, tail_lines=7, sources=["stderr"]))
        order = await stream_order(runner)
        assert (order.attempt, order.logs) == (
            1,
            OpenLogs(task=task, sources=(Source.STDERR,), tail_lines=7),
        )
        chunks = [
            LogChunk(Source.STDERR, at, bytes([at % 256]) * MAX_CHUNK)
            for at in range(0, 3 * MAX_CHUNK, MAX_CHUNK)
        ]
        end = LogEnd(0, 3 * MAX_CHUNK, dropped=5)
        async with runner.dial_back(order) as socket:
            await send(socket, *chunks, end)
        assert await logs == [*chunks, end]


async def test_who_follows_a_waiting_task_gets_its_output_once_it_has_a_node(
    host: RunningHost,
) -> None:
    async with await host.connect() as admin:
        task = await submit(admin)
        async with reading(admin, task) as at_once:
            assert await items_of(at_once) == [LogEnd(0, 0)]
        async with reading(admin, task, follow=True) as data, linked_runner(host) as runner:
            launch = await runner.start()
            assert launch.task == task
            order = await stream_order(runner)
            async with runner.dial_back(order) as socket:
                await send(socket, LogChunk(Source.STDOUT, 0, b"hello"), LogEnd(5, 0))
            assert await items_of(data) == [LogChunk(Source.STDOUT, 0, b"hello"), LogEnd(5, 0)]


async def test_a_task_that_never_ran_has_no_output_for_those_who_followed_it(
    host: RunningHost,
) -> None:
    async with await host.connect() as admin:
        task = await submit(admin)
        async with reading(admin, task, follow=True) as data:
            await admin.call(TASK_KILL, SteerTasks(tasks=(task,)))
            assert await asyncio.wait_for(items_of(data), 5) == [LogEnd(0, 0)]


async def test_who_follows_an_attempt_that_is_over_does_not_wait_for_the_next(
    host: RunningHost,
) -> None:
    async with await host.connect() as admin, linked_runner(host) as runner:
        task = await submit(admin, retries=1)
        launch = await runner.start()
        await runner.run(launch)
        # So that there is no next one while this looks.
        await admin.call(NODE_DRAIN, OneNode(NodeName("n1")))
        await runner.end(launch, code=1)
        shown = (await admin.call(TASK_SHOW, OneTask(task))).task
        assert (shown.state, shown.attempt) == ("queued", 1)
        async with reading(admin, task, follow=True, attempt=1) as data:
            order = await stream_order(runner)
            assert order.attempt == 1
            async with runner.dial_back(order) as socket:
                await send(socket, LogChunk(Source.STDOUT, 0, b"hello"), LogEnd(5, 0))
            assert await items_of(data) == [LogChunk(Source.STDOUT, 0, b"hello"), LogEnd(5, 0)]


async def test_a_node_that_is_away_and_a_runner_that_does_not_dial_are_told(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_DIAL_BACK_S", 0.1)
    async with await host.connect() as admin:
        async with linked_runner(host) as runner:
            task = await submit(admin)
            await runner.run(await runner.start())
            async with reading(admin, task) as data:
                (end,) = await items_of(data)
                assert end.error[0] == "unavailable"
                assert "node n1 did not open the stream" in end.error[1]
            late = await stream_order(runner)
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with runner.dial_back(late):
                    pass
            assert caught.value.status == 404
        async with asyncio.timeout(5):
            code, text = "", ""
            while "is away" not in text:
                async with reading(admin, task) as data:
                    (end,) = await items_of(data)
                    code, text = end.error
        assert (code, f"the output of task {task}" in text) == ("unavailable", True)


async def test_a_stream_is_its_own_runners(host: RunningHost) -> None:
    async with (
        await host.connect() as admin,
        linked_runner(host, "n1") as runner,
        linked_runner(host, "n2") as other,
    ):
        task = await submit(admin)
        placed = await admin.call(TASK_SHOW, OneTask(task))
        holder, stranger = (runner, "n2") if placed.task.node == "n1" else (other, "n1")
        await holder.start()
        async with reading(admin, task) as data:
            order = await stream_order(holder)
            for credential, status in [
                (a_credential(stranger), 404),
                (a_credential("nobody"), 401),
                (TOKENS[Role.ADMIN], 401),
            ]:
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    async with holder.dial_back(order, credential):
                        pass
                assert caught.value.status == status
            async with holder.dial_back(order) as socket:
                with pytest.raises(aiohttp.WSServerHandshakeError):
                    async with holder.dial_back(order):
                        pass
                await send(socket, LogEnd(0, 0))
            assert await items_of(data) == [LogEnd(0, 0)]


async def test_a_reader_that_stalls_holds_back_its_own_runner_and_nobody_else(
    host: RunningHost,
) -> None:
    chunk = encode(LogChunk(Source.STDOUT, 0, b"x" * MAX_CHUNK))
    async with await host.connect() as admin, linked_runner(host) as runner:
        task = await submit(admin)
        await runner.run(await runner.start())
        async with reading(admin, task) as stalled:
            order = await stream_order(runner)
            async with runner.dial_back(order) as socket:
                sent = await send_until_blocked(socket, chunk)
                assert sent < 1000, "the host piles up what nobody reads"
                await runner.beat()
                async with reading(admin, task) as other:
                    another = await stream_order(runner)
                    async with runner.dial_back(another) as free:
                        await send(free, LogEnd(1, 1))
                    assert await items_of(other) == [LogEnd(1, 1)]

                async def finish() -> None:
                    await socket.send_bytes(chunk)
                    await send(socket, LogEnd(2, 2))
                    await socket.close()

                finishing = asyncio.create_task(finish())
                received = [await anext(stalled) for _ in range(sent)]
                assert set(received) == {chunk}
                # The send that was given up may have left whole, or not at all.
                rest = [decode_value(message, LOG_ITEM, "m") async for message in stalled]
                await finishing
                assert rest[-1] == LogEnd(2, 2)


async def test_a_reader_that_goes_away_ends_the_runners_side(host: RunningHost) -> None:
    async with await host.connect() as admin, linked_runner(host) as runner:
        task = await submit(admin)
        await runner.run(await runner.start())
        async with reading(admin, task, follow=True):
            order = await stream_order(runner)
            dialling = runner.dial_back(order)
            socket = await dialling.__aenter__()
            await send(socket, LogChunk(Source.STDOUT, 0, b"hello"))
        closing = await asyncio.wait_for(socket.receive(), 5)
        assert closing.type is aiohttp.WSMsgType.CLOSE
        await dialling.__aexit__(None, None, None)


@pytest.mark.parametrize("said", [b"x" * 60_000, "text"])
async def test_a_reader_that_talks_is_shown_out(host: RunningHost, said: bytes | str) -> None:
    async with await host.connect() as admin, linked_runner(host):
        task = await submit(admin)
        ticket = await admin.call(TASK_LOGS, OpenLogs(task=task, follow=True))
        headers = {"Authorization": f"Ticket {ticket.ticket}"}
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(host.url + ticket.path, headers=headers, autoping=False) as socket,
        ):
            await socket.ping(b"there?")
            pong = await socket.receive(5)
            assert (pong.type, pong.data) == (aiohttp.WSMsgType.PONG, b"there?")
            await (socket.send_str(said) if isinstance(said, str) else socket.send_bytes(said))
            assert (await socket.receive(5)).type is aiohttp.WSMsgType.CLOSE


@pytest.mark.parametrize("ending", ["break", "text", "too large"])
async def test_a_runners_side_that_breaks_off_ends_the_readers(
    host: RunningHost, ending: str
) -> None:
    async with await host.connect() as admin, linked_runner(host) as runner:
        task = await submit(admin)
        await runner.run(await runner.start())
        async with reading(admin, task) as data:
            order = await stream_order(runner)
            async with runner.dial_back(order) as socket:
                await send(socket, LogChunk(Source.STDOUT, 0, b"hello"))
                assert await anext(data)
                if ending == "text":
                    await socket.send_str("garbage")
                elif ending == "too large":
                    await socket.send_bytes(b"x" * (MAX_CHUNK + 1000))
                else:
                    await socket.close()
                # Without the word that all was sent: the reader knows to come again.
                assert await asyncio.wait_for(items_of(data), 5) == []


async def test_a_ticket_opens_one_connection_in_its_time(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await host.connect() as admin:
        task = await submit(admin)

        async def make() -> Ticket:
            return await admin.call(TASK_LOGS, OpenLogs(task=task))

        ticket = await make()
        async with await admin.open_data(ticket.path, ticket.ticket) as data:
            assert await items_of(data) == [LogEnd(0, 0)]
        monkeypatch.setattr(streams, "_TICKET_S", 0.0)
        expired = await make()
        monkeypatch.setattr(streams, "_TICKET_S", 60.0)
        for text in (ticket.ticket, expired.ticket, "0" * 64, TOKENS[Role.ADMIN]):
            with pytest.raises(Unauthenticated):
                await admin.open_data(ticket.path, text)
        monkeypatch.setattr(streams, "_MOST_TICKETS", 2)
        await make()
        await make()
        with pytest.raises(Unavailable, match="too many data connections"):
            await make()


async def test_tickets_are_for_those_who_may_see_the_output(host: RunningHost) -> None:
    async with (
        await host.connect(Role.ADMIN) as admin,
        await host.connect(Role.USER) as user,
        await host.connect(Role.VIEWER) as viewer,
    ):
        task = await submit(admin)
        with pytest.raises(Forbidden, match="belongs to somebody else"):
            await user.call(TASK_LOGS, OpenLogs(task=task))
        with pytest.raises(Forbidden, match="needs role user"):
            await viewer.call(TASK_LOGS, OpenLogs(task=task))
        with pytest.raises(NotFound, match="has no attempt 1"):
            await admin.call(TASK_LOGS, OpenLogs(task=task, attempt=1))
        with pytest.raises(NotFound, match="there is no task 5"):
            await admin.call(TASK_LOGS, OpenLogs(task=TaskId(5)))


async def test_both_sides_are_told_when_the_host_stops(host: RunningHost) -> None:
    async with await host.connect() as admin, linked_runner(host) as runner:
        task = await submit(admin)
        await runner.run(await runner.start())
        async with reading(admin, task, follow=True) as data:
            order = await stream_order(runner)
            async with runner.dial_back(order) as socket:
                await send(socket, LogChunk(Source.STDOUT, 0, b"hello"))
                assert await anext(data)
                await host.stop()
                with pytest.raises(Unavailable):
                    await anext(data)
                closing = await asyncio.wait_for(socket.receive(), 5)
                assert closing.type is aiohttp.WSMsgType.CLOSE
                assert closing.data == CloseCode.GOING_AWAY


async def test_an_order_to_open_a_stream_does_not_overtake_the_order_to_launch(
    host: RunningHost, hold_writes: Callable[[], threading.Event]
) -> None:
    async with await host.connect() as admin, linked_runner(host) as runner:
        await submit(admin, cores=4)
        first = await runner.start()
        waiting = await submit(admin, cores=4)
        ticket = await admin.call(TASK_LOGS, OpenLogs(task=waiting, follow=True))
        release = hold_writes()
        # With its end goes the placing of the other, which is not committed yet.
        ending = asyncio.create_task(runner.end(first))
        await runner.beat()
        explaining = asyncio.create_task(admin.call(TASK_EXPLAIN, OneTask(waiting)))
        async with await admin.open_data(ticket.path, ticket.ticket) as data:
            await asyncio.sleep(0.05)
            assert runner.orders.empty()
            assert not explaining.done(), "it told of a place that is not committed"
            release.set()
            await ending
            assert (await explaining).explanation.state == "assigned"
            assert (await runner.start()).task == waiting
            async with runner.dial_back(await stream_order(runner)) as socket:
                await send(socket, LogEnd(0, 0))
            assert await items_of(data) == [LogEnd(0, 0)]
