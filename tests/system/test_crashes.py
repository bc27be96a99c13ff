"""kill -9 of the daemons while tasks run: nothing ends, nothing is lost, nothing runs twice."""

from __future__ import annotations

from tests.system.homes import Home, wait_for

#: Counts in a file that every start would begin anew, and prints as many lines.
COUNTER = (
    "echo started; i=0; while [ $i -lt {count} ]; do i=$((i+1)); echo $i; sleep 0.1; done; exit 5"
)


def test_the_host_may_die_while_tasks_run(own_home: Home) -> None:
    home = own_home
    task = home.kohaku("task", "submit", "--", "sh", "-c", COUNTER.format(count=100))
    waiting = home.kohaku("task", "submit", "-c", "0", "--", "sleep", "600")
    home.wait_state(task, "running")
    home.wait_state(waiting, "running")
    home.kill("host")
    home.up()
    assert home.run("kohaku", "task", "wait", task, "--timeout", "60").code == 5
    assert home.kohaku("task", "logs", task) == expected(100)
    assert home.state(waiting) == "running"
    assert home.json("task", "show", task)["attempt"] == 1


def test_a_runner_may_die_while_tasks_run_and_while_they_end(own_home: Home) -> None:
    home = own_home
    ends_away = home.kohaku("task", "submit", "-c", "0", "--", "sh", "-c", COUNTER.format(count=20))
    goes_on = home.kohaku("task", "submit", "-c", "0", "--", "sh", "-c", COUNTER.format(count=120))
    home.wait_state(ends_away, "running", "failed")
    home.wait_state(goes_on, "running")
    home.kill("runner-node1")
    wait_for(
        lambda: home.json("node", "show", "node1")["state"] == "offline", "the node to be offline"
    )
    log = next(home.folder.rglob(f"{ends_away}-*.stdout"), None)
    assert log is not None, "the task's output is a file on its node"
    wait_for(lambda: log.read_text().endswith("\n20\n"), "the task to end without its runner")
    home.up()
    for task, count in ((ends_away, 20), (goes_on, 120)):
        assert home.run("kohaku", "task", "wait", task, "--timeout", "60").code == 5
        assert home.kohaku("task", "logs", task) == expected(count)
        assert home.json("task", "show", task)["attempt"] == 1


def test_everything_may_die_at_once(own_home: Home) -> None:
    home = own_home
    ids = home.kohaku(
        "task", "submit", "-c", "0", "--array", "20", "--", "sh", "-c", COUNTER.format(count=60)
    ).split()
    home.wait_state(ids[0], "running")
    home.kill("runner-node1")
    home.kill("host")
    home.up()
    assert home.run("kohaku", "task", "wait", *ids, "--timeout", "60").code == 5
    for task in ids:
        shown = home.json("task", "show", task)
        assert (shown["state"], shown["attempt"]) == ("failed", 1)
        assert home.kohaku("task", "logs", task) == expected(60)


def test_stopping_the_cluster_ends_no_task_and_starting_it_finds_them(own_home: Home) -> None:
    home = own_home
    task = home.kohaku("task", "submit", "--", "sh", "-c", COUNTER.format(count=100))
    home.wait_state(task, "running")
    assert home.run("kohakud", "down").code == 0
    assert home.run("kohaku", "status").code == 3
    home.up()
    assert home.run("kohaku", "task", "wait", task, "--timeout", "60").code == 5
    assert home.kohaku("task", "logs", task) == expected(100)


def expected(count: int) -> str:
    """Give the whole output of one single run of the counter."""
    return "\n".join(["started", *map(str, range(1, count + 1))])
