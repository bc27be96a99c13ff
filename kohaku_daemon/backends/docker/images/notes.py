"""Which images of an engine this node has brought, and when each was used last.

Knows: one small file that survives the runner. Does not know: the engine, which image is there.

What is used is noted in memory at once and on the disk within the hour: to say which image was
unused longest that is near enough, and starts of tasks do not wait for a disk.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

import msgspec

_log = logging.getLogger(__name__)

#: Seconds that the file may be behind.
_BEHIND_S: Final = 3600.0


class ImageNote(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One image that was brought here, or was on its way when its bringing was given up."""

    #: What the engine finds it by: its id, or ``NAME@sha256:...`` of a registry.
    name: str
    #: Of an environment: the version's digest, and the tag that it has here for people.
    digest: str = ""
    tag: str = ""
    #: UTC seconds.
    used_at: float = 0.0
    #: It was seen in the engine.
    present: bool = False


class ImageNotes:
    """All notes of one engine. ``read`` first."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._notes: dict[str, ImageNote] = {}
        self._saved_at = 0.0
        self._saving = asyncio.Lock()

    async def read(self) -> None:
        """Read the file. One that cannot be read is as good as none: images are only kept."""
        try:
            data = await asyncio.to_thread(self._file.read_bytes)
            notes = msgspec.json.decode(data, type=list[ImageNote])
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            _log.warning("images brought earlier are not known: %s", error)
            return
        self._notes = {note.name: note for note in notes} | self._notes

    def get(self, name: str) -> ImageNote | None:
        """Give the note of an image."""
        return self._notes.get(name)

    def by_use(self) -> list[ImageNote]:
        """Give all, what was used last first."""
        return sorted(self._notes.values(), key=lambda note: -note.used_at)

    async def put(self, note: ImageNote) -> None:
        """Note an image, or something else of it."""
        self._notes[note.name] = note
        await self.save(note.used_at)

    async def touch(self, name: str, now: float) -> None:
        """Note that an image is used, if it was brought here."""
        note = self._notes.get(name)
        if note is not None:
            note.used_at = now
            if now - self._saved_at > _BEHIND_S:
                await self.save(now)

    async def drop(self, name: str) -> None:
        """Forget an image."""
        note = self._notes.pop(name, None)
        if note is not None:
            await self.save(note.used_at)

    async def save(self, now: float) -> None:
        """Write the file. A disk that does not take it costs what was said about the hour."""
        self._saved_at = max(now, self._saved_at)
        async with self._saving:
            data = msgspec.json.encode(list(self._notes.values()))
            try:
                await asyncio.to_thread(self._write, data)
            except OSError as error:
                _log.warning("cannot note which images are here: %s", error)

    def _write(self, data: bytes) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_bytes(data)
        new.replace(self._file)
