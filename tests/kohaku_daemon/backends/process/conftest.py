"""The process backend in each of its forms, as far as this machine allows them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from kohaku_daemon.backends.process.settings import Isolation
from tests.kohaku_daemon.backends.conformance import Rig, build_rig, open_folder
from tests.kohaku_daemon.backends.process.programs import ShellPrograms, make_maker

FORMS = {
    "plain": (Isolation.PLAIN, False),
    "plain-cgroups": (Isolation.PLAIN, True),
    "namespaces": (Isolation.NAMESPACES, False),
    "namespaces-cgroups": (Isolation.NAMESPACES, True),
}


@pytest.fixture(params=list(FORMS))
def form(request: pytest.FixtureRequest) -> tuple[Isolation, bool]:
    return FORMS[request.param]


@pytest.fixture
async def rig(form: tuple[Isolation, bool]) -> AsyncIterator[Rig]:
    isolation, cgroups = form
    with open_folder() as root:
        make = make_maker(root, isolation, cgroups=cgroups, node=f"test-{os.getpid()}")
        trial = make()
        info = await trial.open()
        await trial.close()
        if not info.healthy or (cgroups and "cgroup" not in info.isolation):
            pytest.skip(f"not possible here: {info.message or info.isolation}")
        async with build_rig(make, ShellPrograms(), root) as rig:
            yield rig
