"""The runners' door: who becomes a node, who may speak for it, and what counts as said."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from kohaku_daemon.core.access.tokens import token_digest
from kohaku_daemon.core.cluster.records import JoinTokenRecord, PutDocument
from kohaku_daemon.host import daemon
from kohaku_daemon.store.documents import Documents
from kohaku_daemon.store.tasks import TaskStore
from protocol.errors import (
    BadRequest,
    Conflict,
    KohakuError,
    NotFound,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from protocol.ids import BatchId, TaskId
from protocol.messages.cluster import ListEvents
from protocol.messages.node import OneNode, RemoveNode
from protocol.messages.runner import (
    AttemptReport,
    AttemptState,
    OrderKill,
    OrderStart,
    PinImage,
    PinnedImage,
    Report,
)
from protocol.messages.task import OneTask, SteerTasks, SubmitTask
from protocol.methods import (
    EVENT_LIST,
    METHODS,
    NODE_REMOVE,
    NODE_SHOW,
    RUNNER_JOIN,
    RUNNER_PIN_IMAGE,
    RUNNER_REPORT,
    TASK_KILL,
    TASK_SHOW,
    TASK_SUBMIT,
    Door,
)
from protocol.models.access import Role
from protocol.models.node import BackendInfo, DiskReading, NodeState
from protocol.models.task import TaskSpec, TaskState
from protocol.session import CloseCode
from tests.support.builders import an_inventory
from tests.support.host import (
    RunningHost,
    a_credential,
    dial_runner,
    give_tokens,
    join,
    join_token,
    linked_runner,
    running_host,
)

SUBMIT = SubmitTask(request_id="request-1", spec=TaskSpec(command=("true",)))


async def state_of(host: RunningHost, name: str) -> NodeState:
    async with await host.connect(Role.VIEWER) as viewer:
        return (await viewer.call(NODE_SHOW, OneNode(name))).node.state


async def submit(host: RunningHost, **changes: Any) -> list[int]:
    async with await host.connect() as admin:
        return list((await admin.call(TASK_SUBMIT, replace(SUBMIT, **changes))).ids())


async def task_state(host: RunningHost, task: int) -> TaskState:
    async with await host.connect() as admin:
        return (await admin.call(TASK_SHOW, OneTask(TaskId(task)))).task.state


# Who may come in ------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, None, "garbage"])
async def test_a_runner_without_credential_may_only_join(host: RunningHost, params: Any) -> None:
    runner = await dial_runner(host, is_node=False)
    # Whether or not there is such a method, at this door or at all.
    refused = {"nothing.such"} | {
        method.name
        for method in METHODS.values()
        if method.door is not Door.BOTH and method is not RUNNER_JOIN
    }
    assert len(refused) > 20
    for name in refused:
        with pytest.raises(Unauthenticated, match="has not shown a credential"):
            await runner.connection.call_raw(name, params)
    await runner.close()


async def test_a_node_is_told_which_methods_are_not_there(host: RunningHost) -> None:
    async with linked_runner(host) as runner:
        for name in ("task.list", "nothing.such"):
            with pytest.raises(BadRequest, match="there is no method"):
                await runner.connection.call_raw(name, {})


@pytest.mark.parametrize("credential", ["khr_" + "0" * 64, "kht_" + "0" * 64, "khr_", "x" * 3000])
async def test_a_credential_that_no_node_has_is_refused_at_hello(
    host: RunningHost, credential: str
) -> None:
    with pytest.raises(Unauthenticated, match="not known here") as caught:
        await dial_runner(host, credential=credential)
    assert "kohaku node join-token" in caught.value.hint


async def test_a_join_token_lets_in_so_many_under_the_names_it_is_for(host: RunningHost) -> None:
    token, of_n2 = await join_token(host, uses=1), await join_token(host, node="n2")
    runner = await dial_runner(host, "n1", is_node=False)
    refusals: list[tuple[dict[str, str], str]] = [
        ({"node": "N 1"}, "cannot be a node's name"),
        ({"credential": "khr_short"}, "credential must be khr_"),
        ({"token": of_n2}, "is for node n2, not n1"),
        ({"token": "khj_" + "0" * 64}, "not known here"),
        ({"labels": {"a b": ""}}, "cannot be a label"),  # type: ignore[dict-item]
    ]
    for change, told in refusals:
        with pytest.raises(KohakuError, match=told):
            await join(runner, change.pop("token", token), **change)
    await join(runner, token)
    with pytest.raises(Conflict, match="is node n1 already"):
        await join(runner, token)
    await runner.close()

    late = await dial_runner(host, "n3", is_node=False)
    with pytest.raises(Unauthenticated, match="is used up"):
        await join(late, token)
    # The name is taken: told to who has a token only, and the token is not used up by it.
    with pytest.raises(Conflict, match="a node called n1 is in the cluster already"):
        await join(late, await join_token(host), node="n1")
    with pytest.raises(Conflict, match="credential is that of node n1"):
        await join(late, await join_token(host), credential=a_credential("n1"))
    await join(late, of_n2, node="n2")
    await late.close()
    assert await state_of(host, "n2") is NodeState.OFFLINE


async def test_an_expired_join_token_is_refused(tmp_path: Path) -> None:
    token = "khj_" + "5" * 64
    give_tokens(tmp_path / "data")
    documents = Documents.open(tmp_path / "data/cluster.json", new_cluster="77")
    old = JoinTokenRecord(
        digest=token_digest(token), prefix=token[:10], uses_left=1, expires_at=1_800_000.0
    )
    documents.apply([PutDocument(old)])
    async with running_host(tmp_path / "data") as host:
        runner = await dial_runner(host, is_node=False)
        with pytest.raises(Unauthenticated, match=r"has expired|unknown or used up"):
            await join(runner, token)
        await runner.close()


async def test_a_join_whose_answer_was_lost_is_answered_again(host: RunningHost) -> None:
    token = await join_token(host, uses=1)
    for _ in range(3):
        runner = await dial_runner(host, is_node=False)
        await join(runner, token)
        await runner.close()
    runner = await dial_runner(host)
    await runner.register()
    assert await state_of(host, "n1") is NodeState.ONLINE
    await runner.close()


async def test_joins_are_in_the_audit_log_and_guesses_are_not(host: RunningHost) -> None:
    runner = await dial_runner(host, "n1", is_node=False)
    with pytest.raises(Unauthenticated):
        await join(runner, "khj_" + "0" * 64)
    with pytest.raises(Unauthenticated):
        await join(runner, await join_token(host, node="n2"))
    await join(runner, await join_token(host))
    await runner.close()
    await host.stop()
    connection = sqlite3.connect(host.data / "tasks.sqlite")
    lines = connection.execute(
        "SELECT actor, subject, outcome FROM audit WHERE method = 'runner.join'"
    ).fetchall()
    connection.close()
    assert lines == [("runner", "node n1", "unauthenticated"), ("runner", "node n1", "ok")]


# Who speaks for a node ------------------------------------------------------------------


async def test_what_a_runner_says_before_it_registered_does_not_count(host: RunningHost) -> None:
    runner = await dial_runner(host, is_node=False)
    await join(runner, await join_token(host))
    with pytest.raises(Conflict, match=r"runner\.heartbeat comes after runner\.register"):
        await runner.beat()
    with pytest.raises(Conflict, match=r"runner\.report comes after"):
        await runner.connection.call(RUNNER_REPORT, Report(()))
    assert await state_of(host, "n1") is NodeState.OFFLINE
    with pytest.raises(Conflict, match="calls itself n2, and its credential is node n1's"):
        await runner.register(node="n2")
    await runner.register(node="n1")
    assert await state_of(host, "n1") is NodeState.ONLINE
    await runner.close()
    async with asyncio.timeout(5):
        while await state_of(host, "n1") is not NodeState.OFFLINE:
            pass


async def test_a_second_runner_with_one_credential_is_refused_while_the_first_is_heard(
    tmp_path: Path,
) -> None:
    async with running_host(tmp_path / "data", heartbeat_s=0.2) as host:
        async with linked_runner(host) as first:
            copy = await dial_runner(host)
            with pytest.raises(Conflict, match="connected already, from 127") as caught:
                await copy.register(instance="another")
            assert "a copy of its data folder" in caught.value.hint
            await first.beat()
            assert first.connection.is_open
            # Silent for as long as it takes to miss three heartbeats.
            async with asyncio.timeout(5):
                while first.connection.is_open:
                    try:
                        await copy.register(instance="another")
                    except Conflict:
                        await asyncio.sleep(0.05)
            assert (await first.connection.closed).code == CloseCode.REPLACED
            assert copy.connection.is_open
            await copy.close()
        await until_offline(host)
        third = await dial_runner(host)
        await third.register(instance="third")  # at once: nobody holds the link
        await third.close()


async def until_offline(host: RunningHost) -> None:
    async with asyncio.timeout(5):
        while await state_of(host, "n1") is not NodeState.OFFLINE:
            pass


async def test_the_same_runner_dialling_again_takes_over_at_once(host: RunningHost) -> None:
    async with linked_runner(host) as first:
        again = await dial_runner(host)
        await again.register(instance="first")
        await again.take_orders()
        ended = await first.connection.closed
        assert (ended.code, ended.reason) == (
            CloseCode.REPLACED,
            "the same runner has connected again",
        )
        assert await state_of(host, "n1") is NodeState.ONLINE, "the old link's end took it offline"
        (task,) = await submit(host)
        assert (await again.start()).task == task
        await again.close()


async def test_a_removed_nodes_runner_is_put_out_and_stays_out(host: RunningHost) -> None:
    token = await join_token(host, uses=2)
    async with linked_runner(host) as runner:
        visitor = await dial_runner(host)  # has said hello, and not registered yet
        async with await host.connect() as admin:
            await admin.call(NODE_REMOVE, RemoveNode("n1"))
        ended = await runner.connection.closed
        assert (ended.code, ended.reason) == (
            CloseCode.REPLACED,
            "the node was removed from the cluster",
        )
    with pytest.raises(Unauthenticated, match="its node was removed"):
        await dial_runner(host)
    with pytest.raises(Unauthenticated, match="n1 was removed"):
        await visitor.register()

    other = await dial_runner(host, is_node=False, credential=a_credential("other"))
    await join(other, token, node="n1")
    with pytest.raises(Unauthenticated, match="n1 was removed"):
        await visitor.register()  # another's node by now
    await other.register()
    assert await state_of(host, "n1") is NodeState.ONLINE
    await other.close()
    await visitor.close()


async def test_what_could_not_be_shown_to_anybody_is_not_taken(host: RunningHost) -> None:
    async with linked_runner(host) as runner:
        disks = tuple(DiskReading("/" + "d" * 1000, 1, 1) for _ in range(100))
        with pytest.raises(TooLarge, match="the readings"):
            await runner.beat(disks=disks)
        with pytest.raises(TooLarge, match="the inventory"):
            await runner.register(replace(an_inventory(), kernel="k" * 100_000))
        await runner.beat()


async def test_what_cannot_be_is_not_taken(host: RunningHost) -> None:
    async with linked_runner(host) as runner:
        with pytest.raises(BadRequest, match="the readings"):
            await runner.beat(cpu_percent=float("nan"))
        with pytest.raises(BadRequest, match="twice among its cores"):
            await runner.register(replace(an_inventory(), cores=(0, 0)))
        (task,) = await submit(host)
        order = await runner.start()
        with pytest.raises(BadRequest, match=f"task {task}: exit code 300"):
            await runner.end(order, code=300)
        await runner.report(order, AttemptState.RUNNING, note="n" * 50_000)
        async with await host.connect() as admin:
            shown = (await admin.call(TASK_SHOW, OneTask(TaskId(task)))).task
        assert shown.state is TaskState.RUNNING
        assert len(shown.history[-1].cause) == 1000


async def test_who_registers_for_ever_is_refused_after_a_while(host: RunningHost) -> None:
    async with linked_runner(host) as runner:
        for _ in range(29):  # once it has already
            await runner.register()
        with pytest.raises(Unavailable, match="30 times in a minute"):
            await runner.register()
        await runner.beat()  # its link stays


async def test_a_registration_that_never_ends_is_refused(host: RunningHost) -> None:
    async with linked_runner(host) as runner:
        many = tuple(
            AttemptReport(task=TaskId(number), attempt=1, state=AttemptState.ENDED)
            for number in range(5000)
        )
        for _ in range(10):
            await runner.register(attempts=many, more=True)
        with pytest.raises(TooLarge, match="more than 50000 launches"):
            await runner.register(attempts=many, more=True)
        await runner.register(attempts=many[:100])


async def test_of_launches_nobody_knows_some_are_told(host: RunningHost) -> None:
    async with linked_runner(host) as runner, await host.connect() as admin:
        strange = tuple(
            AttemptReport(task=TaskId(number), attempt=1, state=AttemptState.RUNNING)
            for number in range(1, 1001)
        )
        await runner.register(attempts=strange)
        events = (await admin.call(EVENT_LIST, ListEvents(limit=500))).events
        assert sum(event.kind == "task.unknown" for event in events) == 100


# Orders and reports ---------------------------------------------------------------------


async def test_a_report_is_acknowledged_once_it_is_committed(
    host: RunningHost, hold_writes: Callable[[], threading.Event]
) -> None:
    async with linked_runner(host) as runner:
        (task,) = await submit(host)
        order = await runner.start()
        await runner.run(order)
        release = hold_writes()
        ending = asyncio.create_task(runner.end(order, code=3))
        # The heartbeat after it is answered: the report has been read, and is held back.
        await runner.beat()
        await asyncio.sleep(0.05)
        assert not ending.done()
        release.set()
        await ending
        assert await task_state(host, task) is TaskState.FAILED


async def test_a_report_that_was_acknowledged_survives_the_host(tmp_path: Path) -> None:
    async with running_host(tmp_path / "data") as host, linked_runner(host) as runner:
        (task,) = await submit(host)
        order = await runner.start()
        await runner.end(order)
        await host.kill()
        store = TaskStore.open(tmp_path / "data/tasks.sqlite")
        record = store.task(order.task)
        store.close()
        assert record is not None
        assert (record.id, record.state) == (task, TaskState.COMPLETED)


async def test_what_a_batch_runs_is_kept_before_the_node_hears_it(tmp_path: Path) -> None:
    docker = an_inventory(backends=(BackendInfo("docker"),))
    digest = f"sha256:{7:064x}"
    async with (
        running_host(tmp_path / "data") as host,
        linked_runner(host, inventory=docker) as runner,
    ):
        await submit(host, spec=TaskSpec(command=("true",), image="ghcr.io/lab/x:1"))
        order = await runner.start()
        asked = PinImage(batch=order.batch, reference="ghcr.io/lab/x:1")
        assert await runner.connection.call(RUNNER_PIN_IMAGE, asked) == PinnedImage()
        found = replace(asked, digest=digest)
        assert await runner.connection.call(RUNNER_PIN_IMAGE, found) == PinnedImage(digest)
        await host.kill()
        store = TaskStore.open(tmp_path / "data/tasks.sqlite")
        record = store.batch(order.batch)
        store.close()
        assert record is not None
        assert record.pinned == digest


async def test_a_node_is_told_nothing_of_batches_that_it_does_not_run(host: RunningHost) -> None:
    async with linked_runner(host) as runner:
        await submit(host)
        await runner.start()
        asked = PinImage(batch=BatchId(5), reference="x")
        with pytest.raises(NotFound):
            await runner.connection.call(RUNNER_PIN_IMAGE, asked)


async def test_orders_travel_in_groups_below_the_limit_of_the_wire(host: RunningHost) -> None:
    runner = await dial_runner(host, is_node=False)
    await join(runner, await join_token(host))
    await runner.register(an_inventory(cores=64, max_tasks=2000))
    # Four bytes each in UTF-8, and one character: what is counted must be bytes.
    wide = TaskSpec(command=("echo", "\N{PILE OF POO}" * 20_000), env={"A": "b" * 60_000}, cores=0)
    small = TaskSpec(command=("true",), cores=0)
    ids = await submit(host, spec=wide, array=10)
    ids += await submit(host, spec=small, array=1000, request_id="request-2")
    await runner.take_orders()
    orders = [await runner.start() for _ in ids]
    assert [order.task for order in orders] == ids
    assert runner.groups[:10] == [1] * 10
    assert len(runner.groups) < 30, runner.groups
    await runner.close()


async def test_orders_wait_for_a_runner_that_does_not_take_them(host: RunningHost) -> None:
    runner = await dial_runner(host, is_node=False)
    await join(runner, await join_token(host))
    await runner.register(an_inventory(cores=4))
    first, second = await submit(host, array=2)
    async with await host.connect() as admin:
        await admin.call(TASK_KILL, SteerTasks(tasks=(first,)))  # type: ignore[arg-type]
    await runner.take_orders()
    orders = [await runner.order() for _ in range(3)]
    assert [(type(order), getattr(order, "task", 0)) for order in orders] == [
        (OrderStart, first),
        (OrderStart, second),
        (OrderKill, first),
    ]
    await runner.close()


async def test_a_long_registration_counts_when_it_is_complete(host: RunningHost) -> None:
    async with linked_runner(host, inventory=an_inventory(max_tasks=300)) as runner:
        ids = await submit(host, spec=TaskSpec(command=("true",), cores=0), array=200)
        orders = [await runner.start() for _ in ids]
        for order in orders:
            await runner.run(order)
    said = [
        AttemptReport(task=order.task, attempt=1, state=AttemptState.RUNNING) for order in orders
    ]
    again = await dial_runner(host)
    await again.register(attempts=tuple(said[:150]), more=True)
    assert await state_of(host, "n1") is NodeState.OFFLINE
    await again.register(attempts=tuple(said[150:199]))
    assert await state_of(host, "n1") is NodeState.ONLINE
    states = [await task_state(host, task) for task in (ids[0], ids[198], ids[199])]
    assert states == [TaskState.RUNNING, TaskState.RUNNING, TaskState.LOST]
    await again.close()


async def test_a_runner_that_is_silent_goes_offline_and_its_word_brings_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_TICK_S", 0.05)
    async with running_host(tmp_path / "data", heartbeat_s=0.1, lost_after_s=0.5) as host:
        async with linked_runner(host) as runner:
            (task,) = await submit(host)
            order = await runner.start()
            await runner.run(order)
            await until_offline(host)
            assert await task_state(host, task) is TaskState.RUNNING
            await runner.beat()
            assert await state_of(host, "n1") is NodeState.ONLINE
            # Silent for longer than the grace: the task is lost, and a link has to begin anew.
            async with asyncio.timeout(5):
                while await task_state(host, task) is not TaskState.LOST:
                    pass
            await runner.beat()
            ended = await runner.connection.closed
            assert (ended.code, ended.reason) == (
                CloseCode.NORMAL,
                "it was silent too long: register again",
            )
        again = await dial_runner(host)
        await again.register(
            attempts=(AttemptReport(task=order.task, attempt=1, state=AttemptState.RUNNING),)
        )
        assert await task_state(host, task) is TaskState.RUNNING
        await again.close()
