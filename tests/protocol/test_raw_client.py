"""The example that needs only aiohttp and msgpack, against our own host side."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec
import pytest
from aiohttp import web

from protocol.ids import BatchId, TaskId, UserName
from protocol.messages.stream import LogChunk, LogEnd, Source, Ticket
from protocol.messages.task import SubmitTask, Submitted, TaskResult, WaitResult
from protocol.models.task import Cause, Exit, Task, TaskSpec, TaskState
from tests.protocol.loopback import TOKEN, ScriptedHost, scripted_host

SCRIPT: Final = Path(__file__).parents[2] / "scripts" / "examples" / "raw_client.py"
TASK: Final = TaskId(102345678901248000)


@pytest.fixture
async def host() -> AsyncIterator[ScriptedHost]:
    async with scripted_host() as host:
        host.keep_alive_s = 0.1  # so that it has to answer pings while it waits
        host.answers |= {
            "task.submit": submit, "task.wait": wait, "task.logs": logs, "task.show": show,
        }  # fmt: skip
        host.data["T"] = output
        yield host


async def submit(params: SubmitTask) -> msgspec.Struct:
    return Submitted(BatchId(1), ((TASK, 1),))


async def wait(_: object) -> msgspec.Struct:
    await asyncio.sleep(0.4)  # longer than a host keeps who does not answer its pings
    return WaitResult(done=True)


async def logs(_: object) -> msgspec.Struct:
    return Ticket("T", "/data", 0.0)


async def show(_: object) -> msgspec.Struct:
    ended = Exit(Cause.EXITED, 3)
    spec = TaskSpec(command=("x",))
    return TaskResult(
        Task(id=TASK, batch=BatchId(1), owner=UserName("a"), state=TaskState.FAILED, spec=spec,
             exit=ended)
    )  # fmt: skip


async def output(socket: web.WebSocketResponse) -> None:
    for item in (
        LogChunk(Source.STDOUT, 0, b"out\n"), LogChunk(Source.STDERR, 0, b"err\n"), LogEnd(4, 4),
    ):  # fmt: skip
        await socket.send_bytes(msgspec.msgpack.encode(item))
    await socket.close()


async def run(environment: dict[str, str]) -> tuple[int | None, str, str]:
    inherited = {key: text for key, text in os.environ.items() if not key.startswith("KOHAKU_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", str(SCRIPT), "echo", "out",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=inherited | environment,
    )  # fmt: skip
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_it_runs_a_command_and_ends_with_its_code(host: ScriptedHost) -> None:
    code, out, err = await run({"KOHAKU_HOST": host.url, "KOHAKU_TOKEN": TOKEN})
    assert (code, out) == (3, "out\n")
    assert "err\n" in err
    assert f"task {TASK} failed" in err
    submitted = host.asked[0][1]
    assert isinstance(submitted, SubmitTask)
    assert submitted.spec == TaskSpec(command=("echo", "out"))


async def test_it_finds_the_saved_context(host: ScriptedHost, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    context = {"name": "lab", "url": host.url, "token": TOKEN}
    saved = {"current": "lab", "contexts": [context]}
    (tmp_path / "config" / "contexts.json").write_text(json.dumps(saved))
    code, _, _ = await run({"KOHAKU_HOME": str(tmp_path)})
    assert code == 3


async def test_a_refusal_is_shown(host: ScriptedHost) -> None:
    code, out, err = await run({"KOHAKU_HOST": host.url, "KOHAKU_TOKEN": "kht_wrong"})
    assert (code, out) == (1, "")
    assert "error: unauthenticated: this token is not known here" in err


def test_it_imports_nothing_of_ours() -> None:
    text = SCRIPT.read_text()
    assert "import protocol" not in text
    assert "from protocol" not in text
    assert "kohaku_daemon" not in text
