"""People's side of the cluster: the command line, and what it shares with the screens."""

from __future__ import annotations


def find_version() -> str:
    """Give the version of this installation; ``0+unknown`` for a source tree that is none."""
    # Loaded when asked: it costs 20 ms, and hardly anybody asks.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kohakuriver")
    except PackageNotFoundError:
        return "0+unknown"
