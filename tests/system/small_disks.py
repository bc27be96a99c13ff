"""Disks that a test can fill and break under a daemon that runs.

Knows: which ways to break one work on this kernel without touching anybody else's. Does not
know: daemons.

Device mapper (dm-error, dm-flakey) is often not in a kernel, and ``mount -o remount,ro`` is
refused while a file is open for writing. So writes fail by a loop device whose own disk is
full, and a disk becomes read-only as it does in life: ext4 finds an error.

Of a disk that fails, what the file system itself keeps is written all the same: this is a
volume without room behind it, not a broken file system. What could not be written is clean to
the kernel, which may forget it at any time (https://wiki.postgresql.org/wiki/Fsync_Errors);
``forget`` has it do so at once, and not only on a machine whose memory is full.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.homes import wait_for

_MIB = 2**20
#: Bytes of a block of ext4.
_BLOCK = 4096


class Disk:
    """A mounted disk that takes nothing between ``fail`` and ``mend``."""

    def __init__(self, fail: Callable[[], None], mend: Callable[[], None]) -> None:
        self.fail = fail
        self.mend = mend

    def forget(self) -> None:
        """Have the kernel forget every page it takes for written (Documentation/sysctl/vm.rst)."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")


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
    with _mounted(aside, "-t", "tmpfs", "-o", "size=20m", "tmpfs"):
        image = _make_image(aside)
        _back_used_blocks(image)
        filler = aside / "filler"
        with _looped(image) as device, _mounted(place, "-o", "errors=continue", device):
            # One block at a time: of a write that has room for its beginning only, the kernel's
            # loop device says that all of it is written (drivers/block/loop.c, lo_complete_rq).
            limit = Path("/sys/block") / Path(device).name / "queue" / "max_sectors_kb"
            limit.write_text(str(_BLOCK // 1024))

            def fail() -> None:
                os.sync()  # what is older than half a minute is on the disk in life too
                _fill(filler)

            yield Disk(fail, lambda: filler.unlink(missing_ok=True))


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
            # A task that is just ending may have a copy of the mount in its own namespace.
            wait_for(lambda: _is_free(device), f"{device} to be unmounted everywhere")
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


def _make_image(folder: Path) -> Path:
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(32 * _MIB)
    _run("mkfs.ext4", "-q", "-b", str(_BLOCK), "-E", "lazy_itable_init=0", image)
    return image


def _back_used_blocks(image: Path) -> None:
    """Give what the file system needs for itself, its journal too, room behind it for good.

    A new one has it all at the beginning. A journal that cannot be written would make all of
    it read-only for good, and lost bitmaps would have two files share their blocks.
    """
    free = re.search(r"^  Free blocks: (\d+)-\d+$", _run("dumpe2fs", image), re.MULTILINE)
    assert free is not None
    with image.open("r+b") as file:
        used = file.read(int(free[1]) * _BLOCK)
        file.seek(0)
        file.write(used)


def _is_free(device: str) -> bool:
    """Say whether a block device is mounted nowhere: then it can be opened as ours alone."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


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
