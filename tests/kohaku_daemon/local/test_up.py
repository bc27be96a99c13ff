"""``kohakud up`` and ``kohakud down`` with real daemons, as a person uses them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kohaku_daemon.local import pidfiles
from kohaku_daemon.local.home import Home
from protocol import contexts
from protocol.blocking import connect

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[3]
_PATIENCE_S = 30.0


class Trial:
    """One home, and the commands a person would give in it."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root / "data")
        self.environ = {**os.environ, "KOHAKU_HOME": str(root), "KOHAKU_HOSTD_PORT": "0"}

    def kohakud(self, *words: str, status: int = 0) -> str:
        """Give a command and see its exit status; give what it wrote."""
        done = subprocess.run(
            [sys.executable, "-m", "kohaku_daemon", *words],
            env=self.environ,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def popen(self, *words: str) -> subprocess.Popen[str]:
        """Give a command that stays."""
        return subprocess.Popen(
            [sys.executable, "-m", "kohaku_daemon", *words],
            env=self.environ,
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pid(self, name: str) -> int | None:
        """Give the process of a daemon, None if it does not run."""
        if name == "host":
            return pidfiles.holder(self.home.host / "host.pid")
        return pidfiles.holder(self.home.runner(name) / f"runner-{name}.pid")

    def call(self, method: str, **params: object) -> dict[str, object]:
        """Call a method of the host, as the context ``local`` does."""
        context = contexts.load().find("local")
        with connect(context.url, context.token) as cluster:
            answer: dict[str, object] = cluster.call_raw(method, params)
        return answer


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))
    trial = Trial(tmp_path)
    yield trial
    try:
        trial.kohakud("down", "--tasks")
    finally:
        with suppress(AssertionError):
            trial.kohakud("down")


