"""A host's life: its first start, its restarts, and what it needs to start at all."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from kohaku_daemon.host.config import HostConfig
from kohaku_daemon.host.daemon import run_host
from protocol.connection import Connection
from protocol.errors import Unavailable
from protocol.messages.cluster import ListEvents
from protocol.messages.hello import WhoAmI
from protocol.messages.node import LabelNode, ListNodes
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.messages.task import ListTasks, OneTask, SubmitTask
from protocol.methods import (
    EVENT_LIST,
    NODE_LABEL,
    NODE_LIST,
    TASK_LIST,
    TASK_SHOW,
    TASK_SUBMIT,
    WHOAMI,
)
from protocol.models.access import Role
from protocol.models.node import NodeState
from protocol.models.task import TaskSpec, TaskState
from tests.support.host import dial_runner, linked_runner, running_host

SUBMIT = SubmitTask(request_id="request-1", spec=TaskSpec(command=("true",)), array=3)


async def start(config: HostConfig) -> tuple[str, asyncio.Event, asyncio.Task[None]]:
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    job = asyncio.create_task(run_host(config, stop=stop, on_ready=ready.set_result))
    return await asyncio.wait_for(ready, 10), stop, job


async def test_the_first_start_makes_one_admin_and_tells_nobody_but_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    data = tmp_path / "made" / "by the host"
    tokens = []
    for _ in range(2):
        url, stop, job = await start(HostConfig(data=data, port=0))
        token = (data / "admin.token").read_text().strip()
        async with await Connection.dial(url, token=token) as admin:
            assert (await admin.call(WHOAMI, WhoAmI())).role is Role.ADMIN
        stop.set()
        await job
        tokens.append(token)
    assert tokens[0] == tokens[1]
    assert data.stat().st_mode & 0o777 == 0o700
    for name in ("admin.token", "cluster.json", "tasks.sqlite"):
        assert (data / name).stat().st_mode & 0o777 == 0o600, name
    assert tokens[0] not in (data / "cluster.json").read_text()
    assert tokens[0] not in repr([vars(record) for record in caplog.records])


async def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with (
        running_host(data) as host,
        linked_runner(host) as runner,
        await host.connect() as admin,
    ):
        submitted = await admin.call(TASK_SUBMIT, SUBMIT)
        running, ended, _ = [await runner.start() for _ in range(3)]
        await runner.run(running)
        await runner.end(ended, code=3)
        await admin.call(NODE_LABEL, LabelNode("n1", {"gpu": "a100"}))
        cluster = admin.welcome.cluster
    for _ in range(2):
        async with running_host(data) as host, await host.connect() as admin:
            assert admin.welcome.cluster == cluster
            again = await admin.call(TASK_SUBMIT, SUBMIT)
            assert (again.batch, again.runs, again.repeated) == (
                submitted.batch,
                submitted.runs,
                True,
            )
            tasks = (await admin.call(TASK_LIST, ListTasks())).tasks
            assert [task.state for task in tasks[::-1][:3]] == [
                TaskState.RUNNING,
                TaskState.FAILED,
                TaskState.ASSIGNED,
            ]
            (node,) = (await admin.call(NODE_LIST, ListNodes())).nodes
            assert (node.state, node.labels) == (NodeState.OFFLINE, {"gpu": "a100"})
            assert node.claimed.cores == 2
            # Ids go on: nothing new is older than what was there.
            more = await admin.call(TASK_SUBMIT, SubmitTask(request_id="x" * 8, spec=SUBMIT.spec))
            assert more.batch > max(task.id for task in tasks) or more.repeated
            ids = [event.id for event in (await admin.call(EVENT_LIST, ListEvents())).events]
            assert ids == sorted(set(ids), reverse=True)


async def test_a_runner_that_comes_back_after_a_restart_is_told_what_is_still_to_do(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    async with (
        running_host(data) as host,
        linked_runner(host) as runner,
        await host.connect() as admin,
    ):
        first, second, third = (await admin.call(TASK_SUBMIT, SUBMIT)).ids()
        orders = [await runner.start() for _ in range(3)]
        await runner.run(orders[0])
        await runner.run(orders[1])
    async with running_host(data) as host, await host.connect() as admin:
        runner = await dial_runner(host)
        # The first still runs, the second ended while the host was away, the third never came.
        await runner.register(
            instance="first",
            attempts=(
                AttemptReport(task=first, attempt=1, state=AttemptState.RUNNING),
                AttemptReport(task=second, attempt=1, state=AttemptState.ENDED),
            ),
        )
        await runner.take_orders()
        order = await runner.start()
        assert (order.task, order.attempt) == (third, 1)
        assert runner.orders.empty()
        states = [
            (await admin.call(TASK_SHOW, OneTask(task))).task.state for task in (first, second)
        ]
        assert states == [TaskState.RUNNING, TaskState.FAILED]
        await runner.close()


async def test_a_port_that_is_taken_and_a_folder_that_is_none_are_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = HostConfig(data=tmp_path / "data", port=port)
        with pytest.raises(Unavailable, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            await run_host(config, stop=asyncio.Event(), on_ready=lambda _: None)
        assert "choose another port" in caught.value.hint
    (tmp_path / "data" / "tasks.sqlite").write_bytes(b"garbage" * 1000)
    with pytest.raises(Unavailable, match=r"tasks\.sqlite failed"):
        await run_host(
            HostConfig(data=tmp_path / "data", port=0),
            stop=asyncio.Event(),
            on_ready=lambda _: None,
        )


@pytest.mark.parametrize("listen", ["::1", "127.0.0.1"])
async def test_the_url_is_one_that_can_be_dialled(tmp_path: Path, listen: str) -> None:
    async with running_host(tmp_path / "data", listen=listen) as host, await host.connect() as one:
        assert listen in host.url
        assert one.is_open
