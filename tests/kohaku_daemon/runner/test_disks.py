"""A disk that takes nothing is told once, in words that do not change while it lasts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kohaku_daemon.runner.disks import Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk to fill")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_once_and_is_well_again_when_freed(
    small_disk: Path, tmp_path: Path
) -> None:
    disks = Disks({"this": small_disk, "that": small_disk / "not-made", "more": tmp_path})
    assert told(disks) == []
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * ((1 << 20) - 8192))
    assert told(disks) == [f"the disk of {small_disk} is full: nowhere to keep this and that"]
    filler.unlink()
    assert told(disks) == []


def test_a_disk_without_room_for_another_file_is_told(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,nr_inodes=4", small_disk], check=True)
    for number in range(3):
        (small_disk / str(number)).touch()
    why = "No space left on device: nowhere to keep this"
    assert told(Disks({"this": small_disk})) == [f"{small_disk} cannot be written: {why}"]


def test_a_read_only_disk_is_told(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert told(Disks({"this": small_disk})) == [f"{small_disk} is read-only: nowhere to keep this"]


def told(disks: Disks) -> list[str]:
    """Look, and give what is wrong."""
    disks.look()
    return list(disks.troubles)
