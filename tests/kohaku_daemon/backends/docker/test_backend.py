"""The docker backend keeps the promises of a backend, in an image and in the machine's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.kohaku_daemon.backends.conformance import Conformance, Rig, build_rig, open_folder
from tests.kohaku_daemon.backends.docker.rigs import ImagePrograms, ShellPrograms, make_maker
from tests.support.docker_fixtures import TEST_IMAGE
from tests.support.dockerds import Dockerd


class TestInImage(Conformance):
    """All of it, in an image."""

    many = 12

    @pytest.fixture
    async def rig(self, dockerd: Dockerd) -> AsyncIterator[Rig]:
        with open_folder() as root:
            make = make_maker(dockerd, root, image=TEST_IMAGE)
            async with build_rig(make, ImagePrograms(), root) as rig:
                yield rig


class TestWithoutImage(Conformance):
    """All of it, with the machine's own programs."""

    many = 12

    @pytest.fixture
    async def rig(self, dockerd: Dockerd) -> AsyncIterator[Rig]:
        with open_folder() as root:
            async with build_rig(make_maker(dockerd, root), ShellPrograms(), root) as rig:
                yield rig
