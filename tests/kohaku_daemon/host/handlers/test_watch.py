"""Watching: what a reader has is what there is, however it was cut off or fell behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from kohaku_daemon.core.cluster.records import PutDocument
from kohaku_daemon.host import subscriptions
from kohaku_daemon.host.handlers import watch as watch_module
from kohaku_daemon.store.documents import Documents
from kohaku_daemon.store.tasks import Group, TaskStore
from protocol.client import Cluster, connect
from protocol.connection import Connection, ItemStream
from protocol.errors import BadRequest
from protocol.ids import BatchId, TaskId
from protocol.messages.cluster import Topic, Update, Watch, WatchEnded
from protocol.messages.node import LabelNode, ListNodes, OneNode, RemoveNode
from protocol.messages.runner import AttemptState, OrderStart
from protocol.messages.task import ListTasks, SteerTasks, SubmitTask, Submitted
from protocol.methods import (
    NODE_DRAIN,
    NODE_LABEL,
    NODE_LIST,
    NODE_REMOVE,
    TASK_KILL,
    TASK_LIST,
    TASK_SUBMIT,
    WATCH,
)
from protocol.models.access import Role
from protocol.models.node import Gpu, Node
from protocol.models.task import Task, TaskSpec, TaskState
from tests.support.builders import a_node, an_inventory
from tests.support.host import (
    TOKENS,
    RunningHost,
    ScriptedRunner,
    give_tokens,
    linked_runner,
    running_host,
)

Updates = ItemStream[Update, WatchEnded]


@dataclass
class Mirror:
    """A reader's copy, kept as SPEC says it is to be kept."""

    tasks: dict[TaskId, Task] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    revision: str = ""
    is_ready: bool = False
    starts: int = 0
    updates: int = 0

    def take(self, update: Update) -> None:
        self.updates += 1
        if update.start:
            self.starts += 1
            self.is_ready = False
            self.tasks.clear()
            self.nodes.clear()
        assert bool(update.revision) == (self.is_ready or update.ready), "not safe to resume from"
        self.is_ready = self.is_ready or update.ready
        self.revision = update.revision or self.revision
        self.tasks |= {task.id: task for task in update.tasks}
        self.nodes |= {node.name: node for node in update.nodes}
        self.events += [event.kind for event in update.events]
        for name in update.gone_nodes:
            assert name not in {node.name for node in update.nodes}, "is it gone, or there?"
            self.nodes.pop(name, None)

    async def follow(self, updates: Updates, *, until_ready: bool = False) -> None:
        async for update in updates:
            self.take(update)
            if until_ready and update.ready:
                return


@asynccontextmanager
async def watching(
    connection: Connection, *topics: Topic, window: int = 8, **more: Any
) -> AsyncIterator[Updates]:
    async with connection.stream(WATCH, Watch(topics=topics, **more), window=window) as updates:
        yield updates


async def read_until_ready(connection: Connection, *topics: Topic, **more: Any) -> Mirror:
    """Read a snapshot and let go."""
    mirror = Mirror()
    async with watching(connection, *topics, **more) as updates:
        await asyncio.wait_for(mirror.follow(updates, until_ready=True), 10)
    return mirror


async def submit(connection: Connection, number: int, count: int = 1, **spec: Any) -> Submitted:
    wanted = TaskSpec(**{"command": ("true",), **spec})
    request = SubmitTask(
        request_id=f"request-{number}", spec=wanted, array=0 if count == 1 else count
    )
    return await connection.call(TASK_SUBMIT, request)


async def everything(connection: Connection) -> dict[TaskId, Task]:
    """Give all rows as they are listed."""
    found: dict[TaskId, Task] = {}
    before = None
    while True:
        page = await connection.call(TASK_LIST, ListTasks(before=before, limit=500))
        found |= {task.id: task for task in page.tasks}
        if not page.more:
            return found
        before = page.tasks[-1].id


async def assert_becomes_the_truth(mirror: Mirror, connection: Connection) -> None:
    """Wait until the mirror has every live task as it is, and no task as it is not."""
    truth: dict[TaskId, Task] = {}

    def is_true() -> bool:
        if not mirror.is_ready:
            return False
        live = {task.id for task in truth.values() if not task.state.is_final}
        return live <= mirror.tasks.keys() and mirror.tasks.items() <= truth.items()

    for _ in range(200):
        truth = await everything(connection)
        if is_true():
            return
        await asyncio.sleep(0.02)
    wrong = {
        task: (mirror.tasks.get(task), row)
        for task, row in truth.items()
        if mirror.tasks.get(task) != row
    }
    raise AssertionError(f"the mirror is wrong: {wrong}")


