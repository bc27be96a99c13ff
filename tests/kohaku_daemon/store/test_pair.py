"""Both files or neither: what was lost is told, and a new one never takes its place."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from kohaku_daemon.core.cluster.records import PutDocument
from kohaku_daemon.store.pair import examine_pair, open_pair, reading_records
from kohaku_daemon.store.tasks import Group, batch_row, task_row
from protocol.errors import Unavailable, Unsupported
from tests.kohaku_daemon.store.make_samples import BATCH, NODE, WAITING


def make(folder: Path, *, nodes: bool = True, tasks: bool = True) -> None:
    pair = open_pair(folder, new_cluster="77")
    if nodes:
        pair.documents.apply([PutDocument(NODE)])
    if tasks:
        pair.tasks.write(Group([batch_row(BATCH)], [task_row(WAITING)]))
    pair.tasks.close()


def contents(folder: Path) -> dict[str, bytes]:
    """What is there, but for what SQLite lays beside a file for as long as somebody reads it."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.endswith(("-shm", "-wal"))
    }


def test_what_was_made_is_found_again(tmp_path: Path) -> None:
    make(tmp_path)
    assert examine_pair(tmp_path).cluster == "77"
    pair = open_pair(tmp_path, new_cluster="78")
    assert pair.documents.read().cluster == "77"
    assert list(pair.tasks.live_tasks()) == [WAITING]
    pair.tasks.close()


def test_a_lost_cluster_json_is_not_replaced_by_a_new_cluster(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "cluster.json").unlink()
    with pytest.raises(Unavailable, match=r"cluster\.json is missing, and .*tasks\.sqlite"):
        open_pair(tmp_path, new_cluster="78")
    assert os.listdir(tmp_path) == ["tasks.sqlite"]


@pytest.mark.parametrize("left", ["missing", "empty"])
def test_lost_tasks_are_not_replaced_by_none(left: str, tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "tasks.sqlite").unlink()
    if left == "empty":
        (tmp_path / "tasks.sqlite").touch()
    before = contents(tmp_path)
    with pytest.raises(Unavailable, match=rf"tasks\.sqlite is {left}, and .*cluster\.json"):
        open_pair(tmp_path, new_cluster="78")
    assert contents(tmp_path) == before


def test_a_first_start_killed_between_both_begins_again(tmp_path: Path) -> None:
    make(tmp_path, nodes=False, tasks=False)
    (tmp_path / "cluster.json").unlink()
    make(tmp_path)
    assert examine_pair(tmp_path).cluster == "77"


def test_newer_tasks_are_refused_before_the_cluster_is_migrated(tmp_path: Path) -> None:
    make(tmp_path)
    connection = sqlite3.connect(tmp_path / "tasks.sqlite", isolation_level=None)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    older = (tmp_path / "cluster.json").read_text().replace('"schema": 2', '"schema": 0')
    (tmp_path / "cluster.json").write_text(older)
    before = contents(tmp_path)
    with pytest.raises(Unsupported, match=r"tasks\.sqlite has schema version 99"):
        open_pair(tmp_path, new_cluster="78")
    assert contents(tmp_path) == before


def test_a_newer_cluster_is_refused_before_the_tasks_are_touched(tmp_path: Path) -> None:
    make(tmp_path)
    newer = (tmp_path / "cluster.json").read_text().replace('"schema": 2', '"schema": 99')
    (tmp_path / "cluster.json").write_text(newer)
    before = contents(tmp_path)
    with pytest.raises(Unsupported, match=r"cluster\.json has schema version 99"):
        open_pair(tmp_path, new_cluster="78")
    assert contents(tmp_path) == before


def test_a_record_of_no_sense_is_told_of_the_file(tmp_path: Path) -> None:
    make(tmp_path)
    connection = sqlite3.connect(tmp_path / "tasks.sqlite", isolation_level=None)
    connection.execute("UPDATE tasks SET record = x'c1c1'")
    connection.close()
    pair = open_pair(tmp_path, new_cluster="78")
    with (
        pytest.raises(Unavailable, match=r"tasks\.sqlite is damaged: a record makes no sense"),
        reading_records(tmp_path),
    ):
        list(pair.tasks.live_tasks())
    pair.tasks.close()


def test_the_epoch_grows_and_stays(tmp_path: Path) -> None:
    make(tmp_path)
    for epoch in (1, 2):
        pair = open_pair(tmp_path, new_cluster="78")
        pair.documents.raise_epoch()
        pair.tasks.close()
        pair = open_pair(tmp_path, new_cluster="78")
        assert pair.documents.read().epoch == epoch
        assert pair.documents.read().nodes == {NODE.name: NODE}
        pair.tasks.close()
