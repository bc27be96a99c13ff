"""Runners that claim what is not theirs, and peers that are no longer there."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from protocol.connection import Connection
from protocol.ids import TaskId
from protocol.messages.cluster import GetStatus
from protocol.messages.task import OneTask
from protocol.methods import STATUS, TASK_SHOW
from protocol.models.task import Task, TaskState
from protocol.session import CloseCode
from tests.support.attacks.runners import DOOR
from tests.support.hostile import DROPPED, call, dial, frame, greeted, upgrade_request
from tests.support.siege import Siege

PATIENCE_S = 15.0


async def show(siege: Siege, task: str) -> Task:
    """Give a task as its owner sees it."""
    async with await Connection.dial(siege.target.url, token=siege.admin) as connection:
        return (await connection.call(TASK_SHOW, OneTask(TaskId(int(task))))).task


async def test_a_runner_reports_of_its_own_tasks_only(own_siege: Siege) -> None:
    siege, there = own_siege, own_siege.target
    task = siege.home.kohaku("task", "submit", "-c", "0", "--", "sleep", "600")
    await asyncio.to_thread(siege.home.wait_state, task, "running")
    before = await show(siege, task)
    async with greeted(there.authority, there.credential, DOOR, there.source) as peer:
        lie = {"task": int(task), "attempt": 1}
        ended = {**lie, "state": "ended", "exit": {"cause": "exited", "code": 0}}
        asked = {"instance": "m", "inventory": {"max_tasks": 0}, "attempts": [ended]}
        await peer.send(call(1, "runner.register", asked))
        assert (await peer.reply(1))[0] is None
        lies = [
            ended,
            {**lie, "state": "running", "note": "it is mine"},
            {**lie, "state": "paused"},
            {**lie, "attempt": 2, "state": "ended"},
            {**lie, "attempt": 0, "state": "accepted"},
        ]
        await peer.send(call(2, "runner.report", {"reports": lies}))
        assert (await peer.reply(2))[0] is None
        after = await show(siege, task)
    assert after == before
    assert after.state is TaskState.RUNNING
    siege.home.kohaku("task", "kill", task)


async def test_a_copied_credential_does_not_push_its_owner_out(own_siege: Siege) -> None:
    there = own_siege.target
    asked = {"instance": "original", "inventory": {"max_tasks": 0}}
    async with (
        greeted(there.authority, there.credential, DOOR) as owner,
        greeted(there.authority, there.credential, DOOR, there.source) as copy,
    ):
        await owner.send(call(1, "runner.register", asked), call(2, "runner.orders"))
        assert (await owner.reply(1))[0] is None
        for number in range(1, 6):
            await copy.send(call(number, "runner.register", {**asked, "instance": "copy"}))
            error, _ = await copy.reply(number)
            assert error["code"] == "conflict"
            assert there.node in error["message"]
            await owner.send(call(10 + number, "runner.heartbeat", {"cpu_percent": 1.0}))
            assert (await owner.reply(10 + number))[0] is None
        # What it did not register for is not its either.
        await copy.send(
            call(20, "runner.heartbeat", {}), call(21, "runner.report", {"reports": []})
        )
        assert (await copy.reply(20))[0]["code"] == "conflict"
        assert (await copy.reply(21))[0]["code"] == "conflict"


async def test_a_peer_that_is_no_longer_there_is_noticed(own_siege: Siege) -> None:
    there = own_siege.target
    for path, secret in (("/v1/ws", there.token), (DOOR, there.credential), ("/v1/ws", "")):
        async with greeted(there.authority, secret, path, there.source) as peer:
            began = time.monotonic()
            code, _ = await peer.end()  # it reads, and answers no ping
            assert code == CloseCode.SILENT
            assert time.monotonic() - began < PATIENCE_S


async def test_a_message_in_drops_is_no_sign_of_life(own_siege: Siege) -> None:
    there = own_siege.target
    async with greeted(there.authority, there.token, source=there.source) as peer:
        await peer.send(frame(b"", length=200_000))
        ending = asyncio.create_task(peer.end())
        while not ending.done():
            await peer.send(b"x")
            await asyncio.sleep(0.1)
        assert (await ending)[0] in {CloseCode.SILENT, DROPPED}


async def test_output_that_nobody_reads_stays_with_its_runner(own_siege: Siege) -> None:
    siege, there = own_siege, own_siege.target
    size = 40_000_000
    task = siege.home.kohaku("task", "submit", "--", "head", "-c", str(size), "/dev/zero")
    await asyncio.to_thread(siege.home.wait_state, task, "completed")
    before_mib = siege.rss_mib()
    async with AsyncExitStack() as deaf:
        peer = await deaf.enter_async_context(greeted(there.authority, siege.admin))
        for number in range(1, 9):
            await peer.send(call(number, "task.logs", {"task": int(task)}))
            error, ticket = await peer.reply(number)
            assert error is None
            reader = await dial(there.authority, limit=4096)
            deaf.push_async_callback(reader.wait_closed)
            header = f"Ticket {ticket['ticket']}"
            await reader.send(upgrade_request(ticket["path"], Authorization=header))
            assert (await reader.head()).startswith("HTTP/1.1 101 ")
        async with await Connection.dial(there.url, token=siege.honest) as honest:
            for _ in range(100):  # the streams fill up meanwhile
                await asyncio.wait_for(honest.call(STATUS, GetStatus()), PATIENCE_S)
                await asyncio.sleep(0.02)
        assert siege.rss_mib() - before_mib < 32
        read = await asyncio.to_thread(siege.home.kohaku, "task", "logs", task)
        assert len(read) == size
