"""Commands that stay: wait, watch, logs, follow. And leaving them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Callable

import pytest

from kohaku_tui.cli.follow import say_standing
from protocol.ids import BatchId, NodeName, TaskId
from protocol.messages.cluster import Event, EventPage, Status, Update
from protocol.messages.node import NodeList, NodeResult
from protocol.messages.stream import LogChunk, LogEnd, Source
from protocol.messages.task import Submitted, TaskPage, WaitResult
from protocol.methods import (
    EVENT_LIST,
    NODE_LIST,
    NODE_SHOW,
    STATUS,
    TASK_KILL,
    TASK_LIST,
    TASK_LOGS,
    TASK_SHOW,
    TASK_SUBMIT,
    TASK_WAIT,
    WATCH,
)
from protocol.models.node import Node, NodeState
from protocol.models.target import Target
from protocol.models.task import Cause, Exit, Task, TaskState
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import ScriptedHost, a_task

Start = Callable[..., subprocess.Popen[bytes]]

DONE = a_task(7, state=TaskState.COMPLETED, exit=Exit(Cause.EXITED, 0))


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ({"state": TaskState.COMPLETED, "exit": Exit(Cause.EXITED, 0)}, 0, ""),
        ({"state": TaskState.FAILED, "exit": Exit(Cause.EXITED, 3)}, 3, ""),
        (
            {"state": TaskState.FAILED, "exit": Exit(Cause.SIGNALLED, signal=11)},
            139,
            "task 7 failed: ended by SIGSEGV\n",
        ),
        (
            {"state": TaskState.OOM_KILLED, "exit": Exit(Cause.OOM, signal=9)},
            137,
            "task 7 oom_killed: out of memory\n",
        ),
        (
            {"state": TaskState.KILLED, "exit": Exit(Cause.KILLED, code=0)},
            1,
            "task 7 killed, exit code 0\n",
        ),
        (
            {"state": TaskState.KILLED, "reason": "killed by ada before it started"},
            1,
            "task 7 killed: killed by ada before it started\n",
        ),
        (
            {"state": TaskState.LOST, "node": NodeName("node1")},
            1,
            "task 7 is lost: its node node1 does not answer\n",
        ),
    ],
)
def test_wait_exits_as_the_task_did(
    host: ScriptedHost, kohaku: Kohaku, end: dict[str, object], status: int, told: str
) -> None:
    host.tasks[7] = a_task(7, **end)
    ran = kohaku("task", "wait", "7")
    assert (ran.status, ran.out, ran.err) == (status, "", told)


def test_wait_for_several_gives_the_first_failure_in_the_order_given(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    for number in (1, 2, 3):
        state = TaskState.COMPLETED if number == 1 else TaskState.FAILED
        code = 0 if number == 1 else number
        host.tasks[number] = a_task(number, state=state, exit=Exit(Cause.EXITED, code))
    assert kohaku("task", "wait", "1", "3", "2").status == 3
    ran = kohaku("task", "wait", "1", "2", "--json")
    assert ran.status == 2
    assert [task["id"] for task in json.loads(ran.out)["tasks"]] == ["1", "2"]


def test_batch_wait_names_the_batch(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_LIST, TaskPage((DONE,)))
    assert kohaku("batch", "wait", "9").status == 0
    assert host.asked(TASK_WAIT)[0].batch == 9


def test_a_wait_that_takes_too_long_says_so(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_WAIT, WaitResult(done=False, left=1))
    ran = kohaku("task", "wait", "7", "--timeout", "0.2s", "--json")
    assert ran.status == 1
    assert json.loads(ran.err)["error"]["code"] == "timeout"


def test_a_task_that_does_not_exist_is_told(host: ScriptedHost, kohaku: Kohaku) -> None:
    for words in (["wait"], ["watch"], ["logs", "-f"]):
        ran = kohaku("task", *words, "7")
        assert (ran.status, ran.err) == (1, "error: there is no task 7\n")


def test_logs_keep_the_two_outputs_apart(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.logs = [
        LogChunk(Source.STDOUT, 0, b"out"),
        LogChunk(Source.STDERR, 0, b"err"),
        LogEnd(3, 3),
    ]
    ran = kohaku("task", "logs", "7", "--tail", "5", "--attempt", "2")
    assert (ran.status, ran.out, ran.err) == (0, "out", "err")
    (asked,) = host.asked(TASK_LOGS)
    assert (asked.tail_lines, asked.attempt, asked.follow) == (5, 2, False)


def test_logs_of_one_output_go_to_stdout(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.logs = [LogChunk(Source.STDERR, 0, b"err"), LogEnd(0, 3)]
    ran = kohaku("task", "logs", "7", "--stderr")
    assert (ran.out, ran.err) == ("err", "")
    assert host.asked(TASK_LOGS)[0].sources == (Source.STDERR,)


def test_a_file_gets_every_byte(host: ScriptedHost, process: Start, tmp_path: object) -> None:
    data = bytes(range(256)) * 256
    host.logs = [LogChunk(Source.STDOUT, 0, data), LogEnd(len(data), 0)]
    path = f"{tmp_path}/out"
    with open(path, "wb") as file:
        assert process("task", "logs", "7", stdout=file).wait(20) == 0
    with open(path, "rb") as file:
        assert file.read() == data


def test_what_is_missing_of_an_output_is_told(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.logs = [LogEnd(0, 0, dropped=2**20)]
    ran = kohaku("task", "logs", "7")
    assert (ran.status, ran.err) == (0, "1 MiB of output were dropped: the task's log is full\n")
    host.logs = [LogEnd(0, 0, error=("not_found", "the log was cleared away"))]
    ran = kohaku("task", "logs", "7")
    assert ran.status == 1
    assert "the output ends early: the log was cleared away (not_found)" in ran.err


def test_following_waits_for_the_task_to_start(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.tasks[7] = a_task(7, state=TaskState.QUEUED, started_at=0.0)
    host.updates = [
        Update(start=True, ready=True, tasks=(host.tasks[7],)),
        Update(tasks=(a_task(7),)),
    ]
    host.logs = [LogChunk(Source.STDOUT, 0, b"late"), LogEnd(4, 0)]
    ran = kohaku("task", "logs", "-f", "7")
    assert (ran.status, ran.out, ran.err) == (0, "late", "")
    names = [name for name, _ in host.calls]
    assert names.index("task.show") < names.index("watch") < names.index("task.logs")


def test_a_terminal_is_told_what_a_followed_task_waits_for(
    host: ScriptedHost, process: Start
) -> None:
    host.tasks[7] = a_task(7, state=TaskState.QUEUED, started_at=0.0)
    host.updates = [
        Update(start=True, ready=True, tasks=(host.tasks[7],)),
        Update(tasks=(DONE,)),
    ]
    host.logs = [LogEnd(0, 0)]
    shown = read_terminal(process, "task", "logs", "-f", "7")
    assert "waiting for task 7: queued; why: kohaku task explain 7" in shown
    assert shown.endswith("\x1b[2K")


@pytest.mark.parametrize("words", [["logs", "-f", "7"], ["submit", "-f", "--", "x"]])
@pytest.mark.parametrize(
    "task",
    [
        a_task(7, node=NodeName("node1")),
        a_task(7, state=TaskState.QUEUED, started_at=0.0, target=Target(NodeName("node1"))),
    ],
    ids=["runs there", "wants to"],
)
def test_who_follows_is_told_once_that_the_node_is_away(
    host: ScriptedHost, process: Start, words: list[str], task: Task
) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(7), ((7, 1),)))
    host.tasks[7] = task
    states = iter([NodeState.ONLINE, NodeState.OFFLINE])
    asked_enough = threading.Event()

    def show_node(asked: object) -> NodeResult:
        if len(host.asked(NODE_SHOW)) == 4:
            asked_enough.set()
        state = next(states, NodeState.OFFLINE)
        return NodeResult(Node(name=NodeName("node1"), state=state))

    host.answer(NODE_SHOW, show_node)
    host.updates = [
        Update(start=True, ready=True),
        *(
            Update(events=(Event(id=number, at=1.0, kind="node.x", text="", node=node),))
            for number, node in enumerate(["node2", "node1", "node1", "node1"])
        ),
    ]
    running = process("task", *words)
    assert asked_enough.wait(20)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    lines = err.decode().splitlines()
    assert lines.count("waiting for node1, which is offline") == 1
    assert [asked.node for asked in host.asked(NODE_SHOW)] == ["node1"] * 4


def test_following_a_task_that_never_starts_ends(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.tasks[7] = a_task(7, state=TaskState.KILLED, started_at=0.0)
    ran = kohaku("task", "logs", "-f", "7")
    assert (ran.status, ran.out, ran.err) == (0, "", "task 7 never started\n")


def test_watch_writes_a_line_for_each_state(host: ScriptedHost, kohaku: Kohaku) -> None:
    queued = a_task(7, state=TaskState.QUEUED, started_at=0.0, reason="waits for cores")
    running = a_task(7, node=NodeName("node1"))
    host.tasks[7] = queued
    host.tasks[8] = a_task(8, state=TaskState.COMPLETED, exit=Exit(Cause.EXITED, 0))
    host.updates = [
        Update(start=True, tasks=(queued,)),
        Update(ready=True),
        Update(tasks=(running,)),
        Update(tasks=(running,)),
        Update(tasks=(a_task(7, node=NodeName("node1"), state=TaskState.LOST),)),
    ]
    host.answer(TASK_SHOW, lambda asked: host.show(host.tasks[asked.task]))
    ran = kohaku("task", "watch", "7", "8")
    assert ran.status == 0
    assert [line.split("  ", 1)[1] for line in ran.out.splitlines()] == [
        "7  queued  (waits for cores)",
        "8  completed  (exit code 0)",
        "7  running  on node1",
        "7  lost  on node1",
    ]
    assert host.asked(WATCH)[0].tasks == (7,)
    lines = kohaku("task", "watch", "8", "--json").out.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["completed"]


def test_watch_does_not_miss_an_end_before_the_snapshot(host: ScriptedHost, kohaku: Kohaku) -> None:
    shown = iter([a_task(7)])
    host.answer(TASK_SHOW, lambda asked: host.show(next(shown, DONE)))
    host.updates = [Update(start=True, ready=True)]
    ran = kohaku("task", "watch", "7")
    assert ran.out.splitlines()[-1].endswith("7  completed  (exit code 0)")


@pytest.mark.parametrize("words", [["kill", "7", "8"], ["pause", "7"], ["resume", "7"]])
def test_steering_names_the_tasks(host: ScriptedHost, kohaku: Kohaku, words: list[str]) -> None:
    host.answer_steering(asked=1)
    assert kohaku("task", *words) == kohaku("task", *words)
    assert host.calls[0][0] == f"task.{words[0]}"
    assert list(host.calls[0][1].tasks) == [int(word) for word in words[1:]]


def test_refusals_are_told_and_counted(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer_steering(asked=1, refused=((TaskId(2**60), "it is over"),))
    ran = kohaku("task", "kill", str(2**60), "7")
    assert (ran.status, ran.out, ran.err) == (1, "", f"task {2**60}: it is over\n")
    ran = kohaku("batch", "kill", "9", "--json")
    assert ran.status == 1
    assert json.loads(ran.out) == {"asked": 1, "refused": [[str(2**60), "it is over"]]}
    assert host.asked(TASK_KILL)[1].batch == 9


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["task", "kill", "7"], "task 7 ends"),
        (["task", "kill", "7", "8", "9"], "2 tasks end"),
        (["batch", "kill", "3"], "2 tasks end"),
    ],
)
def test_a_kill_that_has_to_wait_for_its_node_says_so(
    host: ScriptedHost, kohaku: Kohaku, words: list[str], told: str
) -> None:
    host.answer_steering(asked=2)
    away = Node(name=NodeName("node1"), state=NodeState.OFFLINE)
    status = Status(cluster="77", version="0", started_at=0.0, nodes={"offline": 1, "online": 1})
    host.answer(STATUS, status)
    host.answer(NODE_LIST, NodeList((Node(name=NodeName("a"), state=NodeState.ONLINE), away)))
    there = (a_task(7, kill_asked=True), a_task(8, kill_asked=True), a_task(9))
    host.answer(TASK_LIST, TaskPage(there))
    ran = kohaku(*words)
    assert (ran.status, ran.out) == (0, "")
    assert ran.err == f"node1 is offline: {told} when it is back\n"
    assert [asked.node for asked in host.asked(TASK_LIST)] == ["node1"]


def test_ctrl_c_leaves_the_task_alone(host: ScriptedHost, process: Start) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(7), ((7, 1),)))
    host.tasks[7] = a_task(7)
    host.logs = [LogChunk(Source.STDOUT, 0, b"first\n")]
    running = process("task", "submit", "-f", "--", "x")
    assert running.stdout is not None
    assert running.stdout.readline() == b"first\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=20)
    assert (running.returncode, out) == (130, b"")
    assert b"come back:  kohaku task logs -f 7\n" in err
    assert b"end it:     kohaku task kill 7\n" in err
    assert b"Traceback" not in err
    assert host.asked(TASK_KILL) == []


def test_ctrl_c_while_waiting_says_how_to_come_back(host: ScriptedHost, process: Start) -> None:
    host.answer(TASK_WAIT, host.hold)
    running = process("batch", "wait", "9")
    assert host.sent_all.wait(20)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert b"come back:  kohaku batch wait 9\n" in err


def test_a_reader_that_leaves_is_no_error(host: ScriptedHost, process: Start) -> None:
    host.answer(TASK_LIST, TaskPage(tuple(a_task(number) for number in range(1, 51))))
    reads, writes = os.pipe()
    os.close(reads)
    running = process("task", "list", stdout=writes)
    os.close(writes)
    _, err = running.communicate(timeout=20)
    assert (running.returncode, err) == (141, b"")


def test_a_reader_that_leaves_ends_following(host: ScriptedHost, process: Start) -> None:
    host.tasks[7] = a_task(7)
    host.logs = [
        LogChunk(Source.STDOUT, 0, b"x" * 60_000),
        LogChunk(Source.STDOUT, 60_000, b"y" * 60_000),
    ]
    running = process("task", "logs", "-f", "7")
    assert running.stdout is not None
    running.stdout.read(10)
    running.stdout.close()
    assert running.wait(20) == 141
    assert running.stderr is not None
    assert running.stderr.read() == b""
    running.stderr.close()


def test_a_terminal_gets_only_text_and_colours(host: ScriptedHost, process: Start) -> None:
    first, second = b"\x1b]0;evil\x07\x1b[2J\x1b[31mr\xc3", b"\xa9d\x1b[0m 10%\r20%\n\xc2\x9b6n"
    host.logs = [
        LogChunk(Source.STDOUT, 0, first),
        LogChunk(Source.STDOUT, len(first), second),
        LogEnd(len(first + second), 0),
    ]
    assert read_terminal(process, "task", "logs", "7") == "\x1b[31mréd\x1b[0m 10%\r\n20%\r\n"


def test_a_terminal_gets_tables_of_its_width(host: ScriptedHost, process: Start) -> None:
    tasks = tuple(a_task(2**60 + n, owner="someone-with-a-long-name") for n in range(3))
    host.answer(TASK_LIST, TaskPage(tasks))
    shown = read_terminal(process, "task", "list", columns=60)
    titles, *lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert "OWNER" not in titles
    assert [line.split()[0] for line in lines] == [str(task.id) for task in tasks]
    assert max(map(len, [titles, *lines])) <= 60


def test_a_wait_on_a_terminal_tells_that_it_waits(host: ScriptedHost, process: Start) -> None:
    host.tasks[7] = DONE
    shown = read_terminal(process, "task", "wait", "7")
    assert "waiting for 1 task" in shown
    assert shown.endswith("\x1b[2K")  # and takes its line away again


def test_a_watch_on_a_terminal_is_a_table(host: ScriptedHost, process: Start) -> None:
    host.tasks[7] = a_task(7)
    host.updates = [Update(start=True, ready=True, tasks=(DONE,))]
    shown = read_terminal(process, "task", "watch", "7")
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()[-1]
    assert last.split()[:2] == ["7", "completed"]


def test_a_watch_says_how_far_a_preparation_is_once(host: ScriptedHost, kohaku: Kohaku) -> None:
    steps = [
        a_task(7, state=TaskState.PREPARING, node="n1", reason=reason, started_at=0.0)
        for reason in ("", "preparing 43 %", "waits for Docker")
    ]
    host.tasks[7] = steps[0]
    host.updates = [
        Update(start=True, ready=True, tasks=(steps[1],)),
        Update(tasks=(steps[2],)),
        Update(tasks=(DONE,)),
    ]
    said = [line.split("  ", 1)[1] for line in kohaku("task", "watch", "7").out.splitlines()]
    assert said[:3] == [
        "7  preparing  on n1",
        "7  preparing 43 %  on n1",
        "7  preparing  on n1  (waits for Docker)",
    ]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([], "none"),
        ([a_task(7, state=TaskState.PREPARING, reason="preparing 43 %")], "preparing 43 %"),
        ([DONE], "completed"),
        ([DONE, a_task(8), a_task(9)], "1 completed, 2 running"),
    ],
)
def test_who_waits_is_told_how_far_it_is(tasks: list[Task], said: str) -> None:
    last = tasks[-1] if tasks else None
    assert say_standing([task.state for task in tasks], last) == said


def test_events_are_followed_without_repeats(host: ScriptedHost, process: Start) -> None:
    old = Event(id=1, at=1.0, kind="node.online", text="node1 is here")
    new = Event(id=2, at=2.0, kind="task.lost", text="task 7 is lost", task=TaskId(7))
    host.answer(EVENT_LIST, EventPage((old,)))
    host.updates = [Update(start=True, ready=True, events=(new, old))]
    running = process("events", "--follow", "--json")
    assert running.stdout is not None
    seen = [json.loads(running.stdout.readline())["id"] for _ in range(2)]
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=20)
    assert (seen, out, err, running.returncode) == (["1", "2"], b"", b"", 130)


def read_terminal(process: Start, *arguments: str, columns: int = 200) -> str:
    """Run a command on a terminal of its own and give all that it wrote there."""
    master, slave = pty.openpty()
    os.environ["COLUMNS"] = str(columns)
    try:
        running = process(*arguments, stdin=slave, stdout=slave, stderr=slave)
    finally:
        del os.environ["COLUMNS"]
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # EIO: the last process that had it open has ended
            break
        if not data:
            break
        shown += data
    os.close(master)
    assert running.wait(20) == 0, shown
    return shown.decode()
