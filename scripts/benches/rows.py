"""What ``scripts/bench`` knows: groups of rows, and programs of their own, by name.

Knows: the order of the table. Does not know: how anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import faults
from chaos import chaos
from commands import commands
from containers import containers
from control import control
from crowd import heartbeats, watchers
from environments import environments
from frame import Measure
from idle import cli, idle
from latency import latency
from logs import logs
from placement import placement
from restart import restart
from stored import stored
from submissions import submissions

_MEASURES: Final[tuple[Measure, ...]] = (
    control, commands, latency, submissions, stored, placement, heartbeats, watchers, idle, cli,
    logs, restart, chaos, containers, environments,
)  # fmt: skip

ROWS: Final[dict[str, Measure]] = {measure.__name__: measure for measure in _MEASURES}

#: What counts and is no measurement, with a command line of its own: ``scripts/bench faults``.
PROGRAMS: Final[dict[str, Callable[[Sequence[str]], int]]] = {"faults": faults.main}
