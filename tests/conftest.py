"""Options of our own."""

from __future__ import annotations

import pytest


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
