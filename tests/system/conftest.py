"""One cluster of three nodes for all tests that do not break it; a fresh one for those that do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.homes import Home


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A running cluster with nodes node1 to node3."""
    yield from _running(tmp_path_factory.mktemp("home"), runners=3)


@pytest.fixture
def own_home(tmp_path: Path) -> Iterator[Home]:
    """A running cluster of one node that the test may break."""
    yield from _running(tmp_path, runners=1)


def _running(folder: Path, runners: int) -> Iterator[Home]:
    home = Home(folder)
    try:
        home.up(runners)
        yield home
    finally:
        home.down()
