"""Waiting for tasks, naming them, and steering them, through the clients' door."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from kohaku_daemon.host import daemon
from kohaku_daemon.store.tasks import Group, TaskStore
from protocol.client import connect
from protocol.connection import Connection
from protocol.errors import BadRequest, Conflict, NotFound, Unavailable
from protocol.ids import BatchId, TaskId
from protocol.messages.node import OneNode, RemoveNode
from protocol.messages.runner import OrderKill, OrderPause
from protocol.messages.task import (
    ListTasks,
    OneBatch,
    OneTask,
    SteerResult,
    SteerTasks,
    SubmitTask,
    Submitted,
    WaitResult,
    WaitTasks,
)
from protocol.methods import (
    BATCH_SHOW,
    NODE_REMOVE,
    NODE_SHOW,
    TASK_EXPLAIN,
    TASK_KILL,
    TASK_LIST,
    TASK_PAUSE,
    TASK_SHOW,
    TASK_SUBMIT,
    TASK_WAIT,
)
from protocol.models.access import Role
from protocol.models.node import NodeState
from protocol.models.task import Cause, TaskSpec, TaskState
from tests.support.host import (
    TOKENS,
    RunningHost,
    ScriptedRunner,
    linked_runner,
    running_host,
)


async def submit(connection: Connection, count: int = 1, number: int = 1, **spec: Any) -> Submitted:
    wanted = TaskSpec(**{"command": ("true",), **spec})
    array = 0 if count == 1 else count
    return await connection.call(
        TASK_SUBMIT, SubmitTask(request_id=f"request-{number}", spec=wanted, array=array)
    )


async def end_next(runner: ScriptedRunner) -> TaskId:
    order = await runner.start()
    await runner.end(order)
    return order.task


async def test_a_wait_is_answered_when_the_last_task_is_over(host: RunningHost) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        batch = await submit(admin, 3)
        ids = tuple(batch.ids())
        waits = [
            asyncio.create_task(admin.call(TASK_WAIT, question))
            for question in (WaitTasks(tasks=ids), WaitTasks(batch=batch.batch))
        ]
        for _ in ids:
            assert not any(wait.done() for wait in waits)
            await end_next(runner)
        assert await asyncio.gather(*waits) == [WaitResult(done=True)] * 2
        # Over already: at once, and it is told as it is in the store.
        assert await admin.call(TASK_WAIT, WaitTasks(tasks=ids[:1])) == WaitResult(done=True)
        shown = (await admin.call(TASK_SHOW, OneTask(ids[0]))).task
        assert shown.state is TaskState.COMPLETED
        assert [change.state for change in shown.history][:2] == ["queued", "assigned"]


async def test_a_wait_is_not_answered_before_the_end_is_committed(
    host: RunningHost, hold_writes: Callable[[], threading.Event]
) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        batch = await submit(admin)
        (task,) = batch.ids()
        order = await runner.start()
        early = asyncio.create_task(admin.call(TASK_WAIT, WaitTasks(tasks=(task,))))
        release = hold_writes()
        ending = asyncio.create_task(runner.end(order))
        await runner.beat()  # answered: the report has been read
        late = [
            asyncio.create_task(admin.call(TASK_WAIT, question))
            for question in (WaitTasks(tasks=(task,)), WaitTasks(batch=batch.batch))
        ]
        await asyncio.sleep(0.05)
        assert not any(job.done() for job in (early, *late, ending))
        release.set()
        assert [await job for job in (early, *late)] == [WaitResult(done=True)] * 3
        await ending


async def test_a_wait_is_not_answered_by_an_end_that_cannot_be_stored(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, tried_again, tries, write = threading.Event(), threading.Event(), [0], TaskStore.write

    def fail(store: TaskStore, group: Group) -> None:
        if failing.is_set():
            tries[0] += 1
            if tries[0] == 2:
                tried_again.set()
            raise Unavailable("the disk is full")
        write(store, group)

    monkeypatch.setattr(TaskStore, "write", fail)
    async with linked_runner(host) as runner, await host.connect() as admin:
        batch = await submit(admin)
        order = await runner.start()
        failing.set()
        ending = asyncio.create_task(runner.end(order))
        # The second try is one of a host that knows.
        assert await asyncio.to_thread(tried_again.wait, 10)
        for question in (WaitTasks(tasks=tuple(batch.ids())), WaitTasks(batch=batch.batch)):
            brief = replace(question, hold_s=0.05)
            assert await admin.call(TASK_WAIT, brief) == WaitResult(done=False, left=1)
        waiting = asyncio.create_task(admin.call(TASK_WAIT, WaitTasks(batch=batch.batch)))
        failing.clear()
        assert await waiting == WaitResult(done=True)
        await ending


async def test_a_wait_that_is_held_too_long_says_how_many_are_left(host: RunningHost) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        batch = await submit(admin, 3)
        await end_next(runner)
        for hold_s in (0.05, 0.0):
            question = WaitTasks(batch=batch.batch, hold_s=hold_s)
            assert await admin.call(TASK_WAIT, question) == WaitResult(done=False, left=2)


async def test_a_wait_is_over_when_the_task_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_TICK_S", 0.05)
    settings = {"heartbeat_s": 0.1, "lost_after_s": 0.4}
    async with running_host(tmp_path / "data", **settings) as host, await host.connect() as admin:
        async with linked_runner(host) as runner:
            (task,) = (await submit(admin)).ids()
            await runner.run(await runner.start())
            waiting = asyncio.create_task(admin.call(TASK_WAIT, WaitTasks(tasks=(task,))))
        assert await asyncio.wait_for(waiting, 5) == WaitResult(done=True)
        assert (await admin.call(TASK_SHOW, OneTask(task))).task.state is TaskState.LOST
        explained = (await admin.call(TASK_EXPLAIN, OneTask(task))).explanation
        assert explained.summary == "n1 is away; if it comes back the task is known again"


@pytest.mark.parametrize(
    ("question", "kind", "told"),
    [
        (WaitTasks(tasks=(TaskId(5),)), NotFound, "there is no task 5"),
        (WaitTasks(batch=BatchId(5)), NotFound, "there is no batch 5"),
        (WaitTasks(), BadRequest, "name either tasks or a batch"),
        (WaitTasks(tasks=(TaskId(5),), batch=BatchId(5)), BadRequest, "name either"),
        (WaitTasks(tasks=tuple(map(TaskId, range(1001)))), BadRequest, "1001 tasks are named"),
    ],
)
async def test_what_cannot_be_waited_for_is_refused(
    host: RunningHost, question: WaitTasks, kind: type[Exception], told: str
) -> None:
    async with await host.connect(Role.VIEWER) as viewer:
        with pytest.raises(kind, match=told):
            await viewer.call(TASK_WAIT, question)


async def test_waiters_that_go_away_leave_nothing_behind(host: RunningHost) -> None:
    async with await host.connect() as admin:
        batch = await submit(admin, 2)
        impatient = await host.connect()
        wait = asyncio.create_task(impatient.call(TASK_WAIT, WaitTasks(batch=batch.batch)))
        cancelled = asyncio.create_task(admin.call(TASK_WAIT, WaitTasks(batch=batch.batch)))
        await asyncio.sleep(0.02)
        await impatient.close()
        cancelled.cancel()
        await asyncio.gather(wait, cancelled, return_exceptions=True)
        assert (await admin.call(TASK_KILL, SteerTasks(batch=batch.batch))).asked == 2
        assert await admin.call(TASK_WAIT, WaitTasks(batch=batch.batch)) == WaitResult(done=True)


async def test_the_client_waits_for_a_whole_batch(host: RunningHost) -> None:
    async with linked_runner(host) as runner, connect(host.url, TOKENS[Role.USER]) as cluster:
        submitted = await cluster.submit(["true"], array=5, cores=0)
        waiting = asyncio.create_task(cluster.wait(submitted, timeout_s=10))
        for _ in range(5):
            await end_next(runner)
        tasks = await waiting
        assert [task.id for task in tasks] == list(submitted.ids())
        assert {task.state for task in tasks} == {TaskState.COMPLETED}


async def test_steering_says_of_each_task_what_became_of_it(host: RunningHost) -> None:
    async with (
        linked_runner(host) as runner,
        await host.connect() as admin,
        await host.connect(Role.USER) as user,
    ):
        (ended,) = (await submit(admin, number=1)).ids()
        await end_next(runner)
        (running,) = (await submit(admin, number=2)).ids()
        await runner.run(await runner.start())
        (waiting,) = (await submit(admin, number=3, cores=4)).ids()
        names = (ended, running, waiting, TaskId(5))
        assert await user.call(TASK_KILL, SteerTasks(tasks=names)) == SteerResult(
            0,
            (
                (ended, "it is completed already"),
                (running, "it belongs to somebody else"),
                (waiting, "it belongs to somebody else"),
                (TaskId(5), "there is no such task"),
            ),
        )
        paused = await admin.call(TASK_PAUSE, SteerTasks(tasks=names))
        assert (paused.asked, dict(paused.refused)[waiting]) == (1, "it is queued, not running")
        assert isinstance(await runner.order(), OrderPause)
        killed = await admin.call(TASK_KILL, SteerTasks(tasks=names))
        assert (killed.asked, [task for task, _ in killed.refused]) == (2, [ended, 5])
        assert isinstance(await runner.order(), OrderKill)
        shown = (await admin.call(TASK_SHOW, OneTask(waiting))).task
        assert shown.exit is not None
        assert (shown.state, shown.exit.cause) == (TaskState.KILLED, Cause.KILLED)


async def test_a_request_is_the_same_whatever_the_order_of_its_variables(host: RunningHost) -> None:
    async with await host.connect() as admin:
        first = await submit(admin, env={"A": "1", "B": "2"})
        again = await submit(admin, env={"B": "2", "A": "1"})
        assert (again.batch, again.repeated) == (first.batch, True)
        with pytest.raises(Conflict, match="was used for something else"):
            await submit(admin, env={"A": "1", "B": "3"})
        async with await host.connect(Role.USER) as user:
            other = await submit(user, env={"A": "1", "B": "3"})
            assert not other.repeated, "request ids of two owners were taken for one"


async def test_rows_are_brief_and_pages_go_to_the_end(host: RunningHost) -> None:
    async with await host.connect() as admin:
        batch = await submit(admin, 1200, command=("echo", "x" * 5000), env={"SECRET": "s"})
        found: list[TaskId] = []
        before, more = None, True
        while more:
            page = await admin.call(TASK_LIST, ListTasks(before=before, limit=500))
            assert {
                (task.spec.env == {}, len(task.spec.command[1]) < 300) for task in page.tasks
            } == {(True, True)}
            found += [task.id for task in page.tasks]
            before, more = page.tasks[-1].id, page.more
        assert found == sorted(batch.ids(), reverse=True)
        whole = (await admin.call(TASK_SHOW, OneTask(found[0]))).task
        assert (whole.spec.env, len(whole.spec.command[1])) == ({"SECRET": "s"}, 5000)


async def test_a_batch_is_read_in_the_order_of_its_tasks(host: RunningHost) -> None:
    async with await host.connect() as admin:
        submitted = await submit(admin, 5)
        await submit(admin, number=2)
        first = ListTasks(batch=submitted.batch, after=TaskId(0), limit=3)
        page = await admin.call(TASK_LIST, first)
        assert ([task.index for task in page.tasks], page.more) == ([0, 1, 2], True)
        page = await admin.call(TASK_LIST, replace(first, after=page.tasks[-1].id))
        assert ([task.index for task in page.tasks], page.more) == ([3, 4], False)


async def test_who_takes_a_batch_for_a_task_is_told_and_the_other_way_round(
    host: RunningHost,
) -> None:
    async with await host.connect() as admin:
        submitted = await submit(admin)
        (task,) = submitted.ids()
        batch = submitted.batch
        with pytest.raises(NotFound) as caught:
            await admin.call(TASK_SHOW, OneTask(TaskId(batch)))
        assert caught.value.hint == f"{batch} is a batch: kohaku batch show {batch}"
        with pytest.raises(NotFound) as caught:
            await admin.call(BATCH_SHOW, OneBatch(BatchId(task)))
        assert caught.value.hint == f"{task} is a task: kohaku task show {task}"
        with pytest.raises(NotFound) as caught:
            await admin.call(TASK_WAIT, WaitTasks(batch=BatchId(task)))
        assert caught.value.hint == f"{task} is a task: kohaku task show {task}"
        named = TaskId(batch)
        result = await admin.call(TASK_KILL, SteerTasks(tasks=(named,)))
        assert result == SteerResult(
            0, ((named, f"it is a batch, see: kohaku batch show {batch}"),)
        )


async def test_a_node_removed_by_force_ends_its_tasks_for_those_who_wait(host: RunningHost) -> None:
    async with await host.connect() as admin:
        async with linked_runner(host) as runner:
            (task,) = (await submit(admin)).ids()
            await runner.run(await runner.start())
            waiting = asyncio.create_task(admin.call(TASK_WAIT, WaitTasks(tasks=(task,))))
            with pytest.raises(Conflict, match="node n1 has 1 task on it"):
                await admin.call(NODE_REMOVE, RemoveNode("n1"))
            gone = await admin.call(NODE_REMOVE, RemoveNode("n1", force=True))
            assert gone.node.state is NodeState.ONLINE
            assert (await waiting).done
        with pytest.raises(NotFound, match="no node is called 'n1'"):
            await admin.call(NODE_SHOW, OneNode("n1"))
        shown = (await admin.call(TASK_SHOW, OneTask(task))).task
        assert shown.exit is not None
        assert shown.exit.cause is Cause.NODE_REMOVED
