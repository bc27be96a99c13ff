"""Disks that a test can fill and break under a daemon that runs.

Knows: which ways to break one work on this kernel without touching anybody else's. Does not
know: daemons.

Device mapper (dm-error, dm-flakey) is often not in a kernel, and ``mount -o remount,ro`` is
refused while a file is open for writing. So writes fail by a loop device whose own disk is
full, and a disk becomes read-only as it does in life: ext4 finds an error.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MIB = 2**20


class Disk:
    """A mounted disk that takes nothing between ``fail`` and ``mend``."""

    def __init__(self, fail: Callable[[], None], mend: Callable[[], None]) -> None:
        self.fail = fail
        self.mend = mend


@contextmanager
def full_disk(place: Path, mib: int = 8) -> Iterator[Disk]:
    """Mount a disk on ``place`` that can be full."""
    with _mounted(place, "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs"):
        filler = place / "filler"
        yield Disk(lambda: _fill(filler), lambda: filler.unlink(missing_ok=True))


@contextmanager
def failing_disk(place: Path, aside: Path) -> Iterator[Disk]:
    """Mount a disk on ``place`` of which writes can fail, as on a volume without backing.

    ``aside`` is a folder for what lies behind it.
    """
    with _mounted(aside, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        # Without a journal: one that cannot be written makes all of it read-only for good.
        image = _make_image(aside, "-O", "^has_journal")
        filler = aside / "filler"
        with _looped(image) as device, _mounted(place, "-o", "errors=continue", device):
            yield Disk(lambda: _fill(filler), lambda: filler.unlink(missing_ok=True))


@contextmanager
def broken_disk(place: Path, aside: Path) -> Iterator[Disk]:
    """Mount a disk on ``place`` that finds itself broken and is read-only from then on.

    ``mend`` needs all files on it closed.
    """
    image = _make_image(aside)
    with _looped(image) as device, _mounted(place, "-o", "errors=remount-ro", device):

        def fail() -> None:
            (Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error").write_text("1")

        def mend() -> None:
            _run("umount", place)
            # 1: errors were corrected (man 8 e2fsck).
            assert subprocess.run(["e2fsck", "-fy", device], capture_output=True).returncode <= 1
            _run("mount", device, place)

        yield Disk(fail, mend)


def need_disks() -> None:
    """Skip a test on a machine where no disk can be mounted, and say what is missing."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk to break")
    if not Path("/dev/loop-control").exists():
        pytest.skip("the kernel has no loop devices")


def _fill(filler: Path) -> None:
    """Leave no byte free."""
    with filler.open("wb", buffering=0) as file:
        for size in (_MIB, 4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


def _make_image(folder: Path, *options: str) -> Path:
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(32 * _MIB)
    _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", *options, image)
    return image


@contextmanager
def _looped(image: Path) -> Iterator[str]:
    device = _run("losetup", "--find", "--show", image).strip()
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)


@contextmanager
def _mounted(place: Path, *options: str) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    _run("mount", *options, place)
    try:
        yield
    finally:
        # Lazily: a daemon that a failed test left would keep it busy.
        _run("umount", "--lazy", place)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