# What a watch is --------------------------------------------------------------------------


async def test_a_watch_is_a_snapshot_and_then_what_changes(host: RunningHost) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        (first,) = (await submit(admin, 1)).ids()
        order = await runner.start()
        topics = (Topic.TASKS, Topic.NODES, Topic.EVENTS)
        async with watching(admin, *topics) as updates:
            opened = [await anext(updates) for _ in range(4)]
            assert [(update.start, update.ready, bool(update.revision)) for update in opened] == [
                (True, False, False),
                (False,) * 3,
                (False,) * 3,
                (False, True, True),
            ]
            assert [task.id for task in opened[1].tasks] == [first]
            assert [node.name for node in opened[2].nodes] == ["n1"]

            await runner.run(order)
            change = await anext(updates)
            assert [(task.id, task.state) for task in change.tasks] == [(first, TaskState.RUNNING)]
            assert (change.nodes, change.start, change.ready) == ((), False, False)

            await admin.call(NODE_DRAIN, OneNode("n1"))
            change = await anext(updates)
            assert [node.draining for node in change.nodes] == [True]
            assert [event.kind for event in change.events] == ["node.draining"]


async def test_the_snapshot_has_live_tasks_and_ended_ones_only_if_they_are_named(
    host: RunningHost,
) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        batch = await submit(admin, 1, 3)
        ended, *live = batch.ids()
        (other,) = (await submit(admin, 2)).ids()
        order = await runner.start()
        assert order.task == ended
        await runner.end(order)

        whole = await read_until_ready(admin, Topic.TASKS)
        assert set(whole.tasks) == {*live, other}
        of_batch = await read_until_ready(admin, Topic.TASKS, batch=batch.batch)
        assert set(of_batch.tasks) == {ended, *live}
        named = await read_until_ready(admin, Topic.TASKS, tasks=(ended, other, TaskId(5)))
        assert set(named.tasks) == {ended, other}
        both = await read_until_ready(admin, Topic.TASKS, tasks=(ended, other), batch=batch.batch)
        assert set(both.tasks) == {ended}
        none = await read_until_ready(admin, Topic.TASKS, batch=BatchId(5))
        assert none.tasks == {}


async def test_changes_are_filtered_as_the_snapshot_is(host: RunningHost) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        batch = await submit(admin, 1, 2)
        first, second = batch.ids()
        await submit(admin, 2)
        orders = [await runner.start() for _ in range(3)]
        async with (
            watching(admin, Topic.TASKS, batch=batch.batch) as of_batch,
            watching(admin, Topic.TASKS, tasks=(second,)) as of_one,
        ):
            mirrors = Mirror(), Mirror()
            for mirror, updates in zip(mirrors, (of_batch, of_one), strict=True):
                await mirror.follow(updates, until_ready=True)
            for order in reversed(orders):
                await runner.run(order)
            seen: dict[TaskId, TaskState] = {}
            while seen.keys() < {first, second}:
                seen |= {task.id: task.state for task in (await anext(of_batch)).tasks}
            assert seen == dict.fromkeys((first, second), TaskState.RUNNING)
            assert [task.id for task in (await anext(of_one)).tasks] == [second]


async def test_who_may_not_see_a_command_does_not_see_it_by_watching(host: RunningHost) -> None:
    secret: dict[str, Any] = {"command": ("login", "hunter2"), "workdir": "/hunter", "name": "job"}
    async with (
        await host.connect(Role.USER) as owner,
        await host.connect(Role.VIEWER) as viewer,
        watching(viewer, Topic.TASKS) as changes,
    ):
        await Mirror().follow(changes, until_ready=True)
        (task,) = (await submit(owner, 1, **secret)).ids()
        snapshot = await read_until_ready(viewer, Topic.TASKS)
        by_name = await read_until_ready(viewer, Topic.TASKS, tasks=(task,))
        rows = [snapshot.tasks[task], by_name.tasks[task], *(await anext(changes)).tasks]
        assert len(rows) == 3
        for row in rows:
            assert (row.spec.command, row.spec.workdir) == (("(hidden)",), "")
            assert row.spec.name == "job"
        own = await read_until_ready(owner, Topic.TASKS)
        assert own.tasks[task].spec.command == ("login", "hunter2")


