"""What a user does all day, through the real command line, daemons and processes."""

from __future__ import annotations

import re

import pytest

from tests.system.homes import Home, wait_for

TALKER = ("sh", "-c", "echo out; echo err >&2; exit 3")


def test_a_command_tells_its_exit_code_and_both_outputs(home: Home) -> None:
    task = home.kohaku("task", "submit", "--", *TALKER)
    assert re.fullmatch(r"\d+", task)
    assert home.run("kohaku", "task", "wait", task).code == 3
    both = home.run("kohaku", "task", "logs", task)
    assert (both.code, both.out, both.err) == (0, "out\n", "err\n")
    only = home.run("kohaku", "task", "logs", task, "--stderr")
    assert (only.out, only.err) == ("err\n", "")
    shown = home.json("task", "show", task)
    assert shown["id"] == task
    assert shown["state"] == "failed"
    assert (shown["exit"]["cause"], shown["exit"]["code"]) == ("exited", 3)
    states = [change["state"] for change in shown["history"]]
    assert (states[0], states[-1]) == ("queued", "failed")


@pytest.mark.parametrize("flag", ["--wait", "--follow"])
def test_waiting_and_following_behave_as_the_command_itself(home: Home, flag: str) -> None:
    done = home.run("kohaku", "task", "submit", flag, "--", *TALKER)
    assert done.code == 3
    if flag == "--follow":
        assert done.out == "out\n"
        assert "err\n" in done.err


def test_a_signal_is_told_apart_from_a_code(home: Home) -> None:
    killed = home.run("kohaku", "task", "submit", "--wait", "--", "sh", "-c", "kill -9 $$")
    exited = home.run("kohaku", "task", "submit", "--wait", "--", "sh", "-c", "exit 137")
    assert killed.code == exited.code == 137
    exits = [home.json("task", "show", done.out.split()[0])["exit"] for done in (killed, exited)]
    assert exits[0]["cause"] == "signalled"
    assert exits[0]["signal"] == 9
    assert exits[1]["cause"] == "exited"
    assert (exits[1]["code"], exits[1]["signal"]) == (137, None)


def test_a_batch_over_three_nodes_runs_on_each(home: Home) -> None:
    ids = home.kohaku(
        "task", "submit", "-t", "node1", "-t", "node2", "-t", "node3",
        "--", "sh", "-c", "echo $KOHAKU_NODE $KOHAKU_TASK_INDEX of $KOHAKU_BATCH_SIZE",
    ).split()  # fmt: skip
    assert home.run("kohaku", "task", "wait", *ids).code == 0
    outputs = [home.kohaku("task", "logs", task) for task in ids]
    assert outputs == ["node1 0 of 3", "node2 1 of 3", "node3 2 of 3"]


def test_a_memory_hog_is_ended_and_says_so(home: Home) -> None:
    hog = "x=xxxxxxxx; while :; do x=$x$x; done"
    done = home.run("kohaku", "task", "submit", "-m", "64M", "--wait", "--", "sh", "-c", hog)
    shown = home.json("task", "show", done.out.split()[0])
    enforces = {
        name
        for backend in home.json("node", "show", shown["node"])["inventory"]["backends"]
        for name in backend.get("enforces", ())
    }
    if "memory" in enforces:
        assert shown["state"] == "oom_killed"
        assert "memory" in shown["reason"]
    else:
        # Without cgroups the limit is each process's own, and the program is told no.
        assert shown["state"] == "failed"
    assert done.code != 0


def test_pause_resume_and_kill_reach_a_whole_tree(home: Home) -> None:
    tick = "while :; do echo tick; sleep 0.02; done"
    task = home.kohaku("task", "submit", "--grace", "1", "--", "sh", "-c", f"({tick}) & {tick}")

    def ticks() -> int:
        return len(home.kohaku("task", "logs", task))

    wait_for(lambda: ticks() > 100, "output")
    home.kohaku("task", "pause", task)
    home.wait_state(task, "paused")
    held = ticks()
    home.kohaku("status")
    assert ticks() == held, "a paused task goes on"
    home.kohaku("task", "resume", task)
    home.wait_state(task, "running")
    wait_for(lambda: ticks() > held, "more output after the pause")
    home.kohaku("task", "kill", task)
    assert home.run("kohaku", "task", "wait", task).code == 128 + 15
    after = ticks()
    home.kohaku("status")
    assert ticks() == after, "a child of a killed task goes on"
    shown = home.json("task", "show", task)
    assert shown["state"] == "killed"
    assert shown["reason"].startswith("killed by admin")


