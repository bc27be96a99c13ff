"""A host and a machine with a runner, for every test of the runner that wants them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kohaku_daemon.runner.fake_host import FakeHost
from tests.kohaku_daemon.runner.machine import Machine


@pytest.fixture
async def host() -> AsyncIterator[FakeHost]:
    """Give a host that listens."""
    host = FakeHost()
    await host.arrive()
    yield host
    await host.leave()


@pytest.fixture
async def machine(tmp_path: Path, host: FakeHost) -> AsyncIterator[Machine]:
    """Give a machine whose runner is not started yet."""
    machine = Machine(tmp_path / "node", host)
    yield machine
    await machine.stop()
