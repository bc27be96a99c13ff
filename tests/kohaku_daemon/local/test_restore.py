"""A host comes back whole or not at all, replaces nothing, and believes no more than it may."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.core.cluster.records import PutDocument
from kohaku_daemon.core.cluster.restoring import ATTEMPTS_APART
from kohaku_daemon.host import config as host_config
from kohaku_daemon.local import archive, pidfiles
from kohaku_daemon.local import restore as restore_module
from kohaku_daemon.local.backup import backup
from kohaku_daemon.local.restore import restore
from kohaku_daemon.store.pair import Pair, open_pair
from kohaku_daemon.store.tasks import Group, batch_row, task_row
from protocol.errors import Conflict, KohakuError, NotFound, Unavailable, Unsupported
from protocol.ids import TaskId
from protocol.models.task import TaskState
from tests.kohaku_daemon.store.make_samples import BATCH, ENDED, JOIN_TOKEN, NODE, TOKEN, WAITING

OPEN_NODE = msgspec.structs.replace(NODE, draining=False)
ORDERED = msgspec.structs.replace(
    ENDED, id=TaskId(1003), state=TaskState.ASSIGNED, exit=None, ended_at=0.0
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("KOHAKU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def data(home: Path) -> Path:
    return home / "data/host"


@pytest.fixture
def saved(home: Path, data: Path, tmp_path: Path) -> Path:
    """A backup of a host that was stopped; its folder is aside, its settings are gone."""
    data.mkdir(mode=0o700, parents=True)
    pair = open_pair(data, new_cluster="77")
    pair.documents.apply([PutDocument(OPEN_NODE), PutDocument(TOKEN), PutDocument(JOIN_TOKEN)])
    tasks = [task_row(task) for task in (ENDED, WAITING, ORDERED)]
    pair.tasks.write(Group([batch_row(BATCH)], tasks))
    pair.tasks.close()
    (data / "admin.token").write_text("kht_secret\n")
    (home / "config").mkdir()
    (home / "config/host.toml").write_text("heartbeat = 5\n")
    (home / "data/up.json").write_text('{"runners":3}')
    path = tmp_path / "b.tar"
    backup(path, {})
    data.rename(data.with_name("host.old"))
    (home / "config/host.toml").unlink()
    (home / "data/up.json").unlink()
    return path


def opened(data: Path) -> Pair:
    return open_pair(data, new_cluster="other")


def test_everything_is_back_where_it_was(saved: Path, data: Path, home: Path) -> None:
    assert restore(saved, {}) == 0
    assert (data / "admin.token").read_text() == "kht_secret\n"
    assert (home / "config/host.toml").read_text() == "heartbeat = 5\n"
    assert (home / "data/up.json").read_text() == '{"runners":3}'
    pair = opened(data)
    book = pair.documents.read()
    assert book.cluster == "77"
    assert book.tokens == {TOKEN.digest: TOKEN}
    assert book.nodes[NODE.name].credential == NODE.credential
    assert pair.tasks.task(ENDED.id) == ENDED
    assert pair.tasks.batch(BATCH.id) == BATCH
    pair.tasks.close()
    assert {path.stat().st_mode & 0o777 for path in data.iterdir()} == {0o600}
    assert data.stat().st_mode & 0o777 == 0o700
    assert sorted(os.listdir(data.parent)) == ["host", "host.old", "up.json"]


def test_nothing_that_may_have_been_overtaken_is_believed(saved: Path, data: Path) -> None:
    restore(saved, {})
    pair = opened(data)
    book = pair.documents.read()
    assert book.epoch == 1
    assert all(node.draining for node in book.nodes.values())
    assert book.join_tokens == {}
    waiting, ordered = (pair.tasks.task(task.id) for task in (WAITING, ORDERED))
    assert waiting is not None
    assert ordered is not None
    assert (waiting.state, waiting.attempt) == (TaskState.QUEUED, 0)
    assert (ordered.state, ordered.attempt) == (TaskState.PREPARING, 1)
    assert waiting.doubted == ATTEMPTS_APART
    (event,) = [event for event in pair.tasks.events() if event.kind == "cluster.restored"]
    assert "nodes drain" in event.text
    pair.tasks.close()
    connection = sqlite3.connect(data / "tasks.sqlite")
    assert connection.execute("SELECT actor, method, subject FROM audit").fetchall() == [
        ("kohakud restore", "restore", "b.tar")
    ]
    connection.close()


def test_a_host_that_was_stopped_may_go_on_at_once(saved: Path, data: Path) -> None:
    restore(saved, {}, resume=True)
    pair = opened(data)
    book = pair.documents.read()
    assert book.epoch == 1, "ids still differ: nobody can know"
    assert book.nodes == {NODE.name: OPEN_NODE}
    assert book.join_tokens == {JOIN_TOKEN.digest: JOIN_TOKEN}
    assert list(pair.tasks.live_tasks()) == [WAITING, ORDERED]
    pair.tasks.close()


def test_going_on_at_once_is_refused_of_a_host_that_ran(
    saved: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = archive.read_manifest(saved)
    ran = msgspec.structs.replace(manifest, host_ran=True)
    monkeypatch.setattr(restore_module, "read_manifest", lambda _: ran)
    with pytest.raises(Conflict, match="was made while the host ran"):
        restore(saved, {}, resume=True)
    assert not data.exists()


def test_a_clock_behind_the_backup_is_refused(
    saved: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = archive.read_manifest(saved)
    later = msgspec.structs.replace(manifest, made_at=manifest.made_at + 3600)
    monkeypatch.setattr(restore_module, "read_manifest", lambda _: later)
    with pytest.raises(Conflict, match="and here it is"):
        restore(saved, {})


def test_a_cluster_that_is_there_is_not_replaced(saved: Path, data: Path) -> None:
    restore(saved, {})
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(
        Conflict, match=r"is not empty: it has admin\.token, cluster\.json"
    ) as caught:
        restore(saved, {})
    assert f"mv {data} {data}.old" in caught.value.hint
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_what_a_killed_host_leaves_is_not_in_the_way(saved: Path, data: Path) -> None:
    data.mkdir()
    (data / "host.pid").write_text("1\n")
    (data / "host.url").write_text("http://127.0.0.1:1\n")
    restore(saved, {})
    assert sorted(os.listdir(data)) == ["admin.token", "cluster.json", "tasks.sqlite"]


def test_a_host_that_runs_is_not_restored_under(saved: Path, data: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with pidfiles.hold(data / "host.pid", "host"):
            os.write(writing, b"x")
            signal.pause()
    try:
        assert os.read(reading, 1) == b"x"
        with pytest.raises(Conflict, match=rf"already runs as process {child}") as refused:
            restore(saved, {})
        # This is the folder of up's host too, whose runners would stay without it.
        assert f"kill {child}" in refused.value.hint
        assert "kohakud down" in refused.value.hint
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    restore(saved, {})


def test_settings_that_are_there_are_kept_and_obeyed(
    saved: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (home / "config/host.toml").write_text(f'data = "{elsewhere}"\n')
    restore(saved, {})
    said = capsys.readouterr()
    assert said.out == f"{elsewhere}\n"
    assert "host.toml was left as it is; the backup has another one" in said.err
    assert (elsewhere / "cluster.json").exists()
    assert not (home / "data/up.json").exists(), "no home of `up` is there"


def test_settings_of_the_backup_say_where_the_host_will_look(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pair = open_pair(elsewhere, new_cluster="77")
    pair.tasks.close()
    (home / "config").mkdir(parents=True)
    (home / "config/host.toml").write_text(f'data = "{elsewhere}"\n')
    backup(tmp_path / "b.tar", {})
    elsewhere.rename(tmp_path / "old")
    (home / "config/host.toml").unlink()
    restore(tmp_path / "b.tar", {})
    assert capsys.readouterr().out.endswith(f"{elsewhere}\n")
    assert host_config.load({}, file=host_config.default_file()).data == elsewhere
    assert (elsewhere / "tasks.sqlite").exists()


def test_a_damaged_backup_puts_nothing_in_place(saved: Path, data: Path, home: Path) -> None:
    torn = bytearray(saved.read_bytes())
    torn[len(torn) // 2] ^= 1
    saved.write_bytes(torn)
    with pytest.raises(Unavailable, match=r"the backup .*b\.tar is damaged"):
        restore(saved, {})
    assert list(data.iterdir()) == []
    assert sorted(os.listdir(data.parent)) == ["host", "host.old"]
    assert not (home / "config/host.toml").exists()


def test_no_backup_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no backup"):
        restore(tmp_path / "absent", {})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("host/tasks.sqlite", r"tasks\.sqlite has schema version 99"),
        ("host/cluster.json", r"cluster\.json has schema version 99"),
    ],
)
def test_a_backup_of_a_newer_version_is_refused(
    section: str, words: str, saved: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    manifest = archive.unpack(saved, out)
    if section.endswith(".json"):
        path = out / section
        path.write_text(path.read_text().replace('"schema": 2', '"schema": 99'))
    else:
        connection = sqlite3.connect(out / section, isolation_level=None)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    newer = tmp_path / "newer.tar"
    archive.write_archive(
        newer, manifest, {entry.name: out / entry.name for entry in manifest.files}
    )
    with pytest.raises(Unsupported, match=words):
        restore(newer, {})
    assert list(data.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KohakuError, match=r"cannot write .*/file/host"):
        restore(saved, {"data": str(tmp_path / "file" / "host")})


KILLED = """
import os, sys
from pathlib import Path
from kohaku_daemon.local import restore
left = int(sys.argv[2])
def count(event, arguments):
    # Before each thing that touches the disk: kill -9 in front of every one of them in turn.
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "sqlite3.connect"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(count)
restore.restore(Path(sys.argv[1]), {})
"""


def test_kill_9_leaves_no_cluster_or_the_whole_one(saved: Path, data: Path) -> None:
    """Killed before each access to the disk in turn, until it gets through."""
    outcomes = []
    step = 0
    while True:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(saved), str(step)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        whole = (data / "cluster.json").exists()
        outcomes.append(whole)
        if whole:
            pair = opened(data)
            assert pair.documents.read().epoch == 1
            assert all(node.draining for node in pair.documents.read().nodes.values())
            assert all(task.doubted >= ATTEMPTS_APART for task in pair.tasks.live_tasks())
            pair.tasks.close()
            for path in data.iterdir():
                path.unlink()
            data.rmdir()
        else:
            assert not data.exists() or set(os.listdir(data)) <= {"host.pid"}
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        # The next steps by larger strides: most are the reading of Python's own modules.
        step += max(1, step // 12)
    assert outcomes[-1]
    assert outcomes == sorted(outcomes), "there is one instant of the restore"
    assert not all(outcomes)
    assert len(outcomes) > 20