async def test_readings_come_to_those_who_asked_for_them(host: RunningHost) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        await runner.beat(cpu_percent=50.0)
        plain = await read_until_ready(admin, Topic.NODES)
        assert plain.nodes["n1"].readings is None
        whole = await read_until_ready(admin, Topic.READINGS)
        assert whole.nodes["n1"].readings is not None
        both = (Topic.NODES, Topic.READINGS)
        async with watching(admin, Topic.NODES) as nodes, watching(admin, *both) as all_of_it:
            await Mirror().follow(nodes, until_ready=True)
            mirror = Mirror()
            await mirror.follow(all_of_it, until_ready=True)
            await runner.beat(cpu_percent=60.0)
            (node,) = (await anext(all_of_it)).nodes
            assert node.readings is not None
            assert node.readings.cpu_percent == 60.0
            await admin.call(NODE_LABEL, LabelNode("n1", {"gpu": "a100"}))
            (node,) = (await anext(all_of_it)).nodes
            assert node.labels == {"gpu": "a100"}
            assert node.readings is not None, "a reader of both has lost the readings"
            (node,) = (await anext(nodes)).nodes
            assert (node.labels, node.readings) == ({"gpu": "a100"}, None)


@pytest.mark.parametrize("topics", [(Topic.NODES,), (Topic.READINGS,), tuple(Topic)])
async def test_a_node_that_is_gone_is_told_to_all_who_had_it(
    host: RunningHost, topics: tuple[Topic, ...]
) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        mirror = await read_until_ready(admin, *topics)
        assert "n1" in mirror.nodes
        await runner.beat()
        await admin.call(NODE_REMOVE, RemoveNode("n1"))
        async with watching(admin, *topics, since=mirror.revision) as updates:
            while "n1" in mirror.nodes:
                mirror.take(await asyncio.wait_for(anext(updates), 5))
        assert mirror.starts == 1


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (Watch(topics=()), "no topic to watch"),
        (Watch(topics=(Topic.TASKS,), tasks=tuple(map(TaskId, range(1001)))), "at most 1000"),
    ],
)
async def test_a_watch_that_makes_no_sense_is_refused(
    host: RunningHost, question: Watch, told: str
) -> None:
    async with await host.connect() as admin, admin.stream(WATCH, question) as updates:
        with pytest.raises(BadRequest, match=told):
            await anext(updates)


# Going on where one was -------------------------------------------------------------------


async def test_a_reader_that_comes_back_gets_what_it_missed_and_no_more(host: RunningHost) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        (first,) = (await submit(admin, 1)).ids()
        order = await runner.start()
        mirror = await read_until_ready(admin, Topic.TASKS)
        await runner.run(order)
        (second,) = (await submit(admin, 2)).ids()
        await runner.end(order)
        async with watching(admin, Topic.TASKS, since=mirror.revision) as updates:
            resumed = await anext(updates)
            assert (resumed.ready, resumed.start, resumed.tasks) == (True, False, ())
            missed = await anext(updates)
        # Each as it is now, in the order of the last change.
        assert [(task.id, task.state) for task in missed.tasks] == [
            (second, TaskState.ASSIGNED),
            (first, TaskState.COMPLETED),
        ]


STRANGE_REVISIONS = [
    "garbage", "77", ".", "{epoch}.", "{epoch}.-1", "{epoch}.x", "{epoch}.99999",
    "{epoch}.\u0663", "other.0",
]  # fmt: skip


@pytest.mark.parametrize("since", STRANGE_REVISIONS)
async def test_who_was_never_here_starts_over(host: RunningHost, since: str) -> None:
    async with await host.connect() as admin:
        mirror = await read_until_ready(admin, Topic.TASKS)
        epoch = mirror.revision.partition(".")[0]
        again = await read_until_ready(admin, Topic.TASKS, since=since.format(epoch=epoch))
        assert again.starts == 1
        assert (await read_until_ready(admin, Topic.TASKS, since=mirror.revision)).starts == 0


async def test_a_restart_of_the_host_starts_over(tmp_path: Path) -> None:
    async with running_host(tmp_path / "data") as host, await host.connect() as admin:
        await submit(admin, 1)
        before = await read_until_ready(admin, Topic.TASKS)
    async with running_host(tmp_path / "data") as host, await host.connect() as admin:
        after = await read_until_ready(admin, Topic.TASKS, since=before.revision)
    assert after.starts == 1
    assert after.tasks == before.tasks


