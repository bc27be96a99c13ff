"""Output on its way to the host: whole, to the end, and nobody waits for another reader."""

from __future__ import annotations

import asyncio
import time

import pytest

from kohaku_daemon.runner.logs import TaskLogs
from protocol.ids import TaskId
from protocol.messages.runner import AttemptState, OrderKill, OrderStream
from protocol.messages.stream import LogChunk, LogEnd, OpenLogs, Source
from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until


def a_stream(name: str, task: int = 1, attempt: int = 1, *, follow: bool = False) -> OrderStream:
    logs = OpenLogs(task=TaskId(task), attempt=attempt, follow=follow)
    return OrderStream(stream=name, attempt=attempt, logs=logs)


def stdout(host: FakeHost, name: str) -> bytes:
    chunks = [item for item in host.streams.get(name, []) if isinstance(item, LogChunk)]
    return b"".join(chunk.data for chunk in chunks if chunk.source is Source.STDOUT)


async def test_output_is_served_whole_with_the_runners_own_credential(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, stderr="oh\n"))
    await machine.settled("1-1")
    text = "line\n" * 100_000
    machine.write("1-1", text)
    host.order(a_stream("s"))
    await until(lambda: "s" in host.ended_streams)
    assert stdout(host, "s") == text.encode()
    assert host.streams["s"][-1] == LogEnd(len(text), 3)
    assert host.stream_tokens == list(host.nodes)


async def test_following_may_begin_with_the_order_and_ends_with_the_task(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, run_s="forever", stdout="begun"), a_stream("s", follow=True))
    await until(lambda: stdout(host, "s") == b"begun")
    assert "s" not in host.ended_streams
    machine.write("1-1", " done")
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await until(lambda: "s" in host.ended_streams)
    assert stdout(host, "s") == b"begun done"
    assert host.streams["s"][-1] == LogEnd(10, 0)


async def test_output_that_is_not_here_is_told_so(host: FakeHost, machine: Machine) -> None:
    await machine.start()
    host.order(a_stream("s", task=9))
    await until(lambda: "s" in host.ended_streams)
    (end,) = host.streams["s"]
    assert isinstance(end, LogEnd)
    assert end.error
    assert end.error[0] == "not_found"
    assert "task 9" in end.error[1]


async def test_a_task_that_could_not_start_has_empty_output_and_no_error(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, backend="docker"))
    await machine.settled("1-1")
    host.order(a_stream("s", follow=True))
    await until(lambda: "s" in host.ended_streams)
    assert host.streams["s"] == [LogEnd(0, 0)]


async def test_streams_end_with_the_link_that_ordered_them(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, run_s="forever"), a_stream("s", follow=True))
    await until(lambda: "s" in host.streams)
    host.cut()
    await until(lambda: "s" in host.ended_streams)
    await until(lambda: len(host.registers) == 2)


async def test_a_reader_that_leaves_ends_its_stream_and_no_other(
    host: FakeHost, machine: Machine
) -> None:
    await machine.start()
    host.order(a_start(1, run_s="forever"), a_stream("a", follow=True), a_stream("b", follow=True))
    await until(lambda: {"a", "b"} <= host.streams.keys())
    await host.close_stream("a")
    await until(lambda: not _jobs("stream a"))
    assert _jobs("stream b")
    host.order(OrderKill(task=TaskId(1), attempt=1))
    await until(lambda: "b" in host.ended_streams)
    assert host.streams["b"] == [LogEnd(0, 0)]


async def test_more_streams_than_allowed_are_refused_with_a_reason(
    host: FakeHost, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.streams._STREAMS_AT_ONCE", 1)
    await machine.start()
    host.order(a_start(1, run_s="forever"), a_stream("a", follow=True))
    await until(lambda: "a" in host.streams)
    host.order(a_stream("b"))
    await until(lambda: "b" in host.ended_streams)
    (end,) = host.streams["b"]
    assert isinstance(end, LogEnd)
    assert end.error[0:1] == ("unavailable",)


async def test_a_stalled_reader_holds_up_nothing_else(host: FakeHost, machine: Machine) -> None:
    await machine.start()
    host.stalled_streams.add("slow")
    host.order(a_start(1))
    await machine.settled("1-1")
    text = "x" * 8 * 2**20
    machine.write("1-1", text)
    host.order(a_stream("slow"), a_stream("quick"))
    await until(lambda: "quick" in host.ended_streams)
    assert stdout(host, "quick") == text.encode()
    host.order(a_start(2))
    await until(lambda: host.state(2) is AttemptState.ENDED)
    assert "slow" not in host.ended_streams
    assert _jobs("stream slow")


def _jobs(name: str) -> list[str]:
    return [job.get_name() for job in asyncio.all_tasks() if job.get_name() == name]


async def test_who_reads_what_was_removed_is_told_so(host: FakeHost, machine: Machine) -> None:
    await machine.start()
    for task in (1, 2):
        host.order(a_start(task))
        await machine.settled(f"{task}-1")
    machine.write("1-1", "line\n" * 100_000)
    await machine.stop()
    logs = TaskLogs(machine.config.data / "logs", cap=2**20, keep_s=3600.0, most=0)
    assert "1-1" in logs.sweep(time.time() + 100, live=())
    await machine.start()
    host.order(a_stream("removed", 1), a_stream("empty", 2))
    await until(lambda: {"removed", "empty"} <= host.ended_streams)
    (end,) = host.streams["removed"]
    assert isinstance(end, LogEnd)
    assert end.error[0] == "not_found"
    assert "the output of task 1, attempt 1, was removed" in end.error[1]
    # The other one wrote nothing.
    assert host.streams["empty"] == [LogEnd(0, 0)]
