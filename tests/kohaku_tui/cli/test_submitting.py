"""``task submit``: from words to a request, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kohaku_tui.cli.submission import Wish, make_request, read_rows, read_variables
from protocol.errors import BadRequest, NotFound
from protocol.ids import BatchId
from protocol.messages.stream import LogChunk, LogEnd, OpenLogs, Source, Ticket
from protocol.messages.task import Submitted, TaskPage, TaskResult
from protocol.methods import TASK_LIST, TASK_LOGS, TASK_SHOW, TASK_SUBMIT
from protocol.models.target import Target
from protocol.models.task import Cause, Change, Exit, Mount, Network, TaskSpec, TaskState
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import LOGS_PATH, ScriptedHost, a_task

BIG = 2**60


def test_it_prints_the_ids_alone(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(BIG), ((BIG, 2), (BIG + 9, 1))))
    ran = kohaku("task", "submit", "--array", "3", "--", "true")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"{BIG}\n{BIG + 1}\n{BIG + 9}\n"
    document = json.loads(kohaku("task", "submit", "--array", "3", "--json", "true").out)
    assert document["batch"] == str(BIG)
    assert document["tasks"] == [str(BIG), str(BIG + 1), str(BIG + 9)]


def test_every_option_reaches_the_request(
    host: ScriptedHost, kohaku: Kohaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_HERE", "value")
    host.answer(TASK_SUBMIT, Submitted(BatchId(1), ((1, 1),)))
    words = (
        "-t node1:0:1,2 -c 4 -m 1.5Gi --gpus 2 --backend process -e A=b=c -e FROM_HERE --name run "
        "--priority 5 --on gpu=a100 --workdir /data --grace 1m --request-id abcdefgh"
    )
    assert kohaku("task", "submit", *words.split(), "--", "sh", "-c", "x", "--json").status == 0
    (asked,) = host.asked(TASK_SUBMIT)
    assert asked.request_id == "abcdefgh"
    assert asked.targets == (Target("node1", 0, (1, 2)),)
    assert asked.spec == TaskSpec(
        command=("sh", "-c", "x", "--json"),
        name="run",
        env={"A": "b=c", "FROM_HERE": "value"},
        workdir="/data",
        cores=4,
        memory=3 * 2**29,
        gpus=2,
        labels={"gpu": "a100"},
        priority=5,
        backend="process",
        grace_s=60.0,
    )


def test_every_option_of_containers_reaches_the_request(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(1), ((1, 1),)))
    words = (
        "--container demo --backend docker --mount /srv/a:/a:ro --mount /srv/b:/b --user 1000:100 "
        "--network none --shm-size 1Gi --ulimit nofile=1024:unlimited --ulimit core=0 --privileged"
    )
    assert kohaku("task", "submit", *words.split(), "--", "true").status == 0
    assert kohaku("task", "submit", "--image", "reg.lab:5000/a:1", "--", "true").status == 0
    in_environment, of_registry = host.asked(TASK_SUBMIT)
    assert in_environment.spec == TaskSpec(
        command=("true",),
        backend="docker",
        container="demo",
        mounts=(Mount("/srv/a", "/a", read_only=True), Mount("/srv/b", "/b")),
        user="1000:100",
        network=Network.NONE,
        shm_size=2**30,
        ulimits={"nofile": (1024, -1), "core": (0, 0)},
        privileged=True,
    )
    assert of_registry.spec == TaskSpec(command=("true",), image="reg.lab:5000/a:1")


def test_what_follows_the_command_is_never_ours(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(1), ((1, 1),)))
    assert kohaku("task", "submit", "-c", "2", "git", "log", "-c", "--", "--help").status == 0
    assert kohaku("task", "submit", "--", "--version", "--", "-t").status == 0
    first, second = host.asked(TASK_SUBMIT)
    assert first.spec.command == ("git", "log", "-c", "--", "--help")
    assert second.spec.command == ("--version", "--", "-t")
    assert first.request_id != second.request_id


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"memory": "12Q"}, "-m: '12Q' is not a size"),
        ({"grace": "soon"}, "--grace: 'soon' is not a duration"),
        ({"targets": ["a::0,0"]}, "twice"),
        ({"targets": ["Node!"]}, "node's name"),
        ({"labels": ["gpu"]}, "not a label"),
        ({"env": ["=x"]}, "names no variable"),
        ({"env": ["MISSING"]}, "MISSING is not set here"),
        ({"targets": ["a", "b"], "array": 2}, "several -t and --array"),
        ({"targets": ["a"], "array": 2}, "-t and --array"),
        ({"array": 2, "rows": Path("x.csv")}, "--array and --rows"),
        ({"memory": "999999999999T"}, "-m 999999999999T is too large"),
        ({"time_limit": "1e9"}, "--time-limit: '1e9' is not a duration"),
        ({"time_limit": "0"}, "--time-limit 0 leaves no time"),
        ({"time_limit": "0.0h"}, "--time-limit 0.0h leaves no time"),
        ({"request_id": ""}, "--request-id ''"),
        ({"request_id": "x" * 65}, "--request-id"),
        ({"container": "a", "image": "b"}, "--container and --image exclude each other"),
        (
            {"backend": "process", "image": "b"},
            "--image is about containers, and --backend process",
        ),
        ({"backend": "process", "network": Network.NONE}, "--network none is about containers"),
        ({"backend": "process", "privileged": True}, "--privileged is about containers"),
        ({"mounts": ["/data"]}, "--mount '/data' is not SRC:DST"),
        ({"mounts": ["/data:"]}, "--mount '/data:' is not SRC:DST"),
        ({"mounts": [":/data"]}, "--mount ':/data' is not SRC:DST"),
        ({"mounts": ["/a:/b:rx"]}, "--mount '/a:/b:rx' is not SRC:DST"),
        ({"mounts": ["/a:/b:"]}, "--mount '/a:/b:' is not SRC:DST"),
        ({"shm_size": "big"}, "--shm-size: 'big' is not a size"),
        ({"ulimits": ["nofile"]}, "--ulimit 'nofile' is not NAME=SOFT"),
        ({"ulimits": ["=1"]}, "--ulimit '=1' is not NAME=SOFT"),
        ({"ulimits": ["nofile=1:"]}, "--ulimit 'nofile=1:' is not NAME=SOFT"),
        ({"ulimits": ["nofile=1:2:3"]}, "--ulimit 'nofile=1:2:3' is not NAME=SOFT"),
        ({"ulimits": ["nofile=" + "9" * 5000]}, "--ulimit 'nofile=9"),
    ],
)
def test_a_wish_that_makes_no_sense_is_named(wish: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        make_request(Wish(**{"command": ["x"], "request_id": "abcdefgh", **wish}), {})  # type: ignore[arg-type]


def test_a_bare_variable_is_taken_from_here() -> None:
    assert read_variables(["A", "B=", "C=x=y"], {"A": "1", "B": "2"}) == {
        "A": "1",
        "B": "",
        "C": "x=y",
    }


def test_rows_come_from_csv_and_json(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    csv.write_bytes(b'\xef\xbb\xbfRATE,NOTE\n0.1,"a,b"\n0.2,\n')
    assert read_rows(csv) == ({"RATE": "0.1", "NOTE": "a,b"}, {"RATE": "0.2", "NOTE": ""})
    table = tmp_path / "rows.json"
    table.write_text('[{"N": 1, "ON": true, "OFF": false, "NONE": null, "X": 0.5, "T": "t"}]')
    assert read_rows(table) == (
        {"N": "1", "ON": "true", "OFF": "false", "NONE": "", "X": "0.5", "T": "t"},
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("short.csv", "A,B\n1\n"),
        ("long.csv", "A,B\n1,2,3\n"),
        ("double.csv", "A,A\n1,2\n"),
        ("empty.csv", "A\n"),
        ("no.json", "{"),
        ("object.json", '{"a": 1}'),
        ("nested.json", '[{"a": [1]}]'),
        ("latin.csv", None),
        ("missing.csv", None),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, text: str | None) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    elif name == "latin.csv":
        path.write_bytes(b"A\n\xe9\n")
    with pytest.raises(BadRequest, match=name):
        read_rows(path)


def test_wait_exits_with_the_first_status_that_is_not_0(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(9), ((1, 3),)))
    ends = [
        a_task(3, index=2, state=TaskState.FAILED, exit=Exit(Cause.EXITED, 5)),
        a_task(2, index=1, state=TaskState.FAILED, exit=Exit(Cause.EXITED, 3)),
        a_task(1, index=0, state=TaskState.COMPLETED, exit=Exit(Cause.EXITED, 0)),
    ]
    host.answer(TASK_LIST, TaskPage(tuple(ends)))
    ran = kohaku("task", "submit", "--array", "3", "--wait", "--", "x")
    assert (ran.status, ran.out, ran.err) == (3, "1\n2\n3\n", "")


def test_follow_gives_output_and_status_of_the_task(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(1), ((1, 1),)))
    host.tasks[1] = a_task(1, state=TaskState.FAILED, exit=Exit(Cause.EXITED, 3))
    host.logs = [
        LogChunk(Source.STDOUT, 0, b"out\n"),
        LogChunk(Source.STDERR, 0, b"err\n"),
        LogEnd(4, 4),
    ]
    ran = kohaku("task", "submit", "--follow", "--", "x")
    assert (ran.status, ran.out, ran.err) == (3, "out\n", "1\nerr\n")


def placed(*attempts: int) -> tuple[Change, ...]:
    """Give the history of a task that was placed so often."""
    return tuple(
        Change(at=1.0, state=TaskState.ASSIGNED, attempt=attempt, node="n1") for attempt in attempts
    )


@pytest.mark.parametrize(
    ("end", "attempts"),
    [
        ({"attempt": 1, "history": placed(1)}, [1]),
        ({"attempt": 2, "history": placed(1, 2)}, [1, 2]),
        ({"attempt": 4, "history": placed(1, 2, 3, 4)}, [1, 2, 3, 4]),
        ({"attempt": 1002, "history": placed(1, 2, 1002)}, [1, 2, 1002]),
        ({"attempt": 3, "history": placed(1, 2, 3), "started_at": 0.0}, [1, 2, 3]),
        ({"attempt": 3, "history": placed(1, 2, 3), "started_at": 0.0, "node": "n1"}, [1, 2]),
    ],
    ids=[
        "ended while it was followed",
        "ended at the next",
        "missed two",
        "missed one before a restore",
        "ended while it waited for a fourth",
        "the third did not begin",
    ],
)
def test_the_attempts_that_were_made_are_followed_and_no_other(
    host: ScriptedHost, kohaku: Kohaku, end: dict[str, Any], attempts: list[int]
) -> None:
    spec = TaskSpec(command=("x",), retries=9)
    over = {"state": TaskState.FAILED, "exit": Exit(Cause.EXITED, 3), **end}

    def show(asked: object) -> TaskResult:
        return host.show(a_task(1, spec=spec, **(over if host.asked(TASK_LOGS) else {})))

    host.answer(TASK_SUBMIT, Submitted(BatchId(1), ((1, 1),)))
    host.answer(TASK_SHOW, show)
    host.logs = [LogChunk(Source.STDOUT, 0, b"out\n"), LogEnd(4, 0)]
    ran = kohaku("task", "submit", "--follow", "--", "x")
    assert [asked.attempt for asked in host.asked(TASK_LOGS)] == attempts
    assert (ran.status, ran.out) == (3, "out\n" * len(attempts))
    assert ran.err == "1\n" + "".join(f"task 1: attempt {number}\n" for number in attempts[1:])


def test_an_attempt_that_is_not_known_does_not_end_following(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    def answer(asked: OpenLogs) -> Ticket:
        if asked.attempt == 1:
            raise NotFound("task 1 has no attempt 1")
        return Ticket("t", LOGS_PATH, 0.0)

    host.answer(TASK_SUBMIT, Submitted(BatchId(1), ((1, 1),)))
    end = Exit(Cause.EXITED, 0)
    host.tasks[1] = a_task(1, state=TaskState.COMPLETED, exit=end, attempt=2, history=placed(1, 2))
    host.answer(TASK_LOGS, answer)
    host.logs = [LogChunk(Source.STDOUT, 0, b"out\n"), LogEnd(4, 0)]
    ran = kohaku("task", "submit", "--follow", "--", "x")
    assert (ran.status, ran.out) == (0, "out\n")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("'--array': 0 is not from 1 to 100000.", ["submit", "--array", "0", "x"]),
        ("'--array': 100001 is not from 1", ["submit", "--array", "100001", "x"]),
        ("'--cores': -1 is not 0 or more", ["submit", "-c", "-1", "x"]),
        ("'--cores': 10000", ["submit", "-c", str(10**20), "x"]),
        ("'--cores': 10000", ["submit", "-c", str(10**4200) + "0" * 200, "x"]),
        ("'--priority': -10000", ["submit", "--priority", str(-(10**20)), "x"]),
        ("'--cores': '٣' is not a whole number.", ["submit", "-c", "٣", "x"]),
        ("'--gpus': '1_0' is not a whole number.", ["submit", "--gpus", "1_0", "x"]),
        ("'--retries': '1e9' is not a whole number.", ["submit", "--retries", "1e9", "x"]),
        ("'--limit': 0 is not 1 or more", ["list", "--limit", "0"]),
        ("--time-limit is empty", ["submit", "--time-limit", "", "x"]),
        ("--time-limit 0", ["submit", "--time-limit", "0", "x"]),
        ("--grace is empty", ["submit", "--grace=", "x"]),
        ("-m is empty", ["submit", "-m", "", "x"]),
        ("--timeout is empty", ["submit", "--timeout", "", "x"]),
        ("--timeout is empty", ["submit", "--wait", "--timeout=", "x"]),
        ("--timeout is empty", ["wait", "--timeout", " ", "7"]),
        ("--timeout: 'soon' is not", ["wait", "--timeout", "soon", "7"]),
        ("--workdir is empty", ["submit", "--workdir", "", "x"]),
        ("--rows is empty", ["submit", "--rows", "", "x"]),
        ("-t is empty", ["submit", "-t", "a", "-t", "", "x"]),
        ("--context is empty", ["show", "7", "--context", ""]),
        ("--batch is empty", ["list", "--batch", ""]),
        ("--node is empty", ["list", "--node="]),
        ("--request-id", ["submit", "--request-id", "", "x"]),
        ("--tail", ["logs", "7", "--tail", "0"]),
        ("--tail", ["logs", "7", "--tail", str(2**64)]),
        ("--attempt", ["logs", "7", "--attempt", str(2**64)]),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_option(
    host: ScriptedHost, kohaku: Kohaku, option: str, words: list[str]
) -> None:
    ran = kohaku("task", *words)
    assert (ran.status, ran.out) == (2, "")
    assert option in ran.err
    assert host.calls == []


def test_an_empty_argument_of_the_command_is_the_commands_own(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(1), ((1, 1),)))
    assert kohaku("task", "submit", "-e", "A=", "--", "printf", "", "--name", "").status == 0
    (asked,) = host.asked(TASK_SUBMIT)
    assert asked.spec.command == ("printf", "", "--name", "")
    assert asked.spec.env == {"A": ""}


def test_timeout_needs_something_to_wait_for(host: ScriptedHost, kohaku: Kohaku) -> None:
    ran = kohaku("task", "submit", "--timeout", "1s", "--", "x")
    assert ran.status == 2
    assert "--wait or --follow" in ran.err
    assert host.calls == []


@pytest.mark.parametrize(("flag", "text"), [("--cores", "1.5"), ("--priority", "high")])
def test_text_where_a_number_belongs_is_told_in_plain_words(
    kohaku: Kohaku, flag: str, text: str
) -> None:
    ran = kohaku("task", "submit", flag, text, "--", "true")
    assert ran.status == 2
    assert f"'{text}' is not a whole number." in ran.err