def wait_until(good: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not good():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def online(trial: Trial) -> list[str]:
    nodes = trial.call("node.list")["nodes"]
    assert isinstance(nodes, list)
    return [node["name"] for node in nodes if node["state"] == "online"]


def test_a_cluster_is_up_when_up_returns_and_down_when_down_does(trial: Trial) -> None:
    said = trial.kohakud("up", "--detach", "--runners", "2")
    assert re.search(r"the cluster is up: http://127\.0\.0\.1:\d+\n", said)
    assert online(trial) == ["node1", "node2"]
    pids = {name: trial.pid(name) for name in ("host", "node1", "node2")}
    assert all(pids.values())
    assert all(f"{name:<8} process {pid}" in said for name, pid in pids.items())
    # Not even the way in by a join token is left open.
    assert not (trial.home.root / "join.token").exists()

    # Nothing is missing, so nothing is started.
    trial.kohakud("up", "--detach")
    assert pids == {name: trial.pid(name) for name in pids}

    assert "stopped node1, node2, host" in trial.kohakud("down")
    assert not any(trial.pid(name) for name in pids)
    assert trial.kohakud("down") == "nothing was running\n"


def test_what_is_missing_is_started_with_what_was_there_before(trial: Trial) -> None:
    trial.kohakud("up", "--detach", "--runners", "2")
    url = contexts.load().find("local").url
    host, node1, node2 = (trial.pid(name) for name in ("host", "node1", "node2"))
    assert node2 is not None
    os.kill(node2, signal.SIGKILL)
    trial.kohakud("up", "--detach")
    assert (trial.pid("host"), trial.pid("node1")) == (host, node1)
    assert trial.pid("node2") not in (None, node2)
    assert online(trial) == ["node1", "node2"]

    trial.kohakud("down")
    trial.kohakud("up", "--detach")
    assert contexts.load().find("local").url == url
    assert online(trial) == ["node1", "node2"]

    trial.kohakud("up", "--detach", "--runners", "3")
    assert online(trial) == ["node1", "node2", "node3"]


def test_a_runner_whose_node_was_removed_joins_anew(trial: Trial) -> None:
    trial.kohakud("up", "--detach", "--runners", "2")
    node1, node2 = trial.pid("node1"), trial.pid("node2")
    trial.call("node.remove", node="node1")
    said = trial.kohakud("up", "--detach")
    assert "node1 runs, but its node was removed" in said
    assert online(trial) == ["node1", "node2"]
    assert trial.pid("node1") not in (None, node1)
    assert trial.pid("node2") == node2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's tasks are users of their own")
def test_a_node_where_no_task_can_run_is_told_with_what_to_do(trial: Trial, tmp_path: Path) -> None:
    trial.environ["KOHAKU_RUNNER_PROCESS_ISOLATION"] = "plain"
    tmp_path.chmod(0o700)
    shut = trial.home.find_shut()
    said = trial.kohakud("up", "--detach")
    assert "the cluster is up: " in said
    assert "warning: no task can run on node1: " in said
    assert f"chmod o+x {shut}" in said
    trial.kohakud("down")

    # Nothing is told where nothing is wrong.
    trial.environ["KOHAKU_RUNNER_PROCESS_ISOLATION"] = "auto"
    assert "warning" not in trial.kohakud("up", "--detach")


def test_tasks_outlive_down_and_end_with_down_tasks(trial: Trial, tmp_path: Path) -> None:
    trial.kohakud("up", "--detach")
    spec = {"command": ["sleep", "1000"], "grace_s": 1.0}
    answer = trial.call("task.submit", request_id="outlives-down", spec=spec)
    runs = answer["runs"]
    assert isinstance(runs, list)
    (task,) = [first for first, _ in runs]

    def state() -> str:
        shown = trial.call("task.show", task=task)["task"]
        assert isinstance(shown, dict)
        return str(shown["state"])

    wait_until(lambda: state() == "running", "the task runs")
    trial.kohakud("down")
    trial.kohakud("up", "--detach")
    wait_until(lambda: state() == "running", "the task runs after a restart of both daemons")

    # The daemons that could end it are not even up.
    trial.kohakud("down")
    assert "all tasks have ended" in trial.kohakud("down", "--tasks")
    trial.kohakud("up", "--detach")
    assert state() == "killed"


def test_up_in_the_foreground_stops_its_daemons_on_ctrl_c(trial: Trial) -> None:
    with trial.popen("up") as process:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            said += line
        assert trial.pid("node1")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "tasks go on" in told
    assert not trial.pid("host")
    assert not trial.pid("node1")


def test_up_in_the_foreground_tells_of_a_daemon_that_fails(trial: Trial) -> None:
    with trial.popen("up") as process:
        assert process.stdout is not None
        wait_until(lambda: trial.pid("node1"), "the runner runs")
        while "Ctrl-C" not in process.stdout.readline():
            pass
        node1 = trial.pid("node1")
        assert node1 is not None
        os.kill(node1, signal.SIGKILL)
        assert process.stderr is not None
        assert "node1 ended with status -9; it wrote:" in process.stderr.readline()
        trial.kohakud("down")
        process.communicate(timeout=30)
    assert process.returncode == 1


def test_a_taken_port_stops_nothing_and_says_what_to_do(trial: Trial) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = trial.kohakud("up", "--detach", "--listen", f"127.0.0.1:{port}", status=1)
    assert f"another program listens on port {port}" in said
    assert "kohakud up --listen 127.0.0.1:0" in said
    assert not trial.pid("host")


def test_a_wish_that_no_runner_can_fulfil_shows_the_log_and_is_not_remembered(
    trial: Trial,
) -> None:
    said = trial.kohakud("up", "--detach", "--backend", "abacus", status=1)
    assert re.search(r"kohakud: node1 ended with status \d; it wrote:\n  \| .*abacus", said)
    assert f"all of it: {trial.home.logs}/node1.log" in said
    # It never joined, so there is nothing to remove.
    assert "node remove" not in said
    host = trial.pid("host")
    assert host
    assert not trial.pid("node1")
    trial.kohakud("up", "--detach")
    assert online(trial) == ["node1"]
    assert trial.pid("host") == host


def test_one_node_that_cannot_come_keeps_nothing_else_down(trial: Trial) -> None:
    trial.kohakud("up", "--detach", "--runners", "3")
    trial.kohakud("down")
    vault = trial.home.runner("node2") / "vault.sqlite"
    whole = vault.read_bytes()
    vault.write_bytes(b"x" * 4096)
    said = trial.kohakud("up", "--detach", status=1)
    assert "the cluster is up: " in said
    assert re.search(r"kohakud: node2 ended with status \d; it wrote:\n  \| .*vault.sqlite", said)
    assert f"all of it: {trial.home.logs}/node2.log" in said
    assert "kohaku node remove node2" in said
    assert "all else is up; when this is mended: kohakud up --detach" in said
    assert online(trial) == ["node1", "node3"]
    pids = [trial.pid(name) for name in ("host", "node1", "node3")]
    assert all(pids)
    assert not trial.pid("node2")

    vault.write_bytes(whole)
    trial.kohakud("up", "--detach")
    assert online(trial) == ["node1", "node2", "node3"]
    assert pids == [trial.pid(name) for name in ("host", "node1", "node3")]


def test_up_in_the_foreground_stays_with_those_that_came(trial: Trial) -> None:
    trial.kohakud("up", "--detach", "--runners", "2")
    trial.kohakud("down")
    (trial.home.runner("node2") / "vault.sqlite").write_bytes(b"x" * 4096)
    with trial.popen("up") as process:
        assert process.stderr is not None
        while "all else is up" not in process.stderr.readline():
            assert process.poll() is None
        assert online(trial) == ["node1"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 1
    assert not trial.pid("host")


def test_a_context_in_use_stays_in_use(trial: Trial) -> None:
    contexts.save(contexts.Context("lab", "http://lab.example:8000", "kht_x"))
    said = trial.kohakud("up", "--detach", "--runners", "0")
    assert contexts.load().current == "lab"
    assert "kohaku context use local" in said
    assert trial.call("whoami")["role"] == "admin"


def test_two_ups_at_once_make_one_cluster(trial: Trial) -> None:
    with trial.popen("up", "--detach") as one, trial.popen("up", "--detach") as other:
        said = [process.communicate(timeout=60) for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), said
    assert said[0][0] == said[1][0]


def test_the_state_of_a_home_is_readable_json(trial: Trial) -> None:
    trial.kohakud("up", "--detach", "--runners", "0")
    kept = json.loads((trial.home.root / "up.json").read_text())
    assert kept["picked"]
    assert kept["runners"] == 0
