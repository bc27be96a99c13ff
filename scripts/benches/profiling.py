"""Daemons under a profiler: which function a daemon's time goes to.

Knows: how a daemon is started under cProfile, and how its figures are shown. Does not know:
what is measured meanwhile. cProfile sees the main thread only (commits run in another) and
makes calls several times dearer, so figures taken under it are no figures: look at the shares.
"""

from __future__ import annotations

import os
import pstats
import sys
from pathlib import Path
from typing import Final

#: Which daemons run under the profiler: ``host``, ``runner``, or both with a comma.
VARIABLE: Final = "KOHAKU_BENCH_PROFILE"
#: Folder that keeps the profiles, for ``python -m pstats`` and viewers; none are kept without.
KEEP: Final = "KOHAKU_BENCH_PROFILE_KEEP"
_LINES: Final = 30


def is_on() -> bool:
    """Say whether anything is profiled."""
    return bool(os.environ.get(VARIABLE))


def flags(name: str, folder: Path) -> list[str]:
    """Give what goes before ``-m kohaku_daemon`` on a daemon's command line."""
    wanted = os.environ.get(VARIABLE, "").split(",")
    if name.partition("-")[0] not in wanted:
        return []
    # Numbered: a daemon that is started again has a profile of its own.
    number = len(list(folder.glob("*.prof.started")))
    (folder / f"{number}.prof.started").touch()
    return ["-m", "cProfile", "-o", str(folder / f"{name}-{number}.prof")]


def show(folder: Path) -> None:
    """Print the top entries of every profile by own time, to stderr."""
    for path in sorted(folder.glob("*.prof")):
        print(f"\nprofile of {path.stem}, by own time:", file=sys.stderr)
        stats = pstats.Stats(str(path), stream=sys.stderr)
        stats.strip_dirs().sort_stats("tottime").print_stats(_LINES)
        if keep := os.environ.get(KEEP):
            os.makedirs(keep, exist_ok=True)
            path.replace(Path(keep) / path.name)
