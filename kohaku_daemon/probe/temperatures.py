"""Temperatures, from the kernel's hardware monitors and thermal zones.

Knows: /sys/class/hwmon (Documentation/hwmon/sysfs-interface.rst) and /sys/class/thermal.
Does not know: GPUs; their driver keeps their sensors to itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kohaku_daemon.probe.files import read_number, read_text

#: Sensors answer nonsense, such as -128 or 65261.8, when nothing is connected to them.
_PLAUSIBLE: Final = (-50.0, 150.0)
_NATURAL: Final = re.compile(r"(\d+)")


class Thermometers:
    """The sensors of one machine; finding them takes longer than reading them."""

    def __init__(self, root: Path) -> None:
        self._sensors = find_sensors(root)

    def read(self) -> dict[str, float]:
        """Give degrees Celsius by sensor; sensors that do not answer are left out."""
        found: dict[str, float] = {}
        for name, path in self._sensors.items():
            thousandths = read_number(path)
            if thousandths is not None and _PLAUSIBLE[0] < thousandths / 1000 < _PLAUSIBLE[1]:
                found[name] = thousandths / 1000
        return found


def find_sensors(root: Path) -> dict[str, Path]:
    """Give the files to read by names for people, such as ``coretemp Package id 0``.

    Single cores are left out: there may be hundreds, and their package says the same.
    A thermal zone that is also a hardware monitor is taken once.
    """
    sensors: dict[str, Path] = {}
    chips = set()
    for chip, label, path in _monitors(root):
        chips.add(chip)
        if not label.startswith("Core "):
            sensors[_unused(f"{chip} {label}".strip(), sensors)] = path
    for zone in _in_order(root / "sys/class/thermal", "thermal_zone*"):
        kind = read_text(zone / "type") or zone.name
        if kind not in chips:
            sensors[_unused(kind, sensors)] = zone / "temp"
    return sensors


def _monitors(root: Path) -> Iterator[tuple[str, str, Path]]:
    for folder in _in_order(root / "sys/class/hwmon", "hwmon*"):
        chip = read_text(folder / "name") or folder.name
        inputs = _in_order(folder, "temp*_input")
        for path in inputs:
            sensor = path.name.removesuffix("_input")
            # A chip with one sensor needs no "temp1" after its name.
            unlabelled = sensor if len(inputs) > 1 else ""
            yield chip, read_text(folder / f"{sensor}_label") or unlabelled, path


def _unused(name: str, taken: dict[str, Path]) -> str:
    """Tell two of the same chip apart by a number."""
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name} #{number}"
    return candidate


def _in_order(folder: Path, pattern: str) -> list[Path]:
    """List files with ``hwmon2`` before ``hwmon10``: names must not depend on chance."""
    return sorted(
        folder.glob(pattern),
        key=lambda path: [
            int(part) if part.isdecimal() else part for part in _NATURAL.split(path.name)
        ],
    )
