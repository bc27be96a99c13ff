"""Commands that read the cluster: what they ask, what they print for people and for scripts."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from protocol.errors import Forbidden, NoFit, NotFound
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.messages.cluster import Event, EventPage, Status
from protocol.messages.node import NodeList, NodeResult
from protocol.messages.task import (
    BatchPage,
    BatchResult,
    ExplainResult,
    ListTasks,
    Submitted,
    TaskPage,
)
from protocol.methods import (
    BATCH_LIST,
    BATCH_SHOW,
    EVENT_LIST,
    NODE_LIST,
    NODE_SHOW,
    STATUS,
    TASK_EXPLAIN,
    TASK_LIST,
    TASK_SUBMIT,
)
from protocol.models.node import (
    BackendInfo,
    Claimed,
    Gpu,
    GpuReading,
    Inventory,
    Node,
    NodeState,
    Readings,
)
from protocol.models.task import (
    Batch,
    Cause,
    Change,
    Claim,
    Exit,
    Explanation,
    Mount,
    Network,
    NodeVerdict,
    Task,
    TaskSpec,
    TaskState,
)
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import ScriptedHost, a_task

BIG = 2**60 + 1

NODE = Node(
    name=NodeName("node1"),
    state=NodeState.ONLINE,
    draining=True,
    labels={"gpu": "a100"},
    inventory=Inventory(
        cores=(0, 1, 2, 3),
        memory=8 * 2**30,
        gpus=(Gpu(0, "GPU-1", "A100", 40 * 2**30),),
        backends=(BackendInfo("process", isolation="namespaces"),),
        default_backend="process",
    ),
    claimed=Claimed(tasks=1, cores=2, memory=2**30, gpus=1),
    readings=Readings(cpu_percent=51.0, gpus=(GpuReading("GPU-1", 80.0, 2**30),)),
)


def test_a_list_for_a_pipe_is_aligned_and_whole(host: ScriptedHost, kohaku: Kohaku) -> None:
    long = "x" * 300
    tasks = (
        a_task(BIG, spec=TaskSpec(command=("echo", long)), node="node1"),
        a_task(7, state=TaskState.FAILED, exit=Exit(Cause.EXITED, 3)),
    )
    host.answer(TASK_LIST, TaskPage(tasks))
    ran = kohaku("task", "list")
    assert (ran.status, ran.err) == (0, "")
    titles, first, second = ran.out.splitlines()
    assert titles.split() == ["ID", "STATE", "NODE", "OWNER", "AGE", "RUN", "IN", "NAME", "COMMAND"]
    assert first.endswith(f"echo {long}")
    assert titles.index("STATE") == first.index("running") == second.index("failed (3)")
    assert not any(line.endswith(" ") for line in ran.out.splitlines())


def test_a_list_as_json_is_one_document_with_ids_as_strings(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    host.answer(TASK_LIST, TaskPage((a_task(BIG, claim=Claim((0, 1), 2**20, ("GPU-1",))),)))
    document = json.loads(kohaku("task", "list", "--json").out)
    assert document["more"] is False
    (task,) = document["tasks"]
    assert task["id"] == str(BIG)
    assert task["state"] == "running"
    assert task["claim"] == {"cores": [0, 1], "memory": 2**20, "gpus": ["GPU-1"], "numa": None}
    assert set(task) == set(Task.__struct_fields__)


def test_filters_go_to_the_host(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_LIST, TaskPage((a_task(7),)))
    words = ["--state", "queued", "--state", "lost", "--node", "n1", "--owner", "ada"]
    assert kohaku("task", "list", *words, "--batch", "9", "--limit", "3").status == 0
    (asked,) = host.asked(TASK_LIST)
    assert asked.states == (TaskState.QUEUED, TaskState.LOST)
    assert (asked.node, asked.owner, asked.batch) == ("n1", "ada", 9)


def test_a_filter_that_names_nothing_is_told(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(TASK_LIST, TaskPage(()))
    host.answer(NODE_SHOW, NotFound("there is no node 'nowhere'", hint="see: kohaku node list"))
    ran = kohaku("task", "list", "--node", "nowhere")
    assert (ran.status, len(ran.out.splitlines())) == (0, 1)
    assert ran.err == "there is no node 'nowhere'\nsee: kohaku node list\n"
    host.answer(BATCH_SHOW, NotFound("there is no batch 1"))
    assert kohaku("task", "list", "--batch", "1").err == "there is no batch 1\n"
    host.answer(NODE_SHOW, NodeResult(NODE))
    assert kohaku("task", "list", "--node", "node1").err == ""


@pytest.mark.parametrize("numbers", ["1, number 0", "3, numbers 0-1,4"])
def test_claimed_cores_are_counted_and_numbered(
    host: ScriptedHost, kohaku: Kohaku, numbers: str
) -> None:
    cores = (0,) if numbers.startswith("1") else (0, 1, 4)
    host.tasks[7] = a_task(7, claim=Claim(cores))
    assert f"claimed cores  {numbers}\n" in kohaku("task", "show", "7").out


def test_json_may_be_asked_before_the_command(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.tasks[7] = a_task(7)
    for words in (["status"], ["task", "show", "7"], ["whoami"]):
        assert kohaku("--json", *words) == kohaku(*words, "--json")
    assert json.loads(kohaku("--json").out) == json.loads(kohaku("status", "--json").out)
    assert json.loads(kohaku("--json", "--version").out).keys() == {"version"}
    # A command without documents says so, instead of giving something else.
    ran = kohaku("--json", "task", "logs", "7")
    assert (ran.status, ran.out) == (2, "")
    assert json.loads(ran.err)["error"]["hint"] == "see: kohaku task logs --help"


def test_json_before_the_command_leaves_the_tasks_command_alone(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    host.answer(TASK_SUBMIT, Submitted(BatchId(1), ((1, 1),)))
    ran = kohaku("--json", "task", "submit", "x", "--json")
    assert json.loads(ran.out)["tasks"] == ["1"]
    assert host.asked(TASK_SUBMIT)[0].spec.command == ("x", "--json")


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["task", "wait"], "{ID...}"),
        (["node", "drain"], "{NODE...}"),
        (["task", "submit"], "{COMMAND...}"),
        (["node", "label"], "[KEY=VALUE...]"),
    ],
)
def test_usage_says_where_several_are_taken(kohaku: Kohaku, words: list[str], usage: str) -> None:
    assert usage in kohaku(*words, "--help").out.splitlines()[0]


@pytest.mark.parametrize(("flag", "count", "more"), [([], 2, True), (["--all"], 5, False)])
def test_a_list_says_whether_there_are_older_ones(
    host: ScriptedHost, kohaku: Kohaku, flag: list[str], count: int, more: bool
) -> None:
    everything = tuple(a_task(number) for number in (5, 4, 3, 2, 1))
    host.answer(TASK_LIST, lambda asked: TaskPage(everything[: asked.limit]))
    document = json.loads(kohaku("task", "list", "--limit", "2", *flag, "--json").out)
    assert (len(document["tasks"]), document["more"]) == (count, more)


def test_show_tells_everything(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.tasks[7] = a_task(
        7,
        state=TaskState.OOM_KILLED,
        exit=Exit(Cause.OOM, signal=9, message="the limit was 64 MiB", oom_kills=2),
        spec=TaskSpec(command=("sh", "-c", "echo 'a b'"), env={"K": "v"}, memory=64 * 2**20),
        history=(Change(1e9, TaskState.QUEUED, "submitted", "ada"),),
    )
    out = kohaku("task", "show", "7").out
    for line in (
        "state       oom_killed",
        "ended       out of memory: the limit was 64 MiB",
        "oom kills   2",
        "env         K=v",
        "memory      64 MiB",
        """command     sh -c 'echo '"'"'a b'"'"''""",
    ):
        assert line in out
    assert out.splitlines()[-1].split()[-4:] == ["-", "-", "ada", "submitted"]

    document = json.loads(kohaku("task", "show", "7", "--json").out)
    assert document["exit"] == {
        "cause": "oom",
        "code": None,
        "signal": 9,
        "message": "the limit was 64 MiB",
        "oom_kills": 2,
    }
    assert document["history"][0]["at"] == 1e9


def test_explain_says_node_by_node_why(host: ScriptedHost, kohaku: Kohaku) -> None:
    nodes = (
        NodeVerdict(NodeName("a"), fits_now=False, could_ever=False, reasons=("no GPU", "drains")),
        NodeVerdict(NodeName("b"), fits_now=False, could_ever=True, reasons=("2 cores free",)),
        NodeVerdict(NodeName("c"), fits_now=True, could_ever=True),
    )
    explanation = Explanation(TaskId(7), TaskState.QUEUED, "it waits for cores", 3, nodes)
    host.answer(TASK_EXPLAIN, ExplainResult(explanation))
    assert kohaku("task", "explain", "7").out.splitlines() == [
        "task 7 is queued: it waits for cores",
        "3 tasks before it in the queue",
        "",
        "NODE  FITS   WHY",
        "a     never  no GPU",
        "             drains",
        "b     later  2 cores free",
        "c     now    -",
    ]


def test_status_puts_the_cluster_on_a_page(host: ScriptedHost, kohaku: Kohaku) -> None:
    status = Status(
        cluster="77",
        version="0.1.0",
        started_at=0.0,
        nodes={"online": 2, "offline": 1},
        draining=1,
        tasks={"running": 2, "queued": 10, "failed": 3, "completed": 4},
        capacity=Claimed(cores=48, memory=64 * 2**30),
        claimed=Claimed(cores=12, memory=2**30),
        problems=("node3 is offline",),
    )
    host.answer(STATUS, status)
    out = kohaku("status").out
    assert "nodes    2 online, 1 offline, 1 draining" in out
    assert "tasks    2 running, 10 queued\n" in out
    assert "ended    3 failed, 4 completed in the last hour\n" in out
    assert "cores    12 of 48 claimed" in out
    assert "gpus" not in out
    assert out.splitlines()[0] == "problem  node3 is offline"
    assert kohaku().out == out
    assert json.loads(kohaku("status", "--json").out)["claimed"]["cores"] == 12


def test_nodes_are_listed_and_shown(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(NODE_LIST, NodeList((NODE,)))
    host.answer(NODE_SHOW, NodeResult(NODE))
    row = kohaku("node", "list").out.splitlines()[1]
    assert row.split("  ")[:2] == ["node1", "online, draining"]
    assert "2 of 4" in row
    assert "51 %" in row
    out = kohaku("node", "show", "node1").out
    assert "2 of 4 claimed, numbers 0-3" in out
    assert "A100, 40 GiB, 80 % busy, 1 GiB used" in out
    assert "default, isolation namespaces" in out
    assert json.loads(kohaku("node", "show", "node1", "--json").out)["name"] == "node1"


def test_a_node_that_is_there_but_takes_nothing_does_not_look_well(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    readings = Readings(troubles=("its disk is full",))
    node = Node(name=NodeName("node1"), state=NodeState.ONLINE, readings=readings)
    host.answer(NODE_LIST, NodeList((node,)))
    host.answer(NODE_SHOW, NodeResult(node))
    assert "online, in trouble" in kohaku("node", "list").out
    assert "problem  its disk is full\n" in kohaku("node", "show", "node1").out


def test_batches_are_listed_and_shown(host: ScriptedHost, kohaku: Kohaku) -> None:
    batch = Batch(id=BatchId(9), owner=UserName("ada"), size=2, states={"running": 2})
    host.answer(BATCH_LIST, BatchPage((batch,)))
    host.answer(BATCH_SHOW, BatchResult(batch))
    failed = a_task(
        8, index=1, node="n2", state=TaskState.FAILED, reason="no disk", exit=Exit(Cause.EXITED, 3)
    )
    host.answer(TASK_LIST, TaskPage((a_task(7, node="n1", started_at=0.0), failed)))
    assert kohaku("batch", "list").out.splitlines()[1].endswith("2 running")
    rows = [line.split(maxsplit=6) for line in kohaku("batch", "show", "9").out.splitlines()[-3:]]
    assert rows[0] == ["INDEX", "ID", "STATE", "NODE", "EXIT", "RUN", "REASON"]
    assert rows[1] == ["0", "7", "running", "n1", "-", "-", "-"]
    assert rows[2][:4] == ["1", "8", "failed", "(3)"]
    assert rows[2][-1].endswith("no disk")
    document = json.loads(kohaku("batch", "show", "9", "--json").out)
    assert document["id"] == "9"
    assert [task["id"] for task in document["tasks"]] == ["7", "8"]
    assert document["more"] is False


@pytest.mark.parametrize(
    ("words", "count", "more"),
    [
        ([], 50, True),
        (["--limit", "3"], 3, True),
        (["--limit", "700"], 700, True),
        (["--all"], 1200, False),
        (["--json"], 1200, False),
        (["--json", "--limit", "3"], 3, True),
    ],
)
def test_a_large_batch_is_shown_from_its_beginning(
    host: ScriptedHost, kohaku: Kohaku, words: list[str], count: int, more: bool
) -> None:
    batch = Batch(id=BatchId(9), owner=UserName("ada"), size=1200, states={"queued": 1200})
    everything = [a_task(100 + number, index=number) for number in range(1200)]

    def page(asked: ListTasks) -> TaskPage:
        assert asked.after is not None
        assert (asked.batch, asked.states) == (9, (TaskState.QUEUED,))
        rest = [task for task in everything if task.id > asked.after]
        return TaskPage(tuple(rest[: asked.limit]), len(rest) > asked.limit)

    host.answer(BATCH_SHOW, BatchResult(batch))
    host.answer(TASK_LIST, page)
    out = kohaku("batch", "show", "9", "--state", "queued", *words).out
    if "--json" in words:
        document = json.loads(out)
        assert [task["index"] for task in document["tasks"]] == list(range(count))
        assert document["more"] == more
    else:
        rows = out.split("\n\n")[1].splitlines()[1:]
        assert [int(row.split()[0]) for row in rows] == list(range(count))


def test_how_far_a_preparation_is_stands_in_the_state(host: ScriptedHost, kohaku: Kohaku) -> None:
    there = a_task(7, state=TaskState.PREPARING, reason="preparing 43 %", started_at=0.0)
    waits = a_task(8, state=TaskState.PREPARING, reason="waits for Docker", started_at=0.0)
    host.tasks.update({7: there, 8: waits})
    host.answer(TASK_LIST, TaskPage((waits, there)))
    out = kohaku("task", "show", "7").out
    assert "state      preparing 43 %\n" in out
    assert "reason" not in out
    out = kohaku("task", "show", "8").out
    assert "state      preparing\nreason     waits for Docker\n" in out
    listed = kohaku("task", "list").out
    assert "  preparing 43 %  " in listed
    assert "waits for Docker" not in listed


def test_a_container_is_told_as_it_was_asked_for(host: ScriptedHost, kohaku: Kohaku) -> None:
    spec = TaskSpec(
        command=("true",),
        container="demo",
        mounts=(Mount("/srv/a", "/a", read_only=True), Mount("/srv/b", "/b")),
        user="1000:1000",
        network=Network.NONE,
        shm_size=2**30,
        ulimits={"nofile": (1024, -1), "core": (0, 0)},
        privileged=True,
    )
    claim = Claim((0, 1), 2**30, ("GPU-b", "GPU-gone"), 1)
    gpus = (Gpu(0, "GPU-a"), Gpu(3, "GPU-b"))
    node = Node(name=NodeName("n1"), state=NodeState.ONLINE, inventory=Inventory(gpus=gpus))
    host.answer(NODE_SHOW, NodeResult(node))
    host.tasks[7] = a_task(7, spec=spec, node="n1", claim=claim)
    out = kohaku("task", "show", "7").out
    for line in (
        "container       demo",
        "mount           /srv/a:/a:ro",
        "mount           /srv/b:/b",
        "user            1000:1000",
        "network         none",
        "shm size        1 GiB",
        "ulimits         core=0 nofile=1024:unlimited",
        "privileged      yes",
        "claimed cores   2, numbers 0-1",
        "claimed gpu     GPU 3, GPU-b",
        "claimed gpu     GPU-gone",
        "claimed numa    NUMA node 1",
    ):
        assert f"{line}\n" in out
    host.answer(NODE_SHOW, NotFound("no node is called 'n1'"))
    assert "claimed gpu     GPU-b\n" in kohaku("task", "show", "7").out
    host.answer(TASK_LIST, TaskPage((host.tasks[7], a_task(8, spec=replace(spec, container="")))))
    assert [line.split()[6] for line in kohaku("task", "list").out.splitlines()[1:]] == [
        "demo",
        "-",
    ]


def test_events_read_like_a_diary(host: ScriptedHost, kohaku: Kohaku) -> None:
    events = (
        Event(id=BIG, at=2.0, kind="task.lost", text="task 7 is lost", task=TaskId(7)),
        Event(id=1, at=1.0, kind="node.online", text="node1 is here", node="node1"),
    )
    host.answer(EVENT_LIST, EventPage(events))
    assert [line.split()[3] for line in kohaku("events").out.splitlines()[1:]] == [
        "node.online",
        "task.lost",
    ]
    document = json.loads(kohaku("events", "--json").out)
    assert [event["id"] for event in document["events"]] == ["1", str(BIG)]
    assert document["events"][1]["task"] == "7"


def test_what_a_name_holds_cannot_reach_the_terminal(host: ScriptedHost, kohaku: Kohaku) -> None:
    name = "\x1b]0;pwned\x07[red]evil\n\u202ename"
    host.answer(TASK_LIST, TaskPage((a_task(7, spec=TaskSpec(command=("x",), name=name)),)))
    out = kohaku("task", "list").out
    assert "[red]evil name" in out
    assert len(out.splitlines()) == 2
    raw = kohaku("task", "list", "--json").out
    assert "\x1b" not in raw
    assert json.loads(raw)["tasks"][0]["spec"]["name"] == name


def test_a_refusal_says_why_and_what_next(host: ScriptedHost, kohaku: Kohaku) -> None:
    reasons = {"gpu-01": ["4 GPUs wanted, 2 here"], "cpu-1": ["no GPU"]}
    host.answer(
        TASK_EXPLAIN, NoFit("fits nowhere", hint="ask for less", details={"reasons": reasons})
    )
    ran = kohaku("task", "explain", "7")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        "error: fits nowhere",
        "  gpu-01  4 GPUs wanted, 2 here",
        "  cpu-1   no GPU",
        "ask for less",
    ]
    error = json.loads(kohaku("task", "explain", "7", "--json").err)["error"]
    assert error == {
        "code": "no_fit",
        "message": "fits nowhere",
        "hint": "ask for less",
        "details": {"reasons": reasons},
    }


def test_exit_statuses_tell_whose_fault_it_is(
    host: ScriptedHost, kohaku: Kohaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.answer(STATUS, Forbidden("you may not"))
    assert kohaku("status").status == 1
    assert kohaku("task", "show", "seven").status == 2
    monkeypatch.setenv("KOHAKU_TOKEN", "kht_wrong")
    ran = kohaku("status")
    assert (ran.status, ran.err) == (1, "error: the host does not know this token\nlog in again\n")
    monkeypatch.setenv("KOHAKU_HOST", "127.0.0.1:1")
    assert kohaku("status").status == 3
    monkeypatch.delenv("KOHAKU_HOST")
    ran = kohaku("status")
    assert ran.status == 3
    assert "kohaku login" in ran.err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["statsu"], "Did you mean 'status'"),
        (["task", "lst"], "Did you mean 'list'"),
        (["task", "list", "--jsn"], "--json"),
        (["task", "list", "--state", "runing"], "'running'"),
        (["task", "wait"], "see: kohaku task wait --help"),
        (["task", "wait", "1", "--timeout", "soon"], "90s, 15m"),
        (["task", "logs", "1", "--stdout", "--stderr"], "exclude each other"),
    ],
)
def test_a_slip_is_told_with_what_was_meant(
    host: ScriptedHost, kohaku: Kohaku, words: list[str], hint: str
) -> None:
    ran = kohaku(*words)
    assert (ran.status, ran.out) == (2, "")
    assert hint in ran.err
    assert host.calls == []
    if "--json" not in ran.err:
        assert json.loads(kohaku(*words, "--json").err)["error"]["code"] == "bad_request"


def test_a_bug_of_ours_is_one_line_unless_asked_for(
    host: ScriptedHost, kohaku: Kohaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down() -> None:
        raise LookupError("secret")

    monkeypatch.setattr("kohaku_tui.cli.output.now", break_down)
    host.answer(TASK_LIST, TaskPage(()))
    ran = kohaku("task", "list")
    assert ran.status == 1
    assert ran.err.splitlines()[0] == "error: internal error: LookupError"
    assert "secret" not in ran.err
    assert "KOHAKU_DEBUG=1" in ran.err
    monkeypatch.setenv("KOHAKU_DEBUG", "1")
    with pytest.raises(LookupError):
        kohaku("task", "list")


def test_without_a_cluster_it_says_what_to_do_first(
    kohaku: Kohaku, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))
    monkeypatch.delenv("KOHAKU_HOST", raising=False)
    ran = kohaku()
    assert ran.status == 0
    assert "kohakud up --detach" in ran.out
