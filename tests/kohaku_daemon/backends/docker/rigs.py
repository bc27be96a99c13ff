"""Rigs of the docker backend for the tests of this folder.

Knows: how its backend is made, with the test image or without one, and what its tasks are told.
Does not know: pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from kohaku_daemon.backends.base import TaskFolders
from kohaku_daemon.backends.docker.backend import DockerBackend
from kohaku_daemon.backends.docker.images.no_source import NoImages
from kohaku_daemon.backends.docker.settings import DockerSettings
from kohaku_daemon.core.workload import Handle, Launch, Started
from protocol.models.environment import Version, WantedImage
from protocol.models.task import TaskSpec
from tests.kohaku_daemon.backends.process.programs import ShellPrograms, sh
from tests.support.dockerds import Dockerd


class ImagePrograms(ShellPrograms):
    """What tasks are told in an image of busybox: it has no Python."""

    def exceeds_memory(self, limit: int) -> TaskSpec:
        # What tail has not got a newline of, it keeps.
        return TaskSpec(command=("/bin/sh", "-c", f"exec tail -c {4 * limit} /dev/zero"))


class InImage(DockerBackend):
    """Runs launches that name no image in this one, which the engine has."""

    image: WantedImage

    async def start(self, launch: Launch, handle: Handle, folders: TaskFolders) -> Started:
        if launch.image is None:
            launch = msgspec.structs.replace(launch, image=self.image)
        return await super().start(launch, handle, folders)


def wanted(engine: Dockerd, name: str) -> WantedImage:
    """Give an image of an engine as if it was an environment that has been brought."""
    found = engine.ask("GET", f"/images/{name}/json")["Id"]
    version = Version(digest=found.removeprefix("sha256:"), size=1, pieces="", image=found)
    return WantedImage(environment=name.partition(":")[0], version=version)


def make_maker(
    engine: Dockerd,
    root: Path,
    *,
    image: str = "",
    settings: DockerSettings | None = None,
    node: str = "test",
    hidden: Sequence[Path] = (),
    shared_dir: Path | None = None,
) -> Callable[[], DockerBackend]:
    """Make what makes a backend with its state below ``root``."""
    chosen = replace(settings or DockerSettings(), socket=engine.socket)
    # Now: it may be made again while the engine is down.
    found = wanted(engine, image) if image else None

    def make() -> DockerBackend:
        kind = InImage if image else DockerBackend
        backend = kind(
            state_root=root / "state",
            node=node,
            source=NoImages(),
            hidden=(root, *hidden),
            shared_dir=shared_dir,
            settings=chosen,
        )
        if isinstance(backend, InImage):
            assert found is not None
            backend.image = found
        return backend

    return make


__all__ = ["ImagePrograms", "InImage", "Launch", "ShellPrograms", "make_maker", "sh", "wanted"]
