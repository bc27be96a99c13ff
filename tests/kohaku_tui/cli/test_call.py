"""``kohaku call``: from words to a method's parameters."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from kohaku_tui.cli.call import read_params
from protocol.errors import BadRequest
from protocol.ids import BatchId
from protocol.messages.cluster import Update
from protocol.messages.task import SubmitTask, Submitted
from protocol.methods import NODE_SHOW, STATUS, TASK_SHOW, TASK_SUBMIT, Method
from protocol.models.target import Target
from protocol.models.task import TaskSpec
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import ScriptedHost, a_task


def test_dotted_keys_and_json_values_make_parameters(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(2**60), ((2**60, 1),)))
    ran = kohaku(
        "call", "task.submit", "request_id=abcdefgh", 'spec.command=["echo", "hi"]',
        "spec.cores=2", "spec.env.KEY=text", 'targets=[{"node": "a"}]',
    )  # fmt: skip
    assert json.loads(ran.out)["tasks"] == [str(2**60)]
    assert host.asked(TASK_SUBMIT) == [
        SubmitTask(
            request_id="abcdefgh",
            spec=TaskSpec(command=("echo", "hi"), cores=2, env={"KEY": "text"}),
            targets=(Target("a"),),
        )
    ]


def test_ids_may_be_given_as_they_are_printed(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.tasks[2**60] = a_task(2**60)
    for written in (f"{2**60}", f'"{2**60}"'):
        document = json.loads(kohaku("call", "task.show", f"task={written}").out)
        assert document["task"]["id"] == str(2**60)


def test_text_that_reads_as_json_can_be_quoted() -> None:
    with pytest.raises(BadRequest) as caught:
        read_params(NODE_SHOW, ["node=1"])
    assert "quotes" in caught.value.hint
    assert read_params(NODE_SHOW, ['node="1"']) == NODE_SHOW.params(node="1")


@pytest.mark.parametrize(
    ("method", "words", "hint"),
    [
        (TASK_SHOW, [], "add task=VALUE"),
        (TASK_SUBMIT, ["request_id=abcdefgh", "spec.cores=2"], "add spec.command=VALUE"),
        (TASK_SUBMIT, ["request_id=abcdefgh", 'spec.command=["x"]', "targets=[{}]"], ""),
        (TASK_SHOW, ["task=seven"], ""),
        (STATUS, ["x=1"], "it takes none"),
    ],
)
def test_a_hint_fits_what_is_wrong(method: Method[Any, Any], words: list[str], hint: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_params(method, words)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["task.shw"], "did you mean task.show?"),
        (["task.get"], "there are: "),
        (["runner.join"], "for runners only"),
        (["task.show", "tsk=1"], "task"),
        (["task.list", "limit=-3"], "task.list: limit must be from 1 to 500"),
        (["task.list", "limit=many"], "task.list: limit: expected `int`"),
        (["task.list", "nodee=a"], "did you mean node?"),
        (["task.submit", "request_id=abcdefgh", 'spec={"command": ["x"], "core": 2}'], "cores?"),
        (["task.show", "task"], "KEY=VALUE"),
        (["task.show", "task=1", "task=2"], "has a value already"),
        (["task.show", "task=1", "task.x=2"], "has a value already"),
    ],
)
def test_what_does_not_fit_is_named(
    host: ScriptedHost, kohaku: Kohaku, words: list[str], told: str
) -> None:
    ran = kohaku("call", *words)
    assert (ran.status, ran.out) == (2, "")
    assert told in ran.err
    assert host.calls == []


def test_a_watch_gives_a_document_a_line(
    host: ScriptedHost, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    host.updates = [Update(start=True, tasks=(a_task(7),)), Update(ready=True)]
    running = process("call", "watch", 'topics=["tasks"]')
    assert running.stdout is not None
    first, second = (json.loads(running.stdout.readline()) for _ in range(2))
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 130
    assert first["tasks"][0]["id"] == "7"
    assert second["ready"] is True
