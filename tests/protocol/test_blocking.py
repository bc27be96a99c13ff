"""The blocking client: the same answers without asyncio, from threads, and interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.wire import ItemSink
from protocol import blocking
from protocol.blocking import BlockingCluster, connect
from protocol.client import Cluster
from protocol.errors import NotFound, Unauthenticated, Unavailable
from protocol.ids import BatchId
from protocol.messages.cluster import Status, Topic, Update, WatchEnded
from protocol.messages.task import Submitted
from tests.protocol.loopback import TOKEN, ScriptedHost, scripted_host


@pytest.fixture
async def host() -> AsyncIterator[ScriptedHost]:
    async with scripted_host() as host:
        host.answers |= {"cluster.status": status, "watch": count_up, "task.submit": submitted}
        yield host


async def status(_: object) -> msgspec.Struct:
    return Status(cluster="77", version="1", started_at=0.0, nodes={})


async def submitted(_: object) -> msgspec.Struct:
    return Submitted(BatchId(9), ((100, 3),))


async def count_up(_: object, sink: ItemSink) -> msgspec.Struct:
    for number in range(5):
        await sink.send(Update(revision=str(number)))
    await asyncio.Event().wait()
    return WatchEnded()


async def test_calls_streams_and_errors_come_through(host: ScriptedHost) -> None:
    def script() -> None:
        with connect(host.url, TOKEN) as cluster:
            assert cluster.welcome.cluster == "77"
            assert cluster.status().cluster == "77"
            assert list(cluster.submit(["true"], array=3).ids()) == [100, 101, 102]
            assert cluster.call_raw("cluster.status", {})["cluster"] == "77"
            seen = []
            for update in cluster.watch([Topic.TASKS]):
                seen.append(update.revision)
                if len(seen) == 5:
                    break
            assert seen == list("01234")
            with pytest.raises(NotFound):
                cluster.task(7)
            with pytest.raises(NotFound):
                list(cluster.logs(7))
            assert cluster.status().cluster == "77"

    await asyncio.to_thread(script)
    await host.until(lambda: host.cancelled == ["watch"])
    await host.until(lambda: not host.open)
    assert not any(thread.name == "kohaku-client" for thread in threading.enumerate())


async def test_a_stream_may_be_left_open_when_the_cluster_is_closed(host: ScriptedHost) -> None:
    def script() -> None:
        with connect(host.url, TOKEN) as cluster:
            updates = cluster.watch([Topic.TASKS])
            assert next(updates).revision == "0"
        with pytest.raises(Unavailable, match="closed"):
            list(updates)

    await asyncio.to_thread(script)


async def test_many_threads_may_share_it(host: ScriptedHost) -> None:
    def script() -> None:
        with connect(host.url, TOKEN) as cluster:
            threads = [threading.Thread(target=cluster.status) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    await asyncio.to_thread(script)
    assert host.count("cluster.status") == 16


async def test_a_refused_connection_leaves_nothing_behind(host: ScriptedHost) -> None:
    def script() -> None:
        with pytest.raises(Unauthenticated), connect(host.url, "kht_wrong"):
            pass
        with pytest.raises(Unavailable), connect("127.0.0.1:1", "t"):
            pass

    await asyncio.to_thread(script)
    assert not any(thread.name == "kohaku-client" for thread in threading.enumerate())


def test_outside_its_block_it_says_so() -> None:
    with pytest.raises(Unavailable, match="inside 'with'"):
        connect("lab", "t").status()


async def test_it_works_where_a_loop_already_runs(host: ScriptedHost) -> None:
    """As in a notebook: the calling thread has a running loop of its own."""

    async def cell() -> str:
        with connect(host.url, TOKEN) as cluster:
            return cluster.status().cluster

    assert await asyncio.to_thread(asyncio.run, cell()) == "77"


SCRIPT = """
import sys
from protocol.blocking import connect
with connect(sys.argv[1], sys.argv[2]) as cluster:
    print("ready", flush=True)
    try:
        getattr(cluster, sys.argv[3])({arguments})
    except KeyboardInterrupt:
        print("interrupted", cluster.status().cluster, flush=True)
        raise SystemExit(7)
"""


@pytest.mark.parametrize(
    ("method", "arguments", "on_host"),
    [("wait", "5", "task.wait"), ("explain", "5", "task.explain")],
)
async def test_an_interrupt_ends_the_waiting_and_nothing_else(
    host: ScriptedHost, method: str, arguments: str, on_host: str
) -> None:
    async def never(_: object) -> msgspec.Struct:
        await asyncio.Event().wait()
        raise AssertionError

    host.answers[on_host] = never
    root = Path(blocking.__file__).parents[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "dev", "-c", SCRIPT.format(arguments=arguments),
        host.url, TOKEN, method,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    await host.until(lambda: host.count(on_host) == 1)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    assert out.decode().split() == ["ready", "interrupted", "77"]
    assert err.decode() == ""
    assert process.returncode == 7
    assert host.cancelled == [on_host]


def test_it_has_every_method_of_the_async_client() -> None:
    methods = {name for name in vars(Cluster) if not name.startswith("_")}
    assert methods <= set(vars(BlockingCluster))
