"""Scratch folders go, whatever a task has left in them, and nothing beside them does."""

from __future__ import annotations

from pathlib import Path

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
