"""The daemons: one host that decides, many runners that execute. See README.md beside this file."""

from __future__ import annotations


def version() -> str:
    """Give the version of this installation."""
    # Loaded when asked: it costs 20 ms, and most of what imports this package never asks.
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of

    try:
        return of("kohakuriver")
    except PackageNotFoundError:
        return "0+unknown"
