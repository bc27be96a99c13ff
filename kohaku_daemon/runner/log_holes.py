"""Holes in output files: how the middle of an endless output is given back to the disk.

Knows: punching holes, and remembering them in a small file beside the output.
Does not know: launches, who reads.

The first and the last part of an output stay, at their own offsets: the program appends to
its file and never learns of it. A hole is remembered before it is punched, so whoever reads
zeros where there is one, and looks for a hole afterwards, finds it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import tempfile
from pathlib import Path
from typing import Final

import msgspec

_log = logging.getLogger(__name__)

#: Block size of ext4, xfs, btrfs and tmpfs: only whole blocks are given back.
_BLOCK: Final = 4096
#: ``linux/falloc.h``.
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Hole(msgspec.Struct, frozen=True):
    """A range of an output that is no more: bytes from ``start`` up to ``end``."""

    start: int
    end: int


class Holes:
    """The holes of all outputs under one folder. An output has at most one, which grows.

    ``find`` may be called while another thread is in ``trim``.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        #: Of outputs that have one and were asked for.
        self._known: dict[Path, Hole] = {}
        self._can_punch: bool | None = None

    def find(self, output: Path) -> Hole | None:
        """Give the hole of an output as it is at this moment, if it has one."""
        known = self._known.get(output)
        if known is None and (known := _load(_beside(output))) is not None:
            known = self._known.setdefault(output, known)
        return known

    def newest(self, output: Path) -> Hole | None:
        """Give the hole of an output for which ``find`` was called before: without the disk."""
        return self._known.get(output)

    def forget(self, output: Path) -> None:
        """Let go of an output that is being removed."""
        self._known.pop(output, None)

    def trim(self, output: Path, cap: int) -> None:
        """Punch, or enlarge, a hole in an output that has more than ``cap`` bytes left.

        Where the file system cannot, outputs stay whole and the log says so, once.

        Raises:
            OSError: The disk is full or failed; the output is as it was.
        """
        size = output.stat().st_size
        if size <= cap:
            return
        old = self.find(output)
        hole = _plan(size, cap, old)
        if hole is None or not self._is_able():
            return
        _save(_beside(output), hole)
        self._known[output] = hole
        try:
            _punch(output, hole)
        except OSError:
            self._undo(output, old)
            raise

    def _undo(self, output: Path, old: Hole | None) -> None:
        if old is None:
            self._known.pop(output, None)
            _beside(output).unlink()
        else:
            self._known[output] = old
            _save(_beside(output), old)

    def _is_able(self) -> bool:
        """Say whether this file system can punch holes, by trying on a file of no worth."""
        if self._can_punch is None:
            with tempfile.NamedTemporaryFile(dir=self._root) as file:
                file.write(bytes(2 * _BLOCK))
                file.flush()
                try:
                    _punch(Path(file.name), Hole(0, _BLOCK))
                    self._can_punch = True
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    self._can_punch = False
                    _log.warning(
                        "the file system of %s cannot punch holes: outputs grow beyond log_cap",
                        self._root,
                    )
        return self._can_punch


def _plan(size: int, cap: int, old: Hole | None) -> Hole | None:
    """Choose the hole that an output of ``size`` bytes should have; None if it may stay.

    A quarter of the cap stays at the start and half of it at the end. The last quarter is
    how much must come before there is work again.
    """
    dropped = 0 if old is None else old.end - old.start
    if size - dropped <= cap:
        return None
    start = _whole_blocks(cap // 4) if old is None else old.start
    end = _whole_blocks(size - cap // 2)
    return Hole(start, end) if end > (start if old is None else old.end) else None


def _whole_blocks(size: int) -> int:
    return size // _BLOCK * _BLOCK


def _punch(path: Path, hole: Hole) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        mode = _PUNCH_HOLE | _KEEP_SIZE
        if _libc.fallocate(file, mode, hole.start, hole.end - hole.start) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(file)


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.hole")


def files_beside(output: Path) -> tuple[Path, Path]:
    """Name what there may be beside an output, to be removed with it."""
    beside = _beside(output)
    return beside, _fresh(beside)


def _fresh(beside: Path) -> Path:
    return beside.with_name(f"{beside.name}.new")


def _load(path: Path) -> Hole | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Hole)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        # Zeros are then shown for what was dropped.
        _log.warning("%s is damaged: %s", path, error)
        return None


def _save(path: Path, hole: Hole) -> None:
    fresh = _fresh(path)
    with open(fresh, "wb") as file:
        file.write(msgspec.json.encode(hole))
        file.flush()
        # Before the hole: a power cut must not leave zeros that nothing explains.
        os.fsync(file.fileno())
    fresh.rename(path)
