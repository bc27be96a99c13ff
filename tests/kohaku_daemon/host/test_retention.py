"""The job that deletes what has been kept for long enough."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from kohaku_daemon.clock import SystemClock
from kohaku_daemon.core.cluster.records import AuditRecord, EventRecord
from kohaku_daemon.host import retention
from kohaku_daemon.store.tasks import Group, TaskStore
from protocol.errors import NotFound, Unavailable
from protocol.ids import BatchId
from protocol.messages.cluster import ListEvents
from protocol.messages.task import ListTasks, OneBatch, SubmitTask
from protocol.methods import BATCH_SHOW, EVENT_LIST, TASK_LIST, TASK_SUBMIT
from protocol.models.task import TaskSpec
from tests.kohaku_daemon.store.test_prune import put_batch
from tests.support.host import give_tokens, running_host

HOUR = 3600.0


def fill(path: Path, now: float, tasks: int) -> None:
    """Make a store with one old batch, one of an hour ago, and lines of both ages."""
    store = TaskStore.open(path)
    put_batch(store, 100_000, *[now - 10 * HOUR] * tasks)
    put_batch(store, 900_000, now - HOUR)
    events = [
        EventRecord(id=1, at=now - 10 * HOUR, kind="old", text=""),
        EventRecord(id=2, at=now - HOUR, kind="young", text=""),
        EventRecord(id=3, at=now - HOUR, kind="newest", text=""),
    ]
    audits = [
        AuditRecord(at=at, actor="ada", role="user", address="", method="m")
        for at in (now - 10 * HOUR, now - HOUR)
    ]
    store.write(Group(events=events, audits=audits))
    store.close()


async def test_a_host_deletes_what_is_older_than_its_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_PAUSE_S", 0.01)
    data = tmp_path / "data"
    give_tokens(data)
    fill(data / "tasks.sqlite", SystemClock().now(), tasks=1700)
    keep = {"task_keep_s": 2 * HOUR, "event_keep_s": 2 * HOUR, "audit_keep_s": 2 * HOUR}
    async with running_host(data, **keep) as host, await host.connect() as admin:
        spec = TaskSpec(command=("true",))
        async with asyncio.timeout(10):
            number = 0
            while True:  # submissions are answered meanwhile
                number += 1
                request = SubmitTask(request_id=f"request-{number}", spec=spec)
                await asyncio.wait_for(admin.call(TASK_SUBMIT, request), 2)
                page = await admin.call(TASK_LIST, ListTasks(limit=500))
                if not page.more and page.tasks[-1].id == 900_001:
                    break
        with pytest.raises(NotFound):
            await admin.call(BATCH_SHOW, OneBatch(BatchId(100_000)))
        kinds = [event.kind for event in (await admin.call(EVENT_LIST, ListEvents())).events]
        assert kinds == ["newest", "young"]
    connection = sqlite3.connect(data / "tasks.sqlite")
    methods = connection.execute("SELECT method FROM audit").fetchall()
    connection.close()
    assert methods.count(("m",)) == 1


async def test_a_disk_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retention, "_EVERY_S", 0.01)
    tries = asyncio.Queue[None]()
    loop = asyncio.get_running_loop()

    def fail(store: TaskStore, **_: object) -> int:
        loop.call_soon_threadsafe(tries.put_nowait, None)
        raise Unavailable("the store is full")

    monkeypatch.setattr(TaskStore, "prune", fail)
    async with running_host(tmp_path / "data") as host:
        for _ in range(3):
            await asyncio.wait_for(tries.get(), 5)
        async with await host.connect():
            pass
    assert "cannot be deleted: the store is full" in caplog.text
