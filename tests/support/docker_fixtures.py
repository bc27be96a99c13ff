"""Fixtures with real Docker engines, for all tests: ``tests/conftest.py`` imports them.

``dockerd``: one engine for all tests of the session, which leave nothing in it and do not stop
it. ``start_dockerds``: starts engines that a module may break, and closes them after it. Both
have the image ``TEST_IMAGE``: busybox with a shell, /tmp and the user ``worker``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final, Protocol

import pytest

from tests.support.docker_images import busybox_image
from tests.support.docker_registry import what_registry_is_missing
from tests.support.dockerds import Dockerd, what_is_missing

TEST_IMAGE: Final = "kohaku-test:1"


class StartDockerds(Protocol):
    """Starts engines, all at once, and gives them when each has the test image."""

    def __call__(self, *dockerds: Dockerd) -> None: ...


def need_dockerd() -> None:
    """Skip a test on a machine that cannot run engines, and say why."""
    if missing := what_is_missing():
        pytest.skip(f"no Docker engine: {missing}")


def need_registry() -> None:
    """Skip a test on a machine without a registry, and say so."""
    if missing := what_registry_is_missing():
        pytest.skip(f"no registry: {missing}")


@pytest.fixture(scope="session")
def dockerd() -> Iterator[Dockerd]:
    """An engine with the test image, shared by all tests."""
    need_dockerd()
    with Dockerd() as running:
        running.load(busybox_image(TEST_IMAGE))
        yield running


@pytest.fixture(scope="module")
def start_dockerds() -> Iterator[StartDockerds]:
    """Start engines of this module: ``one, two = Dockerd(), Dockerd(live_restore=True)``."""
    need_dockerd()
    with ExitStack() as closing:

        def start(*dockerds: Dockerd) -> None:
            for each in dockerds:
                closing.callback(each.close)
                each.start()
            image = busybox_image(TEST_IMAGE)
            for each in dockerds:
                each.wait_ready()
                each.load(image)

        yield start