async def test_the_client_goes_on_watching_across_a_restart(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with running_host(data) as host:
        port = host.authority[1]
        cluster: Cluster = connect(host.url, TOKENS[Role.ADMIN])
        async with cluster:
            mirror = Mirror()
            watch = cluster.watch([Topic.TASKS])
            while not mirror.is_ready:
                mirror.take(await anext(watch))
            await host.stop()
            async with running_host(data, listen="127.0.0.1", port=port) as again:
                async with await again.connect() as admin:
                    (task,) = (await submit(admin, 1)).ids()
                while task not in mirror.tasks:
                    mirror.take(await asyncio.wait_for(anext(watch), 20))
                assert mirror.starts == 2
            await watch.aclose()


# Slow readers, large pages ----------------------------------------------------------------


async def test_a_slow_reader_gets_the_newest_rows_and_skips_what_was_between(
    host: RunningHost,
) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        (task,) = (await submit(admin, 1)).ids()
        order = await runner.start()
        async with watching(admin, Topic.TASKS, Topic.READINGS, window=1) as updates:
            mirror = Mirror()
            await mirror.follow(updates, until_ready=True)
            for _ in range(20):
                await runner.report(order, AttemptState.PAUSED)
                await runner.report(order, AttemptState.RUNNING)
                await runner.beat(cpu_percent=1.0)
            await runner.end(order)
            seen = mirror.updates
            while not mirror.tasks[task].state.is_final:
                mirror.take(await asyncio.wait_for(anext(updates), 5))
            # One was on its way already; then came the newest.
            assert mirror.updates - seen <= 3


async def test_a_reader_slower_than_the_record_is_long_starts_over(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "_REMEMBERED", 10)
    async with await host.connect() as admin, watching(admin, Topic.TASKS, window=1) as updates:
        mirror = Mirror()
        await mirror.follow(updates, until_ready=True)
        await submit(admin, 1, 3)
        await submit(admin, 2, 500)
        following = asyncio.create_task(mirror.follow(updates))
        await assert_becomes_the_truth(mirror, admin)
        assert len(mirror.tasks) == 503
        assert mirror.starts >= 2
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_pages_of_long_rows_stay_below_the_limit_of_the_wire(host: RunningHost) -> None:
    long: dict[str, Any] = {"command": ("sh", "-c", "\N{PILE OF POO}" * 20_000), "name": "n" * 128}
    async with await host.connect() as admin:
        async with watching(admin, Topic.TASKS) as updates:
            mirror = Mirror()
            await mirror.follow(updates, until_ready=True)
            batch = await submit(admin, 1, 1000, **long)
            while len(mirror.tasks) < 1000:
                mirror.take(await asyncio.wait_for(anext(updates), 5))
        snapshot = await read_until_ready(admin, Topic.TASKS)
        of_batch = await read_until_ready(admin, Topic.TASKS, batch=batch.batch)
        assert snapshot.tasks == of_batch.tasks == mirror.tasks == await everything(admin)
        (row, *_) = mirror.tasks.values()
        assert sum(map(len, row.spec.command)) == 257  # with the sign that something is left out


async def test_two_hundred_large_nodes_can_be_watched_and_listed(tmp_path: Path) -> None:
    inventory = replace(
        an_inventory(cores=256, numa=8),
        gpus=tuple(
            Gpu(
                index, f"GPU-{index:08}-5fb2-1d5b-4b1e-3f0d1a5d7c7f", "NVIDIA H100 80GB HBM3", 2**36
            )
            for index in range(8)
        ),
    )
    give_tokens(tmp_path / "data")
    documents = Documents.open(tmp_path / "data/cluster.json", new_cluster="77")
    documents.apply([PutDocument(a_node(f"n{number:03}", inventory)) for number in range(200)])
    TaskStore.open(tmp_path / "data/tasks.sqlite").close()  # nodes without it are a loss
    async with running_host(tmp_path / "data") as host:
        async with await host.connect() as admin:
            mirror = await read_until_ready(admin, Topic.NODES, Topic.READINGS)
            first = await admin.call(NODE_LIST, ListNodes())
            assert first.more
            rest = await admin.call(NODE_LIST, ListNodes(after="n198"))
            assert ([node.name for node in rest.nodes], rest.more) == (["n199"], False)
        async with connect(host.url, TOKENS[Role.VIEWER]) as cluster:
            nodes = await cluster.nodes()
    assert [node.name for node in nodes] == [f"n{number:03}" for number in range(200)]
    assert mirror.nodes == {node.name: node for node in nodes}


async def test_nothing_is_shown_that_is_not_committed(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, release, waits = TaskStore.write, threading.Event(), threading.Event()

    def held(store: TaskStore, group: Group) -> None:
        waits.set()
        assert release.wait(10)
        write(store, group)

    async with await host.connect() as admin, watching(admin, Topic.TASKS) as updates:
        mirror, late = Mirror(), Mirror()
        await mirror.follow(updates, until_ready=True)
        monkeypatch.setattr(TaskStore, "write", held)
        submitting = asyncio.create_task(submit(admin, 1))
        await asyncio.to_thread(waits.wait, 10)
        async with watching(admin, Topic.TASKS) as opened_later:
            following = [
                asyncio.create_task(mirror.follow(updates)),
                asyncio.create_task(late.follow(opened_later)),
            ]
            await asyncio.sleep(0.1)
            assert mirror.tasks == late.tasks == {}
            release.set()
            (task,) = (await submitting).ids()
            await assert_becomes_the_truth(mirror, admin)
            await assert_becomes_the_truth(late, admin)
            assert task in mirror.tasks
            for job in following:
                job.cancel()
            await asyncio.gather(*following, return_exceptions=True)


# The promise as a whole -------------------------------------------------------------------


class History:
    """Random things that happen to tasks."""

    def __init__(self, random: Random, admin: Connection, runner: ScriptedRunner) -> None:
        self._random = random
        self._admin = admin
        self._runner = runner
        self._count = 0
        self._orders: list[OrderStart] = []

    async def step(self) -> None:
        while not self._runner.orders.empty():
            order = self._runner.orders.get_nowait()
            if isinstance(order, OrderStart):
                self._orders.append(order)
        match self._random.choice(["submit", "report", "report", "end", "kill", "label"]):
            case "submit":
                self._count += 1
                await submit(self._admin, self._count, self._random.choice([1, 2, 30]), cores=0)
            case "report" if self._orders:
                state = self._random.choice([AttemptState.RUNNING, AttemptState.PAUSED])
                await self._runner.report(self._random.choice(self._orders), state)
            case "end" if self._orders:
                order = self._orders.pop(self._random.randrange(len(self._orders)))
                await self._runner.end(order)
            case "kill" if self._orders:
                order = self._random.choice(self._orders)
                await self._admin.call(TASK_KILL, SteerTasks(tasks=(order.task,)))
            case _:
                labels = {"step": str(self._random.randrange(1000))}
                await self._admin.call(NODE_LABEL, LabelNode("n1", labels))


async def watch_with_breaks(host: RunningHost, random: Random, mirror: Mirror) -> None:
    """Watch for ever over connections that break, also in a snapshot; read slowly at times."""
    while True:
        async with await host.connect() as connection:
            window, left = random.choice([1, 8]), random.randrange(1, 12)
            topics = (Topic.TASKS, Topic.NODES)
            async with watching(
                connection, *topics, window=window, since=mirror.revision
            ) as updates:
                async for update in updates:
                    mirror.take(update)
                    await asyncio.sleep(random.choice([0, 0, 0.03]))
                    left -= 1
                    if left == 0:
                        break


@pytest.mark.parametrize("seed", range(4))
async def test_a_mirror_that_is_cut_off_at_random_becomes_the_truth(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(subscriptions, "_REMEMBERED", 40)
    monkeypatch.setattr(watch_module, "_PACE_S", 0.001)
    random = Random(seed)
    async with (
        linked_runner(host, inventory=an_inventory(max_tasks=10_000)) as runner,
        await host.connect() as admin,
    ):
        history = History(random, admin, runner)
        mirrors = [Mirror() for _ in range(3)]
        watchers = [
            asyncio.create_task(watch_with_breaks(host, Random(f"{seed}-{n}"), mirror))
            for n, mirror in enumerate(mirrors)
        ]
        for _ in range(120):
            await history.step()
        nodes = {node.name: node for node in (await admin.call(NODE_LIST, ListNodes())).nodes}
        for mirror in mirrors:
            await assert_becomes_the_truth(mirror, admin)
            assert {name: node.labels for name, node in mirror.nodes.items()} == {
                name: node.labels for name, node in nodes.items()
            }
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