def test_draining_gives_a_node_nothing_new(home: Home) -> None:
    home.kohaku("node", "drain", "node3")
    try:
        task = home.kohaku("task", "submit", "-t", "node3", "--", "true")
        explained = home.json("task", "explain", task)
        (verdict,) = [one for one in explained["nodes"] if one["node"] == "node3"]
        assert "the node is draining" in verdict["reasons"]
        assert home.state(task) == "queued"
    finally:
        home.kohaku("node", "undrain", "node3")
    assert home.run("kohaku", "task", "wait", task, "--timeout", "30").code == 0


def test_a_thousand_tasks_that_do_not_fit_wait_in_order(home: Home) -> None:
    home.kohaku("node", "label", "node2", "room=small")
    cores = str(len(home.json("node", "show", "node2")["inventory"]["cores"]))
    need = ("-c", cores, "--on", "room=small")
    first = home.kohaku("task", "submit", *need, "--", "sleep", "600")
    home.wait_state(first, "running")
    ids = home.kohaku("task", "submit", *need, "--array", "1000", "--", "true").split()
    assert len(ids) == 1000
    batch = home.json("task", "show", ids[0])["batch"]
    states = {row["state"] for row in home.json("task", "list", "--all", "--batch", batch)["tasks"]}
    assert states == {"queued"}
    middle = home.json("task", "explain", ids[500])
    assert middle["ahead"] == 500
    reasons = {one["node"]: " ".join(one["reasons"]) for one in middle["nodes"]}
    assert f"0 of {cores} free" in reasons["node2"]
    assert "label room=small wanted" in reasons["node1"]
    home.kohaku("task", "kill", first)
    home.run("kohaku", "task", "wait", *ids[:3])
    ended = [home.json("task", "show", task) for task in ids[:3]]
    starts = [task["started_at"] for task in ended]
    assert starts == sorted(starts)
    home.kohaku("batch", "kill", batch)
    assert home.run("kohaku", "batch", "wait", batch, "--timeout", "60").code != 3


def test_the_impossible_is_refused_node_by_node(home: Home) -> None:
    done = home.run("kohaku", "task", "submit", "-c", "60000", "--", "true")
    assert done.code == 1
    assert "no node could ever hold this" in done.err
    for node in ("node1", "node2", "node3"):
        assert node in done.err
    assert "60000 cores wanted" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-t", "nodel"), "did you mean node"),
        (("-t", "node1:x"), "is not a target"),
        (("-m", "lots"), "is not a size"),
        (("-m", "64"), "less than 1 MiB"),
        (("-e", "=x"), "variable"),
        (("--backend", "cloud"), "cloud"),
        (("-t", "node1::7"), "GPU 7 wanted"),
    ],
)
def test_bad_input_is_named_and_says_what_to_do(
    home: Home, arguments: tuple[str, ...], said: str
) -> None:
    done = home.run("kohaku", "task", "submit", *arguments, "--", "true")
    assert done.code in {1, 2}
    assert done.out == ""
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_command_that_is_not_there_says_so(home: Home) -> None:
    done = home.run("kohaku", "task", "submit", "--wait", "--", "no-such-program")
    assert done.code == 1
    shown = home.json("task", "show", done.out.split()[0])
    assert shown["exit"]["cause"] == "start_failed"
    assert "no-such-program" in shown["reason"]


def test_a_wrong_token_and_no_host_are_told_apart(home: Home) -> None:
    url = home.json("context", "show")["url"]
    wrong = home.run("kohaku", "status", KOHAKU_HOST=url, KOHAKU_TOKEN="kht_" + "0" * 64)
    assert wrong.code == 1
    assert "not known here" in wrong.err
    none = home.run("kohaku", "status", KOHAKU_HOST=url, KOHAKU_HOME=str(home.folder / "empty"))
    assert none.code == 1
    assert "needs an API token" in none.err
    nobody = home.run("kohaku", "status", KOHAKU_HOST="127.0.0.1:9", KOHAKU_TOKEN="")
    assert nobody.code == 3
