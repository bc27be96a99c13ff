"""Output of launches: files that programs append to, and how they are read.

Knows: where the files are, how large they may get, how long they are kept, how to send them
on while they grow.
Does not know: who asks, how a launch runs. What a program writes reaches the files without
the runner, so that nothing is lost while that is away.

Whoever writes first makes a file. That of a launch which wrote nothing may never be there: the
three inodes of a folder with two empty files cost ext4 more than all else of a short task.

All but ``read`` blocks on the disk: run it in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from kohaku_daemon.runner.log_holes import Holes, files_beside
from kohaku_daemon.runner.log_marks import Marks
from kohaku_daemon.runner.log_output import OutputReader
from kohaku_daemon.runner.reasons import about
from protocol.errors import NotFound
from protocol.messages.stream import LogChunk, LogEnd, LogItem, OpenLogs, Source
from protocol.units import render_duration, render_size

_log = logging.getLogger(__name__)

#: Seconds between looks at an output that does not grow: at first, and at most.
_LOOK_FIRST_S: Final = 0.02
_LOOK_LAST_S: Final = 0.25
#: Seconds that a folder is left alone after its last change, whatever is configured.
_FRESH_S: Final = 60.0
#: File under the root that names those whose output was removed.
_REMOVED: Final = "removed"

_KEY: Final = re.compile(r"[0-9]+-[0-9]+")
#: What there is under the root: outputs, what ``log_holes`` keeps beside them, and folders.
_NAME: Final = re.compile(r"([0-9]+-[0-9]+)(\.std(out|err)(\.hole(\.new)?)?)?")


class Outputs(NamedTuple):
    """The files of one launch."""

    stdout: Path
    stderr: Path


class TaskLogs:
    """All outputs under one folder. Launches go by their key, ``TASK-ATTEMPT``."""

    def __init__(
        self, root: Path, *, cap: int, keep_s: float, most: int | None = None, node: str = ""
    ) -> None:
        """Keep outputs under ``root``, which is made if it is missing.

        ``cap`` is how many bytes stay of each output; a program may write more until the next
        ``trim``. ``keep_s`` is how long those of an ended launch stay, and ``most`` how many
        bytes of disk all together, None for no limit. ``node`` is for lines of the log.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root
        self._cap = cap
        self._keep_s = keep_s
        self._most = most
        self._node = node
        self._holes = Holes(root)
        self._removed = Marks(root / _REMOVED, _KEY.fullmatch)

    def paths(self, key: str) -> Outputs:
        """Say which files a launch's output is in, or would be."""
        return Outputs(*map(Path, self._find(key)))

    def new_paths(self, key: str) -> Outputs:
        """Say which files the output of a launch that begins now shall be in. Asks no disk."""
        _check(key)
        self._removed.drop(key)
        return Outputs(self._root / f"{key}.{Source.STDOUT}", self._root / f"{key}.{Source.STDERR}")

    def _find(self, key: str) -> tuple[str, str]:
        """Give ``paths`` as text: a ``Path`` costs more than what is asked of the disk."""
        _check(key)
        base = f"{self._root}/{key}"
        # Of a launch that began under an earlier version there is a folder.
        base += "/" if os.path.isdir(base) else "."
        return f"{base}{Source.STDOUT}", f"{base}{Source.STDERR}"

    def trim(self, key: str) -> None:
        """Drop the middle of an output that exceeds the cap. For every launch that runs, often.

        Raises:
            OSError: The disk is full or failed; the outputs are as they were.
        """
        for path in self.paths(key):
            with suppress(FileNotFoundError):  # nothing was written yet, or it was swept
                self._holes.trim(path, self._cap)

    def finish(self, key: str) -> None:
        """Trim the last time, and count the time to keep the output from now: it has ended.

        Raises:
            OSError: The disk is full or failed.
        """
        for path in self._find(key):
            with suppress(FileNotFoundError):
                os.utime(path)
                self._holes.trim(Path(path), self._cap)

    async def read(
        self,
        key: str,
        wanted: OpenLogs,
        is_live: Callable[[], bool],
        *,
        is_known: bool = False,
    ) -> AsyncGenerator[LogItem, None]:
        """Give the output that is asked for, then a LogEnd.

        Of a launch that ``is_known``, what is not there is an output nothing was written to,
        unless ``sweep`` removed it.

        Without ``follow`` that is what is there now. With it, it goes on as the output grows
        until ``is_live`` says no: that no more can be written.

        A range that was dropped is told in its place by a chunk with a line of ours. Its
        offset is such that it ends where the range ends: whoever goes on reading at
        ``offset + len(data)`` misses nothing, as after any chunk.

        Close it (``contextlib.aclosing``) if it is not read to its end.

        Raises:
            NotFound: It was removed to make room, or the launch is not known here.
        """
        loop = asyncio.get_running_loop()
        readers: list[OutputReader] = []
        step: asyncio.Future[None] | asyncio.Future[list[LogChunk]]
        opening = partial(self._open, key, wanted, readers, is_known=is_known)
        step = loop.run_in_executor(None, opening)
        wait_s = _LOOK_FIRST_S
        try:
            await asyncio.shield(step)
            while True:
                # Asked before reading: what was written before the end is then read after it.
                goes_on = wanted.follow and is_live()
                step = reading = loop.run_in_executor(None, _read_each, readers)
                chunks = await asyncio.shield(reading)
                for chunk in chunks:
                    yield chunk
                if chunks:
                    wait_s = _LOOK_FIRST_S
                elif goes_on:
                    await asyncio.sleep(wait_s)
                    wait_s = min(wait_s * 1.5, _LOOK_LAST_S)
                else:
                    break
            yield _end(readers)
        finally:
            if step.done():
                _close(readers)
            else:
                # Cancelled while a thread opens or reads: it must neither leave a file open
                # nor meet another one under the number of one that was closed.
                step.add_done_callback(lambda _: _close(readers))

    def sweep(self, now: float, live: Collection[str]) -> list[str]:
        """Remove what ended longer ago than is kept, then the oldest until all fits the limit.

        ``now`` is in UTC seconds, ``live`` the keys of launches that may still write. Gives
        the keys whose output was removed.
        """
        kept = self._kept()
        total = sum(size for _, size, _ in kept)
        removed = []
        for changed_at, size, key in kept:
            age_s = now - changed_at
            too_much = self._most is not None and total > self._most
            if key in live or age_s < _FRESH_S or not (age_s > self._keep_s or too_much):
                continue
            if self._remove(key):
                total -= size
                removed.append(key)
        self._mark(removed)
        return removed

    def _mark(self, removed: list[str]) -> None:
        """Have readers told of it, after the removal: that may be what makes room for the mark."""
        try:
            self._removed.add(removed)
        except OSError as error:
            _log.warning("cannot note which output was removed, trying again: %s", error)

    def _kept(self) -> list[tuple[float, int, str]]:
        """Give each launch's last change, bytes of disk, and key, the oldest first."""
        found: dict[str, tuple[float, int]] = {}
        for entry in os.scandir(self._root):
            name = _NAME.fullmatch(entry.name)
            if name is None:
                continue
            try:
                stats = [entry.stat(follow_symlinks=False)]
                if name[2] is None:
                    stats += [file.stat(follow_symlinks=False) for file in os.scandir(entry)]
            except (FileNotFoundError, NotADirectoryError):
                continue
            changed_at, size = found.get(name[1], (0.0, 0))
            changed_at = max(changed_at, *(stat.st_mtime for stat in stats))
            # Not st_size: what was punched out takes no room.
            found[name[1]] = changed_at, size + sum(stat.st_blocks * 512 for stat in stats)
        return sorted((changed_at, size, key) for key, (changed_at, size) in found.items())

    def _remove(self, key: str) -> bool:
        paths = self.paths(key)
        try:
            if paths.stdout.parent != self._root:
                shutil.rmtree(paths.stdout.parent)
            for path in paths:
                for file in (path, *files_beside(path)):
                    file.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot remove old output: %s", error, extra=about(key, self._node))
            return False
        for path in paths:
            self._holes.forget(path)
        return True

    def _open(
        self, key: str, wanted: OpenLogs, readers: list[OutputReader], *, is_known: bool
    ) -> None:
        """Make a reader of each output that is wanted, and go where it begins."""
        paths = self.paths(key)
        if not any(path.exists() for path in paths):
            self._check_absent(key, is_known=is_known)
        starts = {Source.STDOUT: wanted.stdout_from, Source.STDERR: wanted.stderr_from}
        for source in dict.fromkeys(wanted.sources):
            path = paths._asdict()[source]
            reader = OutputReader(source, path, self._holes, self._cap)
            readers.append(reader)
            reader.begin(starts[source], wanted.tail_lines, stop_at_end=not wanted.follow)

    def _check_absent(self, key: str, *, is_known: bool) -> None:
        """Let only that output be absent which nothing was ever written to.

        The message says all: a stream carries no hint.
        """
        task, attempt = key.split("-")
        output = f"the output of task {task}, attempt {attempt},"
        room = "" if self._most is None else f", and {render_size(self._most)} in all (log_total)"
        kept = f"{render_duration(self._keep_s)} after its task has ended (log_keep){room}"
        if key in self._removed:
            raise NotFound(f"{output} was removed: its node keeps output for {kept}")
        if not is_known:
            raise NotFound(
                f"{output} is not on its node: it wrote none, or it was removed, "
                f"as output is kept for {kept}"
            )


def _check(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key of a launch")


def _end(readers: list[OutputReader]) -> LogEnd:
    ends = {reader.source: reader.position for reader in readers}
    return LogEnd(
        stdout_end=ends.get(Source.STDOUT, 0),
        stderr_end=ends.get(Source.STDERR, 0),
        dropped=sum(reader.dropped for reader in readers),
    )


def _read_each(readers: list[OutputReader]) -> list[LogChunk]:
    return [chunk for reader in readers for chunk in reader.read()]


def _close(readers: list[OutputReader]) -> None:
    for reader in readers:
        reader.close()
