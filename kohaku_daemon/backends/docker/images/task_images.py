"""The image that each launch runs in: the one it names, or the machine's own.

Knows: where either is found, and what a container gets of it. Does not know: how one comes here.
"""

from __future__ import annotations

from typing import Final

from kohaku_daemon.backends.docker.container import ImageFacts
from kohaku_daemon.backends.docker.errors import engine_errors
from kohaku_daemon.backends.docker.images.bringing import Images
from kohaku_daemon.backends.docker.images.machine_images import MachineImages
from kohaku_daemon.backends.docker.reading import read_image
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.dockerd.images import EngineImages

#: Images whose facts are remembered: they never change.
_MOST_IMAGES: Final = 256


class TaskImages:
    """Finds them on one engine."""

    def __init__(self, engine: EngineImages, images: Images, machine: MachineImages) -> None:
        self._engine = engine
        self._images = images
        self._machine = machine
        #: Variables and working folder by the image's id.
        self._known: dict[str, tuple[dict[str, str], str]] = {}

    async def find(self, launch: Launch) -> tuple[ImageFacts, tuple[str, ...]]:
        """Give the image of a launch, and the machine's folders that belong into it.

        Raises:
            BackendFailed: It is not here, or cannot be made.
            BackendAway: The engine does not answer.
        """
        if launch.image is None:
            image, machine = await self._machine.find()
            return image, machine.folders
        found = await self._images.find(launch)
        known = self._known.get(found)
        if known is None:
            with engine_errors():
                known = read_image(await self._engine.inspect(found))
            if len(self._known) >= _MOST_IMAGES:
                self._known.clear()
            self._known[found] = known
        kind = "environment" if launch.image.environment else "image"
        name = launch.image.environment or launch.image.reference
        return ImageFacts(found, f"{kind} {name}", *known), ()
