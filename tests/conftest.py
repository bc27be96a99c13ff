"""Options of our own."""

from __future__ import annotations

import pytest

# Here, once: imported by two modules they would be two engines.
from tests.support.docker_fixtures import dockerd, start_dockerds  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let whoever runs the tests choose how many worlds are simulated, or which."""
    group = parser.getgroup("simulation")
    group.addoption(
        "--simulation-seeds",
        type=int,
        default=None,
        metavar="N",
        help="play this many seeds in tests/simulation, as many as wanted",
    )
    group.addoption(
        "--simulation-from",
        type=int,
        default=0,
        metavar="S",
        help="the first of these seeds",
    )
    group.addoption(
        "--simulation-seed",
        type=int,
        default=None,
        metavar="S",
        help="play one seed and print its story",
    )
