"""A real cluster under attack: users with tokens of their own, a node that was broken into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.attacks.target import Target
from tests.support.siege import Siege, besieged


@pytest.fixture(scope="package")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """One cluster for all attacks: they have to leave it as it was."""
    with besieged(tmp_path_factory.mktemp("siege")) as siege:
        yield siege


@pytest.fixture
def own_siege(tmp_path: Path) -> Iterator[Siege]:
    """A cluster for one test that runs real tasks and soon misses a silent peer."""
    with besieged(tmp_path, "process", KOHAKU_HOSTD_KEEP_ALIVE="1s") as siege:
        yield siege


@pytest.fixture
def there(siege: Siege) -> Target:
    """The cluster as its attackers see it."""
    return siege.target
