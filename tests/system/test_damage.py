"""Stores that were cut, lost or written by a later version, under the real daemons.

Each gets a refusal that names the file, or a clean recovery; never a traceback, and what was
refused is left as it is.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.core.cluster.records import PutDocument
from kohaku_daemon.store.pair import open_pair
from kohaku_daemon.store.tasks import Group, TaskStore, batch_row, task_row
from kohaku_daemon.store.vault import Vault
from protocol.ids import TaskId
from protocol.models.access import Role
from tests.kohaku_daemon.store.make_samples import BATCH, ENDED, NODE, WAITING
from tests.support.host import TOKENS, a_token_record
from tests.system.homes import Home

Harm = Callable[[Path], None]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_a_little(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def lose(path: Path) -> None:
    path.unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def newer_database(path: Path) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def nonsense_in_a_record(path: Path) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE tasks SET record = x'c1c1c1' WHERE state = 'queued'")
    connection.close()


def overwrite_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3 * 4096 : 4 * 4096] = os.urandom(4096)
    path.write_bytes(data)


def text(content: str) -> Harm:
    def write(path: Path) -> None:
        path.write_text(content)

    return write


def change(old: str, new: str) -> Harm:
    def write(path: Path) -> None:
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))

    return write


META = '{"meta": {"1": {"schema": 1, "cluster": "1"%s}}%s}'

OF_THE_HOST = [
    ("tasks.sqlite", cut, "is damaged|malformed"),
    ("tasks.sqlite", cut_a_little, "is damaged|malformed"),
    ("tasks.sqlite", garbage, "is not a database"),
    ("tasks.sqlite", empty, "is empty, and .*cluster.json"),
    ("tasks.sqlite", lose, "is missing, and .*cluster.json"),
    ("tasks.sqlite", become_a_folder, "directory"),
    ("tasks.sqlite", newer_database, "has schema version 99"),
    ("tasks.sqlite", nonsense_in_a_record, "a record makes no sense"),
    ("tasks.sqlite", overwrite_a_page, "is damaged|malformed"),
    ("cluster.json", cut, "is damaged"),
    ("cluster.json", garbage, "is damaged"),
    ("cluster.json", empty, "is damaged"),
    ("cluster.json", lose, "is missing, and .*tasks.sqlite"),
    ("cluster.json", become_a_folder, "Is a directory"),
    ("cluster.json", text("null"), "is damaged"),
    ("cluster.json", text("[" * 100_000), "is damaged"),
    ("cluster.json", text('"\\ud800"'), "is damaged"),
    ("cluster.json", text(META % ("", ', "nodes": 5')), "is damaged"),
    ("cluster.json", text(META % ("", ', "nodes": {"1": {"name": "a\\ud800"}}')), "is damaged"),
    ("cluster.json", text(META % (', "epoch": "x"', "")), "is damaged"),
    ("cluster.json", change('"schema": 2', '"schema": "2"'), "is damaged"),
    ("cluster.json", change('"schema": 2', '"schema": -1'), "is damaged"),
    ("cluster.json", change('"schema": 2', '"schema": 99'), "has schema version 99"),
    ("cluster.json", change('"joined_at":', '"joined_at": "now", "x":'), "makes no sense"),
]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home of its own with a host that was stopped, and nothing that runs."""
    home = Home(tmp_path / "home")
    data = home.folder / "data/host"
    data.mkdir(parents=True)
    pair = open_pair(data, new_cluster="77")
    token = TOKENS[Role.ADMIN]
    (data / "admin.token").write_text(token)
    pair.documents.apply([PutDocument(NODE), PutDocument(a_token_record(token, Role.ADMIN))])
    ended = [
        task_row(msgspec.structs.replace(ENDED, id=TaskId(2000 + number))) for number in range(50)
    ]
    pair.tasks.write(Group([batch_row(BATCH)], [task_row(WAITING), *ended]))
    pair.tasks.close()
    return home


def contents(folder: Path) -> dict[str, bytes]:
    # What SQLite lays beside a file while it looks at it may stay; it says nothing.
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith(("-shm", ".lock"))
        if not (path.name.endswith("-wal") and path.stat().st_size == 0)
    }


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    OF_THE_HOST,
    ids=[f"{name}-{number}" for number, (name, _, _) in enumerate(OF_THE_HOST)],
)
def test_a_host_refuses_what_it_cannot_trust(name: str, harm: Harm, words: str, home: Home) -> None:
    data = home.folder / "data/host"
    harm(data / name)
    before = contents(data)
    done = home.run("kohakud", "host", "--listen", "127.0.0.1:0")
    assert done.code == 1, done
    told = [line for line in done.err.splitlines() if line.startswith("kohakud: ")]
    assert len(told) == 1, done.err
    assert str(data / name) in told[0]
    assert any(word in told[0] for word in words.replace(".*", "|").split("|")), told[0]
    assert "Traceback" not in done.err
    assert contents(data) == before, "it was left as it is"


def test_a_host_goes_on_from_what_its_log_kept(home: Home, tmp_path: Path) -> None:
    """kill -9 and a log that lost its end: what was committed before the cut is there."""
    data = home.folder / "data/host"
    store = TaskStore.open(data / "tasks.sqlite")
    for number in range(10):
        task = msgspec.structs.replace(ENDED, id=TaskId(3000 + number))
        store.write(Group(tasks=[task_row(task)]))
    left = tmp_path / "left"
    left.mkdir()
    for name in ("tasks.sqlite", "tasks.sqlite-wal"):
        shutil.copy(data / name, left)
    store.close()
    for path in data.glob("tasks.sqlite*"):
        path.unlink()
    for path in left.iterdir():
        shutil.copy(path, data)
    cut(data / "tasks.sqlite-wal")
    home.up(runners=0)
    try:
        listed = home.json("task", "list", "--all", "--limit", "100")["tasks"]
    finally:
        home.down()
    ids = [int(task["id"]) for task in listed]
    newest = sorted(number for number in ids if number >= 3000)
    assert newest == list(range(3000, 3000 + len(newest)))
    assert 0 < len(newest) < 10
    assert len([number for number in ids if number < 3000]) == 51


OF_A_RUNNER = [
    (cut, "vault.sqlite"),
    (garbage, "is not a database"),
    (newer_database, "has schema version 99"),
    (become_a_folder, "directory"),
]


@pytest.mark.parametrize(("harm", "words"), OF_A_RUNNER)
def test_a_runner_refuses_a_vault_it_cannot_trust(harm: Harm, words: str, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    data = home.folder / "data/runners/n1"
    data.mkdir(parents=True)
    vault = Vault.open(data / "vault.sqlite")
    vault.write({f"launch/{number}": bytes(900) for number in range(50)})
    vault.close()
    harm(data / "vault.sqlite")
    before = contents(data)
    done = home.run(
        "kohakud", "runner", "--name", "n1", "--data", str(data), "--host", "http://127.0.0.1:9"
    )
    assert done.code == 1, done
    assert str(data / "vault.sqlite") in done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert contents(data) == before


def test_a_vault_of_nonsense_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    data = home.folder / "data/runners/n1"
    data.mkdir(parents=True)
    vault = Vault.open(data / "vault.sqlite")
    vault.write({"launch/7-1": b"\xc1"})
    vault.close()
    done = home.run(
        "kohakud", "runner", "--name", "n1", "--data", str(data), "--host", "http://127.0.0.1:9"
    )
    assert done.code == 1, done
    assert "the vault's entry launch/7-1 cannot be read" in done.err
    assert "Traceback" not in done.err
