"""Scratch folders go, whatever a task has left in them, and nothing beside them does. Those that
come back empty serve again, with nothing of the task before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kohaku_daemon.runner.scratch import ScratchFolders


def test_a_folder_full_of_traps_is_removed_and_what_it_points_to_stays(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o500)
    folders = ScratchFolders(tmp_path / "scratch")
    scratch = folders.make("1-1")
    (scratch / "closed" / "deeper").mkdir(parents=True)
    (scratch / "closed" / "deeper" / "file").write_text("x")
    (scratch / "link").symlink_to(outside)
    (scratch / "closed" / "deeper").chmod(0)
    (scratch / "closed").chmod(0o500)
    scratch.chmod(0o500)

    assert folders.list_keys() == ["1-1"]
    folders.remove("1-1")
    folders.remove("1-1")
    assert folders.list_keys() == []
    assert outside.stat().st_mode & 0o777 == 0o500


def test_an_empty_folder_serves_again_and_no_other_does(tmp_path: Path) -> None:
    folders = ScratchFolders(tmp_path)
    first = folders.make("1-1")
    number = first.stat().st_ino
    first.chmod(0o777)
    if os.geteuid() == 0:
        os.chown(first, 4711, 4711)
    folders.remove("1-1")
    assert folders.list_keys() == []
    again = folders.make("2-1")
    found = again.stat()
    assert found.st_ino == number
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
    assert found.st_mode & 0o7777 == 0o700

    (again / "file").write_text("left")
    folders.remove("2-1")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mark", ["user.kohaku", "system.posix_acl_default"])
def test_a_folder_that_a_task_has_marked_serves_nobody_again(tmp_path: Path, mark: str) -> None:
    folders = ScratchFolders(tmp_path)
    folder = folders.make("1-1")
    value = b"x"
    if "acl" in mark:
        # Version 2; owner, user 4711, group, mask, others: each tag, rights, id.
        value = bytes.fromhex(
            "02000000 0100 0700 ffffffff 0200 0700 67120000 0400 0500 ffffffff"
            "1000 0700 ffffffff 2000 0500 ffffffff"
        )
    os.setxattr(folder, mark, value)
    folders.remove("1-1")
    assert os.listdir(tmp_path) == []


def test_spares_of_an_earlier_run_serve_too(tmp_path: Path) -> None:
    folders = ScratchFolders(tmp_path)
    for key in ("1-1", "2-1"):
        folders.make(key)
    for key in ("1-1", "2-1"):
        folders.remove(key)
    numbers = {entry.inode() for entry in os.scandir(tmp_path)}
    assert len(numbers) == 2

    folders = ScratchFolders(tmp_path)
    assert {folders.make(key).stat().st_ino for key in ("3-1", "4-1")} == numbers
    assert sorted(folders.list_keys()) == ["3-1", "4-1"]
    assert folders.make("3-1").is_dir()  # again, as after a crash
    folders.remove("3-1")
    assert folders.list_keys() == ["4-1"]
