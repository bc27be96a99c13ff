"""Output of launches: files that programs append to, and how they are read.

Knows: where the files are, how large they may get, how long they are kept, how to send them
on while they grow.
Does not know: who asks, how a launch runs. What a program writes reaches the files without
the runner, so that nothing is lost while that is away.

All but ``read`` blocks on the disk: run it in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from kohaku_daemon.runner.log_holes import Holes
from kohaku_daemon.runner.log_output import OutputReader
from protocol.errors import NotFound
from protocol.messages.stream import LogChunk, LogEnd, LogItem, OpenLogs, Source

_log = logging.getLogger(__name__)

#: Seconds between looks at an output that does not grow: at first, and at most.
_LOOK_FIRST_S: Final = 0.02
_LOOK_LAST_S: Final = 0.25
#: Seconds that a folder is left alone after its last change, whatever is configured.
_FRESH_S: Final = 60.0

_KEY: Final = re.compile(r"[0-9]+-[0-9]+")


class Outputs(NamedTuple):
    """The files of one launch."""

    stdout: Path
    stderr: Path


class TaskLogs:
    """All outputs under one folder. Launches go by their key, ``TASK-ATTEMPT``."""

    def __init__(self, root: Path, *, cap: int, keep_s: float, most: int | None = None) -> None:
        """Keep outputs under ``root``, which is made if it is missing.

        ``cap`` is how many bytes stay of each output; a program may write more until the next
        ``trim``. ``keep_s`` is how long those of an ended launch stay, and ``most`` how many
        bytes of disk all together, None for no limit.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root
        self._cap = cap
        self._keep_s = keep_s
        self._most = most
        self._holes = Holes(root)

    def folder(self, key: str) -> Path:
        """Say where a launch's files are, or would be."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a launch")
        return self._root / key

    def paths(self, key: str) -> Outputs:
        """Say which files a launch's output is in, or would be."""
        folder = self.folder(key)
        return Outputs(folder / Source.STDOUT, folder / Source.STDERR)

    def make(self, key: str) -> Outputs:
        """Make the empty files of a launch, for the runner's user alone. What is there stays.

        Raises:
            OSError: The disk is full or read-only.
        """
        self.folder(key).mkdir(mode=0o700, exist_ok=True)
        outputs = self.paths(key)
        for path in outputs:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
        return outputs

    def trim(self, key: str) -> None:
        """Drop the middle of an output that exceeds the cap. For every launch that runs, often.

        Raises:
            OSError: The disk is full or failed; the outputs are as they were.
        """
        for path in self.paths(key):
            with suppress(FileNotFoundError):  # not made yet, or swept
                self._holes.trim(path, self._cap)

    def finish(self, key: str) -> None:
        """Trim the last time, and count the time to keep the output from now: it has ended.

        Raises:
            OSError: The disk is full or failed.
        """
        self.trim(key)
        with suppress(FileNotFoundError):
            os.utime(self.folder(key))

    async def read(
        self, key: str, wanted: OpenLogs, is_live: Callable[[], bool]
    ) -> AsyncGenerator[LogItem, None]:
        """Give the output that is asked for, then a LogEnd.

        Without ``follow`` that is what is there now. With it, it goes on as the output grows
        until ``is_live`` says no: that no more can be written.

        A range that was dropped is told in its place by a chunk with a line of ours. Its
        offset is such that it ends where the range ends: whoever goes on reading at
        ``offset + len(data)`` misses nothing, as after any chunk.

        Close it (``contextlib.aclosing``) if it is not read to its end.

        Raises:
            NotFound: There is no output of such a launch on this node.
        """
        loop = asyncio.get_running_loop()
        readers: list[OutputReader] = []
        step: asyncio.Future[None] | asyncio.Future[list[LogChunk]]
        step = loop.run_in_executor(None, self._open, key, wanted, readers)
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
        kept = sorted(self._kept())
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
        return removed

    def _kept(self) -> Iterator[tuple[float, int, str]]:
        """Give each launch's last change, bytes of disk, and key."""
        for folder in os.scandir(self._root):
            if not _KEY.fullmatch(folder.name):
                continue
            try:
                stats = [folder.stat(), *(file.stat() for file in os.scandir(folder))]
            except FileNotFoundError:
                continue
            # Not st_size: what was punched out takes no room.
            size = sum(stat.st_blocks * 512 for stat in stats)
            yield max(stat.st_mtime for stat in stats), size, folder.name

    def _remove(self, key: str) -> bool:
        try:
            shutil.rmtree(self.folder(key))
        except OSError as error:
            _log.warning("cannot remove old output: %s", error, extra={"launch": key})
            return False
        for path in self.paths(key):
            self._holes.forget(path)
        return True

    def _open(self, key: str, wanted: OpenLogs, readers: list[OutputReader]) -> None:
        """Open each output that is wanted, add it to ``readers``, and go where it begins."""
        paths = self.paths(key)._asdict()
        starts = {Source.STDOUT: wanted.stdout_from, Source.STDERR: wanted.stderr_from}
        try:
            for source in dict.fromkeys(wanted.sources):
                reader = OutputReader(source, paths[source], self._holes, self._cap)
                readers.append(reader)
                reader.begin(starts[source], wanted.tail_lines, stop_at_end=not wanted.follow)
        except FileNotFoundError:
            task, attempt = key.split("-")
            raise NotFound(
                f"the output of task {task}, attempt {attempt}, is not on this node",
                hint="output is removed some time after its task has ended (log_keep_s)",
            ) from None


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
