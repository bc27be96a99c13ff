"""A host one version newer than its runners and clients works, and so it is the other way round.

The later programs are today's, made to speak one version more and to say more in every message.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from protocol.connection import Connection
from protocol.version import OLDEST_VERSION, PROTOCOL_VERSION
from tests.system.homes import Done, Home, wait_for

LATER: Final = str(Path(__file__).with_name("later.py"))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home in which nothing runs yet."""
    home = Home(tmp_path / "home")
    home.folder.mkdir(mode=0o755)
    yield home
    home.run("kohakud", "down")


@contextmanager
def running(home: Home, *arguments: str, oldest: int = OLDEST_VERSION) -> Iterator[Path]:
    """Run ``kohakud`` of a later version, and give the file of what it says."""
    log = home.folder / f"later-{arguments[0]}.log"
    with log.open("wb") as out:
        daemon = subprocess.Popen(
            [sys.executable, LATER, str(oldest), "kohakud", *arguments],
            env=home.environ(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        yield log
        assert daemon.poll() is None, log.read_text()
    finally:
        daemon.terminate()
        daemon.wait(20)


@contextmanager
def later_host(home: Home, *, oldest: int = OLDEST_VERSION) -> Iterator[str]:
    data = home.folder / "data/host"
    with running(home, "host", "--listen", "127.0.0.1:0", oldest=oldest) as log:
        wait_for((data / "host.url").exists, f"the host: {log.read_text()}")
        yield (data / "host.url").read_text().strip()


def later_kohaku(home: Home, *arguments: str) -> Done:
    done = subprocess.run(
        [sys.executable, LATER, str(OLDEST_VERSION), "kohaku", *arguments],
        env=home.environ(),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def admin_token(home: Home) -> str:
    return (home.folder / "data/host/admin.token").read_text().strip()


def use_everything(home: Home) -> None:
    """Submit, follow, wait, read, steer: each over what was agreed on."""
    done = home.run("kohaku", "task", "submit", "--follow", "--", "sh", "-c", "echo out; exit 7")
    assert (done.code, done.out.splitlines()[-1]) == (7, "out"), done
    ids = home.kohaku("task", "submit", "-c", "0", "--array", "3", "--", "sleep", "600").split()
    home.wait_state(ids[0], "running")
    home.kohaku("task", "pause", ids[0])
    home.wait_state(ids[0], "paused")
    home.kohaku("task", "resume", ids[0])
    home.kohaku("task", "kill", *ids)
    assert home.run("kohaku", "task", "wait", *ids, "--timeout", "30").code != 3
    assert {home.state(task) for task in ids} == {"killed"}
    assert [node["state"] for node in home.json("node", "list")["nodes"]] == ["online"]
    home.json("events")
    home.json("status")
    assert home.run("kohaku", "task", "show", "1").code == 1


async def test_a_host_one_version_newer_than_its_runners_and_clients(home: Home) -> None:
    with later_host(home) as url:
        home.up(runners=1)
        async with await Connection.dial(url, token=admin_token(home)) as connection:
            assert connection.welcome.version == PROTOCOL_VERSION
            assert "later" in connection.welcome.capabilities
        use_everything(home)
        home.kill("runner-node1")


def test_a_host_upgraded_while_tasks_run_gets_its_older_runner_back(home: Home) -> None:
    home.up(runners=1)
    task = home.kohaku("task", "submit", "--", "sh", "-c", "echo before; sleep 600")
    home.wait_state(task, "running")
    home.kill("host")
    (home.folder / "data/host/host.url").unlink()
    port = home.json("context", "list")["contexts"][0]["url"].rpartition(":")[2]
    with running(home, "host", "--listen", f"127.0.0.1:{port}"):
        wait_for((home.folder / "data/host/host.url").exists, "the later host")
        wait_for(
            lambda: home.json("node", "show", "node1")["state"] == "online", "the older runner"
        )
        shown = home.json("task", "show", task)
        assert (shown["state"], shown["attempt"]) == ("running", 1)
        assert home.kohaku("task", "logs", task) == "before"
        home.kohaku("task", "kill", task)
        home.wait_state(task, "killed")


def test_a_runner_and_a_client_that_were_upgraded_before_the_host(home: Home) -> None:
    home.up(runners=0)
    token = home.folder / "join.token"
    token.write_text(home.json("node", "join-token")["token"])
    url = (home.folder / "data/host/host.url").read_text().strip()
    flags = ("--name", "n1", "--host", url, "--join-token-file", str(token))
    with running(home, "runner", *flags):
        wait_for(lambda: bool(home.json("node", "list")["nodes"]), "the later runner")
        wait_for(lambda: home.json("node", "show", "n1")["state"] == "online", "it to be online")
        use_everything(home)
        done = later_kohaku(home, "task", "submit", "--follow", "--", "echo", "from later")
        assert (done.code, done.out.splitlines()[-1]) == (0, "from later"), done


def test_who_is_too_old_is_told_to_upgrade_and_its_tasks_go_on(home: Home) -> None:
    with later_host(home) as url:
        home.up(runners=1)
        task = home.kohaku("task", "submit", "--", "sleep", "600")
        home.wait_state(task, "running")
        port = url.rpartition(":")[2]
    # Its next version knows nothing of today's.
    flags = ("host", "--listen", f"127.0.0.1:{port}")
    with running(home, *flags, oldest=PROTOCOL_VERSION + 1):
        runner_log = home.folder / "data/logs/node1.log"
        wait_for(lambda: "is not spoken here" in runner_log.read_text(), "the runner's complaint")
        said = runner_log.read_text()
        assert f"protocol version {PROTOCOL_VERSION} is not spoken here" in said
        assert "upgrade this program" in said
        assert "Traceback" not in said
        done = home.run("kohaku", "status")
        assert done.code == 1
        assert "is not spoken here" in done.err
        assert "upgrade this program" in done.err
    with running(home, *flags):
        wait_for(lambda: home.run("kohaku", "status").code == 0, "the host")
        home.wait_state(task, "running")
        assert home.json("task", "show", task)["attempt"] == 1
        home.kohaku("task", "kill", task)
        home.wait_state(task, "killed")
