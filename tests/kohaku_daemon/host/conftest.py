"""A host for each test that asks for one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.host import RunningHost, running_host


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RunningHost]:
    """A host with its defaults."""
    async with running_host(tmp_path / "data") as host:
        yield host
