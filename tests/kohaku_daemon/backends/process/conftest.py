"""The process backend in each of its forms, as far as this machine allows them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kohaku_daemon.backends.process import linux
from tests.kohaku_daemon.backends.conformance import Rig, build_rig, open_folder
from tests.kohaku_daemon.backends.process.forms import FORMS, Form
from tests.kohaku_daemon.backends.process.programs import ShellPrograms, make_maker


@pytest.fixture(params=FORMS, ids=str)
def form(request: pytest.FixtureRequest) -> Form:
    form: Form = request.param
    return form


@pytest.fixture
async def rig(form: Form) -> AsyncIterator[Rig]:
    with open_folder() as root:
        make = make_maker(root, form.isolation, cgroups=form.cgroups, node=f"test-{os.getpid()}")
        trial = make()
        info = await trial.open()
        await trial.close()
        if not info.healthy or (form.cgroups and "memory" not in info.enforces):
            missing = info.message or "it has no cgroups that limit memory"
            pytest.skip(f"this machine does not allow {form}: {missing}")
        async with build_rig(make, ShellPrograms(), root) as rig:
            yield rig


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk to fill")
    linux.mount("tmpfs", str(tmp_path), "tmpfs", 0, "size=1m")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)
