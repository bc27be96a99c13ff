"""The cluster of scripts: which host is meant, and how work goes on when the host goes away."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from kohaku_daemon.wire import ItemSink
from protocol import backoff, client, contexts
from protocol.client import Cluster, SubmitOptions, connect
from protocol.contexts import Context
from protocol.errors import BadRequest, Conflict, KohakuError, NotFound, TimedOut, Unavailable
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.messages.cluster import Status, Topic, Update, WatchEnded
from protocol.messages.node import ListNodes, NodeList, OneNode
from protocol.messages.stream import LogChunk, LogEnd, OpenLogs, Source, Ticket
from protocol.messages.task import (
    ListTasks,
    OneTask,
    SteerResult,
    SteerTasks,
    SubmitTask,
    Submitted,
    TaskPage,
    TaskResult,
    WaitResult,
    WaitTasks,
)
from protocol.methods import NODE_DRAIN
from protocol.models.node import Node, NodeState
from protocol.models.target import Target
from protocol.models.task import Task, TaskSpec, TaskState
from tests.protocol.loopback import TOKEN, ScriptedHost, scripted_host

BATCH = BatchId(5000)
LOGS = TaskId(1)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))
    monkeypatch.delenv("KOHAKU_HOST", raising=False)
    monkeypatch.delenv("KOHAKU_TOKEN", raising=False)


@pytest.fixture
async def host() -> AsyncIterator[ScriptedHost]:
    async with scripted_host() as host:
        yield host


@pytest.fixture
async def cluster(host: ScriptedHost, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(client, "delay_s", lambda *_: 0.01)
    async with connect(host.url, TOKEN, patience_s=5) as cluster:
        yield cluster


def a_task(number: int, index: int = 0) -> Task:
    return Task(
        id=TaskId(number), batch=BATCH, index=index, owner=UserName("ann"),
        state=TaskState.COMPLETED, spec=TaskSpec(command=("true",)),
    )  # fmt: skip


async def status(_: object) -> msgspec.Struct:
    return Status(cluster="77", version="1", started_at=0.0, nodes={})


def first_params(host: ScriptedHost, method: str) -> Any:
    return next(params for name, params in host.asked if name == method)


# -- Which host -----------------------------------------------------------------------


def saved_and_environment(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    if "context" in names:
        contexts.save(Context("lab", "http://lab:8000", "kht_lab"))
        contexts.save(Context("home", "http://home:8000", "kht_home"), use=False)
    if "host" in names:
        monkeypatch.setenv("KOHAKU_HOST", "env:1")
    if "token" in names:
        monkeypatch.setenv("KOHAKU_TOKEN", "kht_env")


@pytest.mark.parametrize(
    ("given", "arguments", "url", "token"),
    [
        (("context",), {}, "http://lab:8000", "kht_lab"),
        (("context",), {"context": "home"}, "http://home:8000", "kht_home"),
        (("context", "host", "token"), {"context": "home"}, "http://home:8000", "kht_home"),
        (("context", "host", "token"), {}, "http://env:1", "kht_env"),
        (("context", "host"), {}, "http://env:1", ""),
        (("context", "token"), {}, "http://lab:8000", "kht_env"),
        (("context",), {"url": "lab"}, "http://lab:8000", "kht_lab"),
        (("context",), {"url": "other"}, "http://other:8000", ""),
        (("context", "host", "token"), {"url": "arg:2"}, "http://arg:2", "kht_env"),
        (
            ("context", "host", "token"),
            {"url": "arg:2", "token": "kht_arg"},
            "http://arg:2",
            "kht_arg",
        ),
        (("context", "host", "token"), {"url": "arg:2", "token": ""}, "http://arg:2", ""),
        (("context",), {"token": "kht_arg"}, "http://lab:8000", "kht_arg"),
    ],
)
async def test_which_host_and_token_are_meant(
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str, ...],
    arguments: dict[str, str],
    url: str,
    token: str,
) -> None:
    saved_and_environment(monkeypatch, *given)
    cluster = connect(**arguments)  # type: ignore[arg-type]
    assert (cluster.url, cluster._context.token) == (url, token)
    assert not token or token not in repr(cluster)


async def test_no_host_anywhere_says_what_to_do() -> None:
    with pytest.raises(Unavailable, match="no host is known") as caught:
        connect()
    assert "kohaku login" in caught.value.hint
    with pytest.raises(NotFound, match="'nowhere'"):
        connect(context="nowhere")


async def test_another_cluster_under_a_saved_address_is_noticed(host: ScriptedHost) -> None:
    contexts.save(Context("lab", host.url, TOKEN, cluster="78"))
    with pytest.raises(Conflict, match="another cluster"):
        async with connect():
            pass


async def test_a_host_that_is_not_there_is_told_at_once() -> None:
    async with asyncio.timeout(2):
        with pytest.raises(Unavailable, match="cannot connect"):
            async with connect("127.0.0.1:1", "t"):
                pass


# -- Reconnecting ---------------------------------------------------------------------


async def test_a_call_finds_the_host_again(host: ScriptedHost, cluster: Cluster) -> None:
    host.answers["cluster.status"] = status
    await cluster.status()
    await host.stop()
    call = asyncio.create_task(cluster.status())
    await asyncio.sleep(0.1)
    assert not call.done()
    await host.start()
    assert (await call).cluster == "77"


async def test_patience_ends(host: ScriptedHost, cluster: Cluster) -> None:
    cluster._patience_s = 0.2
    await host.stop()
    async with asyncio.timeout(3):
        with pytest.raises(Unavailable, match="cannot connect"):
            await cluster.status()


async def test_a_refusal_while_dialling_again_is_told_at_once(
    host: ScriptedHost, cluster: Cluster
) -> None:
    await host.stop()
    cluster._context = msgspec.structs.replace(cluster._context, token="revoked")
    await host.start()
    with pytest.raises(KohakuError, match="not known here"):
        await cluster.status()


def cut_off_once(host: ScriptedHost, answer: msgspec.Struct) -> Callable[[Any], Any]:
    """Answer, but the first time only after the connection is gone."""

    async def handle(_: object) -> msgspec.Struct:
        for served in list(host.open):
            if host.count("task.submit") + host.count("node.drain") == 1:
                await served.close(1001, "stopping")
        return answer

    return handle


async def test_a_submission_cut_off_is_repeated_with_its_request_id(
    host: ScriptedHost, cluster: Cluster
) -> None:
    host.answers["task.submit"] = cut_off_once(host, Submitted(BATCH, ((1, 1),)))
    submitted = await cluster.submit(["true"])
    assert list(submitted.ids()) == [1]
    first, second = (params for _, params in host.asked)
    assert first == second


async def test_what_may_have_happened_is_not_repeated(host: ScriptedHost, cluster: Cluster) -> None:
    host.answers["node.drain"] = cut_off_once(host, OneNode("node1"))
    with pytest.raises(Unavailable, match="not known whether it happened"):
        await cluster.call(NODE_DRAIN, OneNode("node1"))
    assert host.count("node.drain") == 1


async def test_what_the_host_says_is_unavailable_is_not_asked_again(
    host: ScriptedHost, cluster: Cluster
) -> None:
    async def offline(_: object) -> msgspec.Struct:
        raise Unavailable("node gpu-01 is offline")

    host.answers["cluster.status"] = offline
    with pytest.raises(Unavailable, match="gpu-01"):
        await cluster.status()
    assert host.count("cluster.status") == 1


async def test_closing_ends_what_waits(host: ScriptedHost, cluster: Cluster) -> None:
    async def never(_: object) -> msgspec.Struct:
        await asyncio.Event().wait()
        raise AssertionError

    host.answers["cluster.status"] = never
    call = asyncio.create_task(cluster.status())
    await host.until(lambda: host.count("cluster.status") == 1)
    await cluster.close()
    with pytest.raises(Unavailable):
        await call


# -- Submitting -----------------------------------------------------------------------


async def submission(
    host: ScriptedHost, cluster: Cluster, command: Any, options: SubmitOptions
) -> SubmitTask:
    async def take(_: object) -> msgspec.Struct:
        return Submitted(BATCH, ((1, 1),))

    host.answers["task.submit"] = take
    await cluster.submit(command, **options)
    params = first_params(host, "task.submit")
    assert isinstance(params, SubmitTask)
    return params


async def test_a_submission_says_what_was_asked(host: ScriptedHost, cluster: Cluster) -> None:
    params = await submission(
        host,
        cluster,
        ["python", "train.py"],
        {
            "name": "train", "env": {"A": "1"}, "cores": 4, "memory": "1.5Gi", "gpus": 2,
            "labels": {"gpu": "a100"}, "priority": 3, "backend": "process", "workdir": "/tmp",
            "targets": ["node1", Target("node2", 1)], "request_id": "12345678", "grace_s": 2.5,
        },
    )  # fmt: skip
    assert params == SubmitTask(
        request_id="12345678",
        spec=TaskSpec(
            command=("python", "train.py"), name="train", env={"A": "1"}, cores=4,
            memory=1536 * 2**20, gpus=2, labels={"gpu": "a100"}, priority=3, backend="process",
            workdir="/tmp", grace_s=2.5,
        ),
        targets=(Target("node1"), Target("node2", 1)),
    )  # fmt: skip


async def test_a_whole_spec_is_taken_as_it_is(host: ScriptedHost, cluster: Cluster) -> None:
    spec = TaskSpec(command=("x",), cores=0, memory=5)
    params = await submission(host, cluster, spec, {"array": 10})
    assert (params.spec, params.array) == (spec, 10)
    assert len(params.request_id) >= 8


async def test_one_target_is_no_list_of_letters(host: ScriptedHost, cluster: Cluster) -> None:
    params = await submission(host, cluster, ["x"], {"targets": "node1:0"})
    assert params.targets == (Target("node1", 0),)


@pytest.mark.parametrize(
    ("command", "options", "why"),
    [
        ("echo hi", {}, "list of words"),
        (["x"], {"memory": "4 gigs"}, "not a size"),
        (["x"], {"targets": ["Node!"]}, "node's name"),
        (TaskSpec(command=("x",)), {"cores": 2, "name": "n"}, "cores, name"),
        (["\udcff"], {}, "not Unicode"),
    ],
)
async def test_a_submission_that_makes_no_sense_is_refused_here(
    host: ScriptedHost, cluster: Cluster, command: Any, options: SubmitOptions, why: str
) -> None:
    with pytest.raises(BadRequest, match=why):
        await cluster.submit(command, **options)
    assert host.asked == []


# -- Waiting, listing, steering -------------------------------------------------------


async def test_waiting_asks_until_all_are_over(host: ScriptedHost, cluster: Cluster) -> None:
    async def over_at_third(_: WaitTasks) -> msgspec.Struct:
        return WaitResult(done=host.count("task.wait") == 3)

    async def show(params: OneTask) -> msgspec.Struct:
        return TaskResult(a_task(params.task))

    host.answers |= {"task.wait": over_at_third, "task.show": show}
    assert [task.id for task in await cluster.wait([9, 3])] == [9, 3]
    assert first_params(host, "task.wait").tasks == (9, 3)


async def test_waiting_goes_on_when_the_host_comes_back(
    host: ScriptedHost, cluster: Cluster
) -> None:
    async def hold(_: object) -> msgspec.Struct:
        if host.count("task.wait") == 1:
            await asyncio.Event().wait()
        return WaitResult(done=True)

    async def show(params: OneTask) -> msgspec.Struct:
        return TaskResult(a_task(params.task))

    host.answers |= {"task.wait": hold, "task.show": show}
    waiting = asyncio.create_task(cluster.wait(7))
    await host.until(lambda: host.count("task.wait") == 1)
    await host.stop()
    await host.start()
    assert [task.id for task in await waiting] == [7]


async def test_waiting_for_a_submission_gives_its_tasks_in_order(
    host: ScriptedHost, cluster: Cluster
) -> None:
    rows = [a_task(100 + index, index) for index in range(450)]

    async def page(params: ListTasks) -> msgspec.Struct:
        older = [row for row in reversed(rows) if params.before is None or row.id < params.before]
        return TaskPage(tuple(older[: params.limit]), more=len(older) > params.limit)

    async def done(_: object) -> msgspec.Struct:
        return WaitResult(done=True)

    host.answers |= {"task.wait": done, "task.list": page}
    found = await cluster.wait(Submitted(BATCH, ((100, 450),)))
    assert found == rows
    assert first_params(host, "task.wait").batch == BATCH
    assert host.count("task.list") == 3
    assert [task.id async for task in cluster.tasks(batch=BATCH, most=3)] == [549, 548, 547]


async def test_waiting_gives_up_in_time(host: ScriptedHost, cluster: Cluster) -> None:
    async def hold(_: object) -> msgspec.Struct:
        await asyncio.Event().wait()
        raise AssertionError

    host.answers["task.wait"] = hold
    with pytest.raises(TimedOut, match=r"within 0\.1 s"):
        await cluster.wait(batch=BATCH, timeout_s=0.1)
    await host.until(lambda: host.cancelled == ["task.wait"])


async def test_steering_many_goes_in_groups(host: ScriptedHost, cluster: Cluster) -> None:
    async def kill(params: SteerTasks) -> msgspec.Struct:
        return SteerResult(len(params.tasks) - 1, ((params.tasks[0], "is over"),))

    host.answers["task.kill"] = kill
    result = await cluster.kill(range(1, 2501))
    assert result.asked == 2497
    assert [task for task, _ in result.refused] == [1, 1001, 2001]


@pytest.mark.parametrize(("tasks", "batch"), [((), None), ([1], 5)])
async def test_what_is_meant_must_be_named_once(
    cluster: Cluster, tasks: tuple[int, ...], batch: int | None
) -> None:
    with pytest.raises(BadRequest, match="either tasks or one batch"):
        await cluster.kill(tasks, batch=batch)


async def test_nodes_come_in_pages(host: ScriptedHost, cluster: Cluster) -> None:
    names = [f"node{number}" for number in range(5)]

    async def page(params: ListNodes) -> msgspec.Struct:
        left = [name for name in names if name > params.after]
        nodes = tuple(Node(name=NodeName(name), state=NodeState.ONLINE) for name in left[:2])
        return NodeList(nodes, more=len(left) > 2)

    host.answers["node.list"] = page
    assert [node.name for node in await cluster.nodes()] == names


# -- Watching -------------------------------------------------------------------------


async def test_a_watch_goes_on_from_the_last_revision(host: ScriptedHost, cluster: Cluster) -> None:
    async def resumed(params: Any, sink: ItemSink) -> msgspec.Struct:
        await sink.send(Update(revision=f"after {params.since or 'nothing'}"))
        await sink.send(Update())  # without a revision: not safe to go on from
        if host.count("watch") % 2:
            (served,) = host.open
            await served.close(1001, "stopping")
        return WatchEnded()

    host.answers["watch"] = resumed
    revisions = []
    async with aclosing(cluster.watch([Topic.TASKS, "nodes"], tasks=[4])) as updates:
        async for update in updates:
            revisions.append(update.revision)
            if len(revisions) == 6:
                break
    assert revisions == [
        "after nothing", "",
        "after after nothing", "",
        "after after after nothing", "",
    ]  # fmt: skip
    assert first_params(host, "watch").topics == (Topic.TASKS, Topic.NODES)


async def test_a_watch_that_is_refused_is_refused(host: ScriptedHost, cluster: Cluster) -> None:
    with pytest.raises(NotFound):
        await anext(cluster.watch([Topic.EVENTS]))


async def test_leaving_a_watch_cancels_it(host: ScriptedHost, cluster: Cluster) -> None:
    async def tell(_: object, sink: ItemSink) -> msgspec.Struct:
        await sink.send(Update())
        await asyncio.Event().wait()
        raise AssertionError

    host.answers["watch"] = tell
    watch = cluster.watch([Topic.TASKS])
    await anext(watch)
    await watch.aclose()
    await host.until(lambda: host.cancelled == ["watch"])


# -- Logs -----------------------------------------------------------------------------

OUTPUT = {Source.STDOUT: b"0123456789" * 5, Source.STDERR: b"abcdefghij"}


class LogHost:
    """Serves ``OUTPUT`` in chunks of 7 bytes, and cuts each connection after some."""

    def __init__(self, host: ScriptedHost, chunks_before_cut: list[int], *, repeats: int = 0):
        self.questions: list[OpenLogs] = []
        self._cuts = chunks_before_cut
        self._repeats = repeats
        host.answers["task.logs"] = self.ticket
        host.data["T"] = self.serve

    async def ticket(self, question: OpenLogs) -> msgspec.Struct:
        self.questions.append(question)
        return Ticket("T", "/data", 0.0)

    async def serve(self, socket: web.WebSocketResponse) -> None:
        question = self.questions[-1]
        left = self._cuts.pop(0) if self._cuts else 1000
        for source in question.sources:
            start = question.stdout_from if source is Source.STDOUT else question.stderr_from
            for offset in range(max(start - self._repeats, 0), len(OUTPUT[source]), 7):
                if left == 0:
                    await socket.close(code=1011)
                    return
                left -= 1
                chunk = LogChunk(source, offset, OUTPUT[source][offset : offset + 7])
                await socket.send_bytes(msgspec.msgpack.encode(chunk))
        await socket.send_bytes(msgspec.msgpack.encode(LogEnd(50, 10)))
        await socket.close()


async def read_all(cluster: Cluster, **options: Any) -> tuple[dict[Source, bytes], LogEnd]:
    got = dict.fromkeys(Source, b"")
    end = None
    async for item in cluster.logs(LOGS, **options):
        assert end is None
        if isinstance(item, LogEnd):
            end = item
        else:
            assert item.offset == len(got[item.source])
            got[item.source] += item.data
    assert end is not None
    return got, end


async def test_logs_are_read_to_their_end(host: ScriptedHost, cluster: Cluster) -> None:
    served = LogHost(host, [])
    got, end = await read_all(cluster, tail_lines=4, attempt=2, follow=True)
    assert got == OUTPUT
    assert end == LogEnd(50, 10)
    assert served.questions == [OpenLogs(task=LOGS, attempt=2, tail_lines=4, follow=True)]


@pytest.mark.parametrize("repeats", [0, 3, 50])
async def test_logs_cut_anywhere_lose_and_repeat_nothing(
    host: ScriptedHost, cluster: Cluster, repeats: int
) -> None:
    served = LogHost(host, [3, 0, 12, 9], repeats=repeats)
    got, end = await read_all(cluster)
    assert got == OUTPUT
    assert end == LogEnd(50, 10)
    assert served.questions[1].stdout_from == 21


async def test_logs_go_on_after_the_host_was_away(host: ScriptedHost, cluster: Cluster) -> None:
    served = LogHost(host, [2])
    got = b""
    async for item in cluster.logs(LOGS, sources=["stdout"]):
        if isinstance(item, LogChunk):
            got += item.data
        if len(got) == 14:
            await host.stop()
            await host.start()
    assert got == OUTPUT[Source.STDOUT]
    assert served.questions[0].sources == (Source.STDOUT,)


async def test_followed_logs_wait_for_a_node_that_went_away(
    host: ScriptedHost, cluster: Cluster
) -> None:
    served = LogHost(host, [])
    end = served.serve

    async def node_lost(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(msgspec.msgpack.encode(LogChunk(Source.STDOUT, 0, b"0123")))
        lost = LogEnd(4, 0, 0, ("unavailable", "node gpu-01 went away"))
        await socket.send_bytes(msgspec.msgpack.encode(lost))
        await socket.close()
        host.data["T"] = end

    host.data["T"] = node_lost
    got, last = await read_all(cluster, follow=True)
    assert (got, last.error) == (OUTPUT, ())

    host.data["T"] = node_lost
    got, last = await read_all(cluster, follow=False)
    assert got[Source.STDOUT] == b"0123"
    assert last.error == ("unavailable", "node gpu-01 went away")


async def test_logs_that_cannot_be_had_are_told_at_once(
    host: ScriptedHost, cluster: Cluster
) -> None:
    async def offline(_: object) -> msgspec.Struct:
        raise Unavailable("node gpu-01 is offline")

    host.answers["task.logs"] = offline
    with pytest.raises(Unavailable, match="gpu-01"):
        await anext(cluster.logs(LOGS, follow=True))
    assert host.count("task.logs") == 1


# -- The module -----------------------------------------------------------------------


def test_importing_the_client_loads_neither_daemons_nor_the_terminal() -> None:
    script = "import sys, protocol.client, protocol.blocking; print(*sys.modules)"
    root = Path(client.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    heavy = {"kohaku_daemon", "kohaku_tui", "textual", "rich", "typer", "tinydb"}
    loaded = done.stdout.split()
    assert "protocol.blocking" in loaded
    assert heavy.isdisjoint(loaded)
    assert "aiohttp.web" not in loaded


def test_a_quiet_time_is_no_failure() -> None:
    """What held for longer than any pause begins with all its patience again."""

    async def scenario() -> None:
        patience = client._Patience(0.05)
        lost = Unavailable("x")
        await patience.pause(lost)
        await asyncio.sleep(0.06)
        with pytest.raises(Unavailable):
            await patience.pause(lost)
        patience._paused_at -= backoff.LONGEST_S + 1
        await patience.pause(lost)

    asyncio.run(scenario())
