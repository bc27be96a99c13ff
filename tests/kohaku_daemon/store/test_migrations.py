"""Files of every version of the store open, and one that is too new is refused untouched."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from kohaku_daemon.store import migrations
from kohaku_daemon.store.documents import Book, Documents
from kohaku_daemon.store.migrations import Tables, migrate_database, migrate_tables
from kohaku_daemon.store.tasks import TaskStore
from kohaku_daemon.store.vault import Vault
from protocol.errors import Unsupported
from tests.kohaku_daemon.store.make_samples import (
    BATCH,
    ENDED,
    ENVIRONMENT,
    EVENT,
    FOLDER,
    JOIN_TOKEN,
    NODE,
    REGISTRY,
    TOKEN,
    VAULT,
    WAITING,
)


def sample(name: str, into: Path) -> Path:
    return Path(shutil.copy(FOLDER / name, into))


@pytest.mark.parametrize("version", range(1, len(migrations.TASKS) + 1))
def test_tasks_of_every_version_are_read(version: int, tmp_path: Path) -> None:
    store = TaskStore.open(sample(f"tasks-v{version}.sqlite", tmp_path))
    assert store.page() == [WAITING, ENDED]
    assert list(store.live_tasks()) == [WAITING]
    assert store.by_request("alice", "request-1") == BATCH
    assert store.events() == [EVENT]
    store.close()


@pytest.mark.parametrize("version", range(1, len(migrations.CLUSTER) + 1))
def test_a_cluster_of_every_version_is_read(version: int, tmp_path: Path) -> None:
    documents = Documents.open(sample(f"cluster-v{version}.json", tmp_path), new_cluster="other")
    assert documents.read() == Book(
        cluster="4242",
        epoch=0,
        nodes={NODE.name: NODE},
        tokens={TOKEN.digest: TOKEN},
        join_tokens={JOIN_TOKEN.digest: JOIN_TOKEN},
        environments={ENVIRONMENT.name: ENVIRONMENT} if version > 1 else {},
        registries={REGISTRY.registry: REGISTRY} if version > 1 else {},
    )


@pytest.mark.parametrize("version", range(1, len(migrations.VAULT) + 1))
def test_a_vault_of_every_version_is_read(version: int, tmp_path: Path) -> None:
    vault = Vault.open(sample(f"vault-v{version}.sqlite", tmp_path))
    assert dict(vault.items()) == VAULT
    vault.close()


def open_cluster(path: Path) -> None:
    Documents.open(path, new_cluster="1")


def open_tasks(path: Path) -> None:
    TaskStore.open(path)


def open_vault(path: Path) -> None:
    Vault.open(path)


@pytest.mark.parametrize("open_file", [open_tasks, open_vault])
def test_a_newer_database_is_refused_with_both_versions(
    open_file: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "newer.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.execute("CREATE TABLE later (x)")
    connection.commit()
    connection.close()
    with pytest.raises(Unsupported, match=r"newer\.sqlite has schema version 99.* up to 1"):
        open_file(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("later",)]
    connection.close()


def test_a_newer_cluster_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"meta": {"1": {"schema": 99, "cluster": "1"}}, "nodes": {"1": {"a": 1}}}')
    before = path.read_bytes()
    with pytest.raises(Unsupported, match=r"schema version 99.* up to 2"):
        open_cluster(path)
    assert path.read_bytes() == before


def test_steps_run_once_each_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"

    def first(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE t (a)")
        connection.execute("INSERT INTO t VALUES (1)")

    def second(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE t ADD COLUMN b")
        connection.execute("UPDATE t SET b = a + 1")

    connection = sqlite3.connect(path, isolation_level=None)
    migrate_database(connection, [first], path)
    migrate_database(connection, [first, second], path)
    migrate_database(connection, [first, second], path)
    assert connection.execute("SELECT * FROM t").fetchall() == [(1, 2)]
    connection.close()


def test_a_step_that_fails_leaves_the_version_before(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (a)")
        connection.execute("no SQL")

    connection = sqlite3.connect(path, isolation_level=None)
    with pytest.raises(sqlite3.OperationalError):
        migrate_database(connection, [broken], path)
    assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    connection.close()


def test_steps_of_documents_run_from_the_version_found() -> None:
    tables: Tables = {"nodes": {"1": {"old": 5}}}

    def rename(tables: Tables) -> None:
        for document in tables["nodes"].values():
            document["new"] = document.pop("old")

    def never(tables: Tables) -> None:
        raise AssertionError

    assert migrate_tables(tables, 1, [never, rename], Path("cluster.json")) == 2
    assert tables == {"nodes": {"1": {"new": 5}}}
