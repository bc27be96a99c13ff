"""``kohakud down --tasks`` where a node is away, with real daemons."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kohaku_daemon.local.home import Home
from tests.system.homes import BIN
from tests.system.homes import Home as Cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    home = Cluster(tmp_path / "home")
    with ExitStack() as stack:
        stack.callback(home.run, "kohakud", "down")
        home.up(runners=0)
        yield home


@contextmanager
def far_node(home: Cluster, data: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a node that is not of this home, as one on another machine."""
    data.mkdir(exist_ok=True)
    token = data / "join.token"
    if not token.exists():
        token.write_text(home.kohaku("node", "join-token"))
    url = (home.folder / "data/host/host.url").read_text().strip()
    with (data / "log").open("ab") as log:
        runner = subprocess.Popen(
            [
                BIN / "kohakud", "runner", "--name", "far", "--data", str(data / "runner"),
                "--host", url, "--join-token-file", str(token),
            ],
            env=home.environ(),
            stdin=subprocess.DEVNULL,
            stderr=log,
        )  # fmt: skip
    try:
        yield runner
    finally:
        runner.terminate()
        runner.wait(30)


def test_down_does_not_wait_for_a_node_that_is_away_and_says_so(
    cluster: Cluster, tmp_path: Path
) -> None:
    with far_node(cluster, tmp_path / "far") as runner:
        task = cluster.kohaku("task", "submit", "-c", "0", "--", "sleep", "300")
        cluster.wait_state(task, "running")
        os.kill(runner.pid, signal.SIGKILL)
        runner.wait()

    done = cluster.run("kohakud", "down", "--tasks")
    assert done.code == 0, done
    assert "tasks of nodes that are away end when these are back and the host runs: far" in done.out
    assert "all tasks have ended" not in done.out
    assert Home(cluster.folder / "data").recall().tasks_left

    # What was asked of it stands until it is back.
    cluster.up(runners=0)
    with far_node(cluster, tmp_path / "far"):
        cluster.wait_state(task, "killed")
        done = cluster.run("kohakud", "down", "--tasks")
    assert done.out == "stopped host\nall tasks have ended\n"
