"""Files that were cut, filled with garbage or lost: refused as they are, or cleanly recovered."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.store import migrations
from kohaku_daemon.store.database import copy_database, examine, open_writer
from kohaku_daemon.store.tasks import Group, TaskStore, batch_row, task_row
from protocol.errors import Unavailable
from protocol.ids import TaskId
from tests.kohaku_daemon.store.make_samples import BATCH, ENDED

#: SQLite's file format, section 4.1 and 4.2: bytes of the log's header, and before each page.
WAL_HEADER = 32
FRAME_HEADER = 24
PAGE = 4096


def write_task(store: TaskStore, number: int) -> None:
    store.write(Group(tasks=[task_row(msgspec.structs.replace(ENDED, id=TaskId(number)))]))


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """Ten commits, as kill -9 leaves them: a short file, and all the rest in the log."""
    live = tmp_path / "live.sqlite"
    store = TaskStore.open(live)
    store.write(Group([batch_row(BATCH)]))
    for number in range(10):
        write_task(store, 2000 + number)
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(live, left / "tasks.sqlite")
    shutil.copy(f"{live}-wal", left / "tasks.sqlite-wal")
    store.close()
    return left / "tasks.sqlite"


def found(path: Path) -> list[int]:
    store = TaskStore.open(path)
    try:
        return sorted(task.id for task in store.page(limit=1000))
    finally:
        store.close()


def test_a_log_without_its_index_is_recovered(crashed: Path) -> None:
    assert not Path(f"{crashed}-shm").exists()
    assert found(crashed) == list(range(2000, 2010))


def cuts(size: int) -> Iterator[int]:
    """Places to cut a log: around every frame's end, and in the middle of header and page."""
    frame = FRAME_HEADER + PAGE
    for end in range(WAL_HEADER, size + 1, frame):
        yield from (end - 1, end, end + 1, end + FRAME_HEADER, end + frame // 2)


def test_a_log_cut_anywhere_keeps_a_prefix_of_the_commits(crashed: Path, tmp_path: Path) -> None:
    whole = Path(f"{crashed}-wal").read_bytes()
    kept = []
    for cut in sorted({0, 1, *(cut for cut in cuts(len(whole)) if cut <= len(whole))}):
        trial = tmp_path / f"cut-{cut}"
        trial.mkdir()
        path = Path(shutil.copy(crashed, trial))
        Path(f"{path}-wal").write_bytes(whole[:cut])
        there = found(path)
        assert there == list(range(2000, 2000 + len(there))), f"cut at {cut}"
        kept.append(len(there))
        shutil.rmtree(trial)
    assert kept == sorted(kept), "a longer log keeps no less"
    assert kept[0] == 0
    assert kept[-1] == 10
    assert len(set(kept)) == 11, "each commit is either kept or not"


def test_a_log_with_a_turned_bit_ends_there(crashed: Path) -> None:
    log = Path(f"{crashed}-wal")
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    there = found(crashed)
    assert there == list(range(2000, 2000 + len(there)))
    assert 0 < len(there) < 10


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A file without a log."""
    path = tmp_path / "tasks.sqlite"
    store = TaskStore.open(path)
    store.write(Group([batch_row(BATCH)]))
    for number in range(40):
        write_task(store, 2000 + number)
    store.close()
    return path


def test_a_file_cut_anywhere_is_refused_and_left_as_it_is(whole: Path) -> None:
    data = whole.read_bytes()
    for cut in range(1, len(data), 1000):
        whole.write_bytes(data[:cut])
        with pytest.raises(Unavailable, match=r"tasks\.sqlite (failed|is damaged)") as caught:
            TaskStore.open(whole)
        assert "kohakud restore" in caught.value.hint
        assert whole.read_bytes() == data[:cut]


@pytest.mark.parametrize("content", [os.urandom(9000), b"SQLite format 3\x00" + b"\xff" * 9000])
def test_garbage_is_refused_and_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite"
    path.write_bytes(content)
    with pytest.raises(Unavailable, match=r"tasks\.sqlite failed"):
        TaskStore.open(path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["tasks.sqlite"]


def test_pages_overwritten_by_others_are_found_at_the_start(whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    for page in range(2, len(data) // PAGE):
        torn = bytearray(data)
        torn[page * PAGE : page * PAGE + 64] = b"\xa5" * 64
        whole.write_bytes(torn)
        with pytest.raises(Unavailable, match=r"tasks\.sqlite"):
            TaskStore.open(whole)


def test_a_newer_file_with_a_log_is_refused_without_carrying_the_log_over(crashed: Path) -> None:
    connection = sqlite3.connect(crashed, isolation_level=None)
    connection.execute("PRAGMA user_version = 99")
    left = crashed.with_name("newer.sqlite")
    shutil.copy(crashed, left)
    shutil.copy(f"{crashed}-wal", f"{left}-wal")
    connection.close()
    before = left.read_bytes(), Path(f"{left}-wal").read_bytes()
    with pytest.raises(Exception, match="schema version 99"):
        TaskStore.open(left)
    assert (left.read_bytes(), Path(f"{left}-wal").read_bytes()) == before


def test_a_start_killed_while_it_made_the_file_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite"
    path.touch()
    assert examine(path, migrations.TASKS) == 0
    TaskStore.open(path).close()
    assert examine(path, migrations.TASKS) == len(migrations.TASKS)


def test_a_journal_that_was_left_is_undone_before_the_look(tmp_path: Path) -> None:
    """A first start switches to a log with a journal of the old kind; kill -9 may leave it."""
    path = tmp_path / "x.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA cache_spill = 1")
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("CREATE TABLE kv (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
    connection.execute("PRAGMA user_version = 1")
    connection.execute("BEGIN")
    for number in range(200):
        connection.execute("INSERT INTO kv VALUES (?, ?)", (str(number), bytes(1000)))
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(path, left)
    shutil.copy(f"{path}-journal", left)
    connection.close()
    writer = open_writer(left / "x.sqlite", migrations.VAULT)
    assert writer.execute("SELECT count(*) FROM kv").fetchone() == (0,)
    writer.close()


def test_a_copy_is_of_one_instant_and_one_file(tmp_path: Path) -> None:
    source, copy = tmp_path / "tasks.sqlite", tmp_path / "copy" / "tasks.sqlite"
    copy.parent.mkdir()
    store = TaskStore.open(source)
    store.write(Group([batch_row(BATCH)]))
    write_task(store, 2000)
    copy_database(source, copy)
    write_task(store, 2001)
    store.close()
    assert os.listdir(copy.parent) == ["tasks.sqlite"]
    assert copy.stat().st_mode & 0o777 == 0o600
    assert found(copy) == [2000]


def test_a_copy_does_not_wait_for_a_write_under_way(tmp_path: Path) -> None:
    store = TaskStore.open(tmp_path / "tasks.sqlite")
    write_task(store, 2000)
    other = sqlite3.connect(tmp_path / "tasks.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("DELETE FROM tasks")
    copy_database(tmp_path / "tasks.sqlite", tmp_path / "copy.sqlite")
    other.execute("ROLLBACK")
    other.close()
    store.close()
    assert found(tmp_path / "copy.sqlite") == [2000]
