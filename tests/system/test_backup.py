"""A host that was lost comes back from a backup made while it worked: with real daemons."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from tests.system.homes import Home, wait_for

SAYS = ("sh", "-c", "echo launched; sleep 600")


def launches(home: Home, task: str) -> int:
    """Count the launches of a task by what they wrote: each attempt has logs of its own."""
    logs = [path for path in home.folder.rglob("*stdout") if path.is_file()]
    return sum(path.read_text().count("launched") for path in logs if task in str(path))


def processes_of(task: str) -> list[int]:
    """Find a task's processes by their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended
            if f"KOHAKU_TASK_ID={task}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def lose_host(home: Home, until: str) -> Path:
    """kill -9 the host, and take its folder away as a broken disk would."""
    home.kill("host")
    data = home.folder / "data/host"
    data.rename(data.with_name(until))
    return data


def test_a_lost_host_comes_back_and_launches_nothing_twice(own_home: Home, tmp_path: Path) -> None:
    home = own_home
    runs = home.kohaku("task", "submit", "-c", "1", "--", *SAYS)
    home.wait_state(runs, "running")
    # Fills the node, so that what comes next waits when the backup is made.
    cores = home.json("node", "show", "node1")["inventory"]["cores"]
    fills = home.kohaku("task", "submit", "-c", str(len(cores) - 1), "--", "sleep", "600")
    home.wait_state(fills, "running")
    waits = home.kohaku("task", "submit", "-c", "1", "--", *SAYS)
    assert home.state(waits) == "queued"

    done = home.run("kohakud", "backup", str(tmp_path / "b.tar"))
    assert done.code == 0, done
    assert done.out == f"{tmp_path / 'b.tar'}\n"

    # Life goes on, and the backup does not know.
    home.kohaku("task", "kill", fills)
    home.wait_state(waits, "running")
    later = home.kohaku("task", "submit", "-c", "0", "--", "true")
    home.wait_state(later, "completed")
    wait_for(lambda: launches(home, waits) == 1, "the task to be launched")

    refused = home.run("kohakud", "restore", str(tmp_path / "b.tar"))
    assert refused.code == 1
    assert "already runs as process" in refused.err
    data = lose_host(home, "host.lost")
    restored = home.run("kohakud", "restore", str(tmp_path / "b.tar"))
    assert restored.code == 0, restored
    assert restored.out == f"{data}\n"
    home.up()

    node = home.json("node", "show", "node1")
    assert (node["state"], node["draining"]) == ("online", True), "with the credential it had"
    assert home.state(runs) == "running"
    assert home.state(waits) == "queued"
    assert home.run("kohaku", "task", "show", later).code == 1
    assert launches(home, runs) == launches(home, waits) == 1
    again = home.run("kohakud", "restore", str(tmp_path / "b.tar"))
    assert again.code == 1

    # New ids are new, whatever was given after the backup.
    fresh = home.kohaku("task", "submit", "-c", "0", "--", "true")
    assert fresh not in {runs, fills, waits, later}
    assert home.state(fresh) == "queued", "nodes drain"

    home.kohaku("task", "kill", runs)
    home.wait_state(runs, "killed")
    assert home.run("kohaku", "task", "kill", waits).code == 0
    home.kohaku("node", "undrain", "node1")
    assert home.run("kohaku", "task", "wait", fresh, "--timeout", "30").code == 0
    assert launches(home, waits) == 1, "what was given up is not launched again"
    assert processes_of(waits), "and what it left on its node runs until that registers again"
    home.kill("runner-node1")
    home.up()
    wait_for(lambda: not processes_of(waits), "the task to be ended on its node")
    events = [event["kind"] for event in home.json("events", "--limit", "100")["events"]]
    assert "cluster.restored" in events


def test_a_host_moves_to_another_folder_and_takes_up_work_at_once(
    own_home: Home, tmp_path: Path
) -> None:
    home = own_home
    home.kohaku("node", "drain", "node1")
    waits = home.kohaku("task", "submit", "-c", "0", "--", "echo", "after the move")
    home.kohaku("node", "undrain", "node1")
    assert home.run("kohaku", "task", "wait", waits, "--timeout", "30").code == 0
    home.kohaku("node", "drain", "node1")
    waits = home.kohaku("task", "submit", "-c", "0", "--", "echo", "after the move")
    assert home.run("kohakud", "down").code == 0
    backup = tmp_path / "b.tar"
    assert home.run("kohakud", "backup", str(backup)).code == 0
    shutil.rmtree(home.folder / "data/host")
    (home.folder / "data/up.json").unlink()
    restored = home.run("kohakud", "restore", str(backup), "--resume")
    assert restored.code == 0, restored
    home.up()
    home.kohaku("node", "undrain", "node1")
    assert home.run("kohaku", "task", "wait", waits, "--timeout", "30").code == 0
    assert home.kohaku("task", "logs", waits) == "after the move"
    assert home.json("task", "show", waits)["attempt"] == 1


def test_backups_under_load_all_come_back(own_home: Home, tmp_path: Path) -> None:
    """Backups while tasks come and go: each opens, and knows a prefix of what was accepted."""
    home = own_home
    ids: list[str] = []
    counts = []
    for number in range(4):
        ids += home.kohaku("task", "submit", "-c", "0", "--array", "30", "--", "true").split()
        path = tmp_path / f"{number}.tar"
        assert home.run("kohakud", "backup", str(path)).code == 0
        counts.append(len(ids))
    home.kill("host")
    for number, count in enumerate(counts):
        other = Home(tmp_path / f"home-{number}")
        restored = other.run("kohakud", "restore", str(tmp_path / f"{number}.tar"))
        assert restored.code == 0, restored
        (other.folder / "data/up.json").unlink()  # its port is the first host's
        other.up(runners=0)
        try:
            listed = other.json("task", "list", "--all", "--limit", "500")["tasks"]
            assert sorted(task["id"] for task in listed) == sorted(ids[:count])
            settings = json.loads((other.folder / "data/up.json").read_text())
            assert settings.get("runners", 1) == 0
        finally:
            other.down()
