"""A record that was made empty again serves another launch, and never one that has a record."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kohaku_daemon.backends.process import spares
from kohaku_daemon.backends.process.record import Keeper, read_record, take
from kohaku_daemon.backends.process.spares import RecordFolder

KEEPER = Keeper(5, 6, 7, 8, "boot", 1.0, -1, {}, "plain", [])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "records"


def a_folder(root: Path) -> RecordFolder:
    folder = RecordFolder(root)
    folder.open()
    return folder


def keep(path: str) -> None:
    descriptor = take(path, KEEPER)
    assert descriptor is not None
    os.close(descriptor)


def test_a_recycled_record_is_empty_and_serves_the_next_launch(root: Path) -> None:
    folder = a_folder(root)
    first, second = f"{root}/1-1-0", f"{root}/2-1-0"
    folder.make(first)
    number = os.stat(first).st_ino
    keep(first)
    folder.recycle(first)
    assert not os.path.exists(first)
    folder.make(second)
    assert os.stat(second).st_ino == number
    assert read_record(second).keeper is None
    keep(second)  # it can be taken, as a new one
    assert os.listdir(root) == ["2-1-0"]


def test_a_record_that_is_there_is_not_overwritten_by_a_spare(root: Path) -> None:
    folder = a_folder(root)
    kept, over = f"{root}/1-1-0", f"{root}/2-1-0"
    for path in (kept, over):
        folder.make(path)
        keep(path)
    folder.recycle(over)
    folder.make(kept)
    assert read_record(kept).keeper == KEEPER


def test_spares_of_an_earlier_run_are_used(root: Path) -> None:
    earlier = a_folder(root)
    for path in (f"{root}/1-1-0", f"{root}/2-1-0"):
        earlier.make(path)
    earlier.recycle(f"{root}/1-1-0")
    earlier.recycle(f"{root}/2-1-0")
    folder = a_folder(root)
    folder.make(f"{root}/3-1-0")
    folder.recycle(f"{root}/3-1-0")  # under a name that no spare has
    assert len(os.listdir(root)) == 2
    for task in range(4, 7):
        folder.make(f"{root}/{task}-1-0")
    assert sorted(os.listdir(root)) == ["4-1-0", "5-1-0", "6-1-0"]


def test_no_more_spares_are_kept_than_are_of_use(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares, "_MOST", 1)
    folder = a_folder(root)
    for task in range(3):
        folder.make(f"{root}/{task}-1-0")
    for task in range(3):
        folder.recycle(f"{root}/{task}-1-0")
    assert len(os.listdir(root)) == 1


def test_spares_that_somebody_removed_are_not_missed(root: Path) -> None:
    folder = a_folder(root)
    folder.make(f"{root}/1-1-0")
    folder.recycle(f"{root}/1-1-0")
    for name in os.listdir(root):
        os.unlink(root / name)
    folder.make(f"{root}/2-1-0")
    assert os.listdir(root) == ["2-1-0"]


def test_removing_again_does_nothing(root: Path) -> None:
    folder = a_folder(root)
    folder.make(f"{root}/1-1-0")
    folder.remove(f"{root}/1-1-0")
    folder.remove(f"{root}/1-1-0")
    folder.recycle(f"{root}/1-1-0")
    assert os.listdir(root) == []
