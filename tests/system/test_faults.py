"""kill -9 at random while tasks run, and one submission made by many at once.

The full form is ``scripts/bench faults``; here runs a short one. What finds the violations is
tested on its own, so that it cannot fall silent.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as altered

from protocol.client import connect
from protocol.errors import Unavailable
from protocol.ids import BatchId, TaskId, UserName
from protocol.messages.task import Submitted
from protocol.models.task import Cause, Change, Exit, Task, TaskSpec, TaskState
from tests.system.homes import Home

pytestmark = pytest.mark.slow

BENCHES = Path(__file__).parents[2] / "scripts" / "benches"
#: How many say the same thing.
AT_ONCE = 50


@pytest.mark.timeout(300)
def test_daemons_killed_at_random_lose_repeat_and_restart_nothing() -> None:
    done = subprocess.run(
        [sys.executable, BENCHES / "faults.py", "--kills", "12", "--tasks", "60", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert sum(counts["kills"].values()) == 12
    assert counts["tasks"] == counts["launches"] == counts["ends"] == 60
    assert counts["violations"] == []


@pytest.mark.parametrize("answered_first", [False, True])
async def test_one_request_of_fifty_over_a_killed_host_is_one_task(
    own_home: Home, tmp_path: Path, answered_first: bool
) -> None:
    url = own_home.json("context", "show")["url"]
    token = next(own_home.folder.rglob("admin.token")).read_text().strip()
    together = asyncio.Barrier(AT_ONCE + 1)
    answers: list[Submitted] = []
    some_answer = asyncio.Event()

    async def ask() -> None:
        await together.wait()
        while True:
            try:
                async with connect(url, token, patience_s=60) as cluster:
                    answers.append(
                        await cluster.submit(["sh", "-c", "echo once"], request_id="the-same")
                    )
                    some_answer.set()
                    return
            except Unavailable:  # nobody was there to dial
                await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as jobs:
        for _ in range(AT_ONCE):
            jobs.create_task(ask())
        await together.wait()
        if answered_first:
            await some_answer.wait()
        await asyncio.to_thread(own_home.kill, "host")
        await asyncio.to_thread(own_home.up)
    assert len(answers) == AT_ONCE
    (batch,) = {answer.batch for answer in answers}
    (task,) = {task for answer in answers for task in answer.ids()}
    own_home.kohaku("task", "wait", str(task))
    assert own_home.kohaku("task", "logs", str(task)) == "once"
    listed = own_home.json("task", "list", "--all")["tasks"]
    assert [(row["id"], row["batch"], row["attempt"]) for row in listed] == [
        (str(task), str(batch), 1)
    ]


def test_each_kind_of_broken_promise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHES)
    from fault_work import CODE, LOST, OUTPUT, RESTARTED, TWICE, Seen, judge, make_work

    work = make_work(8, random.Random(3), tmp_path)[7]
    began, ended = "start 1 node1 2 900", "end 7"
    task = Task(
        id=TaskId(1),
        batch=BatchId(1),
        owner=UserName("admin"),
        state=TaskState.FAILED,
        spec=TaskSpec(command=("sh",)),
        attempt=1,
        exit=Exit(Cause.EXITED, code=7),
        history=tuple(Change(1.0, state) for state in (TaskState.RUNNING, TaskState.FAILED)),
    )
    right = Seen(task, [began, ended], work.stdout(), work.stderr())
    assert judge(work, right) == []
    again = Change(2.0, TaskState.FAILED)
    for kind, wrong in (
        (LOST, replace(right, task=None)),
        (LOST, replace(right, trace=[])),
        (LOST, replace(right, task=altered(task, state=TaskState.LOST))),
        (TWICE, replace(right, trace=[began, ended, "start 1 node2 2 950"])),
        (TWICE, replace(right, task=altered(task, history=(*task.history, again)))),
        (RESTARTED, replace(right, trace=[began])),
        (RESTARTED, replace(right, task=altered(task, attempt=2))),
        (CODE, replace(right, trace=[began, "end 8"])),
        (CODE, replace(right, task=altered(task, exit=Exit(Cause.EXITED, code=8)))),
        (CODE, replace(right, task=altered(task, exit=Exit(Cause.NODE_FAILED)))),
        (OUTPUT, replace(right, stdout=work.stdout() + b"7 out 1\n")),
        (OUTPUT, replace(right, stderr=work.stderr() + b"[kohaku: dropped here]\n")),
    ):
        assert kind in {violation.kind for violation in judge(work, wrong)}, wrong
