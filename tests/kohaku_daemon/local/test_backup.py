"""A backup is whole, agrees with itself while the host writes, and never half there."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.core.cluster.records import DropDocument, NodeRecord, PutDocument
from kohaku_daemon.local import pidfiles
from kohaku_daemon.local.archive import Manifest, read_manifest, unpack, verify, write_archive
from kohaku_daemon.local.backup import backup
from kohaku_daemon.store.database import copy_database
from kohaku_daemon.store.documents import Glance, examine
from kohaku_daemon.store.pair import Pair, open_pair
from kohaku_daemon.store.tasks import Group, batch_row, task_row
from protocol.errors import Conflict, KohakuError, NotFound, Unavailable, Unsupported
from protocol.ids import NodeName, TaskId
from tests.kohaku_daemon.store.make_samples import BATCH, ENDED, NODE, TOKEN, WAITING


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("KOHAKU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def data(home: Path) -> Path:
    """The folder of a host that was stopped."""
    folder = home / "data/host"
    folder.mkdir(mode=0o700, parents=True)
    pair = open_pair(folder, new_cluster="77")
    pair.documents.apply([PutDocument(NODE), PutDocument(TOKEN)])
    pair.tasks.write(Group([batch_row(BATCH)], [task_row(ENDED), task_row(WAITING)]))
    pair.tasks.close()
    (folder / "admin.token").write_text("kht_secret\n")
    return folder


def names(path: Path) -> list[str]:
    return [entry.name for entry in read_manifest(path).files]


def test_it_holds_all_that_belongs_to_a_host_and_nothing_that_passes(
    data: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "config").mkdir()
    (home / "config/host.toml").write_text("port = 8000\n")
    (home / "data/up.json").write_text("{}")
    (data / "host.key").write_text("of a later version")
    for passing in ("host.pid", "host.url", "tasks.sqlite-shm", ".cluster.json.new"):
        (data / passing).write_text("")
    (data / "a folder").mkdir()
    (data / "environments").mkdir()
    (data / "link").symlink_to("/etc/passwd")
    target = tmp_path / "b.tar"
    assert backup(target, {}) == 0
    said = capsys.readouterr()
    assert said.out == f"{target}\n"
    assert "left out, as no part of the host: a folder, link\n" in said.err
    assert f"packed environments are not in it: keep a copy of {data / 'environments'}" in said.err
    assert names(target) == [
        "host/tasks.sqlite", "host/cluster.json", "host/admin.token", "host/host.key",
        "config/host.toml", "home/up.json",
    ]  # fmt: skip
    manifest = verify(target)
    assert (manifest.cluster, manifest.host_ran) == ("77", False)
    assert manifest.schemas == {"tasks.sqlite": 1, "cluster.json": 2}
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_folder_gets_a_file_named_by_the_time(data: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    backup(tmp_path / "kept", {})
    (path,) = (tmp_path / "kept").iterdir()
    assert path.name.startswith("kohaku-backup-2")
    assert path.suffix == ".tar"


def test_it_changes_nothing_of_the_cluster(data: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    backup(tmp_path / "b.tar", {})
    after = {path.name: path.read_bytes() for path in data.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() <= {"tasks.sqlite-shm", "tasks.sqlite-wal"}


def test_what_is_there_is_not_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_text("mine")
    with pytest.raises(Conflict, match=r"b\.tar exists already"):
        backup(tmp_path / "b.tar", {})
    assert (tmp_path / "b.tar").read_text() == "mine"


def test_no_cluster_no_folder_no_backup(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"there is no cluster in .*/home/data/host"):
        backup(tmp_path / "b.tar", {})
    (home / "data/host").mkdir(parents=True)
    (home / "data/host/cluster.json").write_text("{}")
    with pytest.raises(NotFound, match=r"there is no folder .*/absent"):
        backup(tmp_path / "absent" / "b.tar", {})


def damage_tasks(data: Path) -> None:
    path = data / "tasks.sqlite"
    path.write_bytes(path.read_bytes()[:9000])


def newer_tasks(data: Path) -> None:
    connection = sqlite3.connect(data / "tasks.sqlite", isolation_level=None)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def halve_cluster(data: Path) -> None:
    path = data / "cluster.json"
    path.write_bytes(path.read_bytes()[:300])


def lose_cluster(data: Path) -> None:
    (data / "cluster.json").unlink()


def lose_tasks(data: Path) -> None:
    (data / "tasks.sqlite").unlink()


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (damage_tasks, Unavailable, "host/tasks.sqlite (failed|is damaged)"),
        (newer_tasks, Unsupported, "host/tasks.sqlite has schema version 99"),
        (halve_cluster, Unavailable, "host/cluster.json is damaged"),
        (lose_cluster, Unavailable, "host/cluster.json is missing"),
        (lose_tasks, Unavailable, "host/tasks.sqlite is missing"),
    ],
)
def test_a_damaged_cluster_makes_no_backup_and_the_file_is_named(
    harm: object, kind: type[KohakuError], words: str, data: Path, tmp_path: Path
) -> None:
    assert callable(harm)
    harm(data)
    with pytest.raises(kind, match=words):
        backup(tmp_path / "b.tar", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 30_000, 55_000])
def test_a_disk_that_is_full_leaves_nothing_behind(size: int, data: Path, tmp_path: Path) -> None:
    with files_of_at_most(size), pytest.raises(Unavailable):
        backup(tmp_path / "b.tar", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    assert backup(tmp_path / "b.tar", {}) == 0


def test_a_backup_that_reads_back_otherwise_is_thrown_away(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def and_turn_a_bit(path: Path, manifest: Manifest, files: Mapping[str, Path]) -> Manifest:
        made = write_archive(path, manifest, files)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return made

    monkeypatch.setattr("kohaku_daemon.local.backup.write_archive", and_turn_a_bit)
    with pytest.raises(Unavailable, match="is not what was written"):
        backup(tmp_path / "b.tar", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_a_running_host_is_noted(data: Path, tmp_path: Path) -> None:
    # By another process: a record lock does not stand in its holder's own way.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with pidfiles.hold(data / "host.pid", "host"):
            os.write(writing, b"x")
            signal.pause()
    try:
        assert os.read(reading, 1) == b"x"
        backup(tmp_path / "b.tar", {})
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    assert read_manifest(tmp_path / "b.tar").host_ran


class Writer:
    """Writes as the host does: a node into cluster.json, then a task that is on it."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._stop = threading.Event()
        self._written = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            name = NodeName(f"n{number}")
            self._pair.documents.apply([PutDocument(NodeRecord(name=name, credential=str(number)))])
            task = msgspec.structs.replace(ENDED, id=TaskId(2000 + number), node=name)
            self._pair.tasks.write(Group(tasks=[task_row(task)]))
            self._written.release()
            if number > 20:
                self._pair.documents.apply([DropDocument(NodeRecord, f"n{number - 20}")])

    def wait(self) -> None:
        """Wait until it has written both files from now on."""
        while self._written.acquire(blocking=False):
            pass
        for _ in range(2):  # the first may have been under way
            assert self._written.acquire(timeout=10)

    def stop(self) -> None:
        self._stop.set()
        self.thread.join()


