"""Has the image of tasks that name none on the engine, and no more than one of it.

Knows: when it must be made anew. Does not know: what is in it (``machine``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.docker.container import ImageFacts
from kohaku_daemon.backends.docker.errors import engine_errors
from kohaku_daemon.backends.docker.images.machine import (
    MACHINE_REPOSITORY,
    MachineImage,
    build_machine_image,
)
from kohaku_daemon.clock import Clock
from kohaku_daemon.dockerd.connection import Dockerd
from kohaku_daemon.dockerd.errors import EngineRefused
from kohaku_daemon.dockerd.images import EngineImages

#: Seconds that a look at the machine is good for: a library that was installed meanwhile may not
#: be found by name, and no more.
_LOOK_S: Final = 60.0
#: Bytes sent at once.
_PART: Final = 1024 * 1024


class MachineImages:
    """The machine's own image on its engine."""

    def __init__(self, dockerd: Dockerd, folders: Sequence[Path], clock: Clock) -> None:
        self._dockerd = dockerd
        self._engine = EngineImages(dockerd)
        self._folders = folders
        self._clock = clock
        self._lock = asyncio.Lock()
        self._built: MachineImage | None = None
        self._looked_at = 0.0

    async def find(self) -> tuple[ImageFacts, MachineImage]:
        """Give it; make it if it is not there.

        Raises:
            BackendFailed: It cannot be made.
            BackendAway: The engine does not answer.
        """
        async with self._lock:
            built = await self._look()
            with engine_errors():
                found = await self._engine.find(built.reference)
                if not found:
                    await self._import(built)
                    found = await self._engine.find(built.reference)
        if not found:
            raise BackendFailed(f"Docker on this node does not keep {built.reference}")
        return ImageFacts(found, "the node itself", {}, is_machine=True), built

    async def tidy(self) -> None:
        """Remove those of earlier looks at the machine that nothing runs in any more.

        Raises:
            BackendFailed, BackendAway: As ``find``.
        """
        if self._built is None:
            return
        params = {"filters": json.dumps({"reference": [MACHINE_REPOSITORY]})}
        with engine_errors():
            for image in await self._dockerd.ask("images/json", params=params):
                for name in image["RepoTags"] or ():
                    if name != self._built.reference:
                        await self._engine.remove(name)

    async def _look(self) -> MachineImage:
        now = self._clock.monotonic()
        if self._built is None or now - self._looked_at > _LOOK_S:
            try:
                self._built = await asyncio.to_thread(build_machine_image, self._folders)
            except OSError as error:
                raise BackendFailed(
                    f"cannot read what tasks need of this machine: {error}"
                ) from error
            self._looked_at = now
        return self._built

    async def _import(self, built: MachineImage) -> None:
        repository, _, tag = built.reference.partition(":")
        params = {"fromSrc": "-", "repo": repository, "tag": tag}
        async with self._dockerd.stream(
            "images/create", "POST", params=params, body=_parts(built.content)
        ) as response:
            told = await response.text()
        if '"error"' in told:  # after it had begun to answer with 200
            raise EngineRefused(500, told.strip())


async def _parts(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), _PART):
        yield content[start : start + _PART]
