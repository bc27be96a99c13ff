"""Backends by name, loaded on demand.

Knows: which backends there are, and which a runner opens if nobody chose.
Does not know: whether one works on this machine; its ``open`` says that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import Backend
from kohaku_daemon.backends.docker.images.source import ImageSource
from kohaku_daemon.backends.docker.settings import DockerSettings
from kohaku_daemon.backends.process.settings import ProcessSettings
from protocol.errors import Unsupported
from protocol.models.task import DOCKER

#: What a runner opens, the default first, if its configuration names none. Never ``mock``.
DEFAULT_BACKENDS: Final = ("docker", "process")


@dataclass(frozen=True, slots=True)
class BackendPlace:
    """What a runner gives its backends."""

    #: Name of the node.
    node: str
    #: Folder in which each backend has one of its own name.
    state_root: Path
    #: Folders that no task may see: the daemons' own data.
    hidden: tuple[Path, ...] = ()
    #: The folder that all nodes share, at this node's own path; None if there is none.
    shared_dir: Path | None = None
    process: ProcessSettings = field(default_factory=ProcessSettings)
    docker: DockerSettings = field(default_factory=DockerSettings)
    #: Where images of containers come from; None for a runner that brings none.
    images: ImageSource | None = None


def make_backend(name: str, place: BackendPlace) -> Backend:
    """Make a backend by its name.

    Raises:
        Unsupported: There is none of that name.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        raise Unsupported(
            f"{name!r} is not a backend", hint=f"backends are: {', '.join(sorted(_FACTORIES))}"
        )
    return factory(place)


def _make_process(place: BackendPlace) -> Backend:
    from kohaku_daemon.backends.process.backend import ProcessBackend

    return ProcessBackend(
        state_root=place.state_root / "process",
        node=place.node,
        hidden=place.hidden,
        shared_dir=place.shared_dir,
        settings=place.process,
    )


def _make_docker(place: BackendPlace) -> Backend:
    from kohaku_daemon.backends.docker.backend import DockerBackend
    from kohaku_daemon.backends.docker.images.no_source import NoImages

    return DockerBackend(
        state_root=place.state_root / DOCKER,
        node=place.node,
        source=place.images or NoImages(),
        hidden=place.hidden,
        shared_dir=place.shared_dir,
        settings=place.docker,
    )


def _make_mock(place: BackendPlace) -> Backend:
    from kohaku_daemon.backends.mock import MockBackend

    return MockBackend()


_FACTORIES: Final[Mapping[str, Callable[[BackendPlace], Backend]]] = {
    "process": _make_process,
    DOCKER: _make_docker,
    "mock": _make_mock,
}