def test_both_files_agree_however_busy_the_host_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(data, new_cluster="78")
    writer = Writer(pair)

    def copy_later(source: Path, target: Path) -> None:
        writer.wait()  # the host goes on before each of the files is read
        copy_database(source, target)

    def read_later(path: Path) -> Glance | None:
        writer.wait()
        return examine(path)

    monkeypatch.setattr("kohaku_daemon.local.backup.copy_database", copy_later)
    writer.thread.start()
    paths = [tmp_path / f"{number}.tar" for number in range(4)]
    try:
        with monkeypatch.context() as patch:
            patch.setattr("kohaku_daemon.store.documents.examine", read_later)
            for path in paths:
                backup(path, {})
    finally:
        writer.stop()
        pair.tasks.close()
    newest = []
    for path in paths:
        out = path.with_suffix("")
        out.mkdir()
        unpack(path, out)
        copied = open_pair(out / "host", new_cluster="78")
        tasks = copied.tasks.page(limit=1000)
        nodes = copied.documents.read().nodes
        last = max((task for task in tasks if task.id > 2000), key=lambda task: task.id)
        assert last.node in nodes, "the newest task's node was written before it"
        newest.append(last.id)
        copied.tasks.close()
    assert newest == sorted(newest)
    assert newest[-1] > newest[0], "the writer wrote meanwhile"


def test_the_manifest_is_json_for_people(data: Path, tmp_path: Path) -> None:
    backup(tmp_path / "b.tar", {})
    with tarfile.open(tmp_path / "b.tar") as tar:
        file = tar.extractfile("manifest.json")
        assert file is not None
        text = file.read()
    assert json.loads(text)["program"]
    assert text.count(b"\n") > 10
