"""Rows laid out in columns, for any width.

Knows: how wide text is in a terminal's cells, which columns give way when there is no room.
Does not know: terminals, colours, where rows come from.

For a pipe the width is None and nothing is cut. On a terminal columns that can be spared and
have nothing to say go first; then those that may yield are cut, down to a few characters; then
the others that can be spared go, whole, because half of an id or of a name is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kohaku_tui.format import NOTHING
from kohaku_tui.sanitize import clean_line

GAP: Final = "  "
#: A column that yields is cut to no fewer characters.
_LEAST: Final = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """A value with the rich style it has on a terminal."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    right: bool = False
    #: Its values may be cut when there is no room.
    yields: bool = False
    #: It may be left out when there is no room: higher goes first, 0 never does.
    spare: int = 0


Row = Sequence[str | Cell]


def lay_out(columns: Sequence[Column], rows: Iterable[Row], width: int | None) -> list[list[Cell]]:
    """Give lines of padded cells, the first one of titles, that fit ``width`` if they can.

    Text is made safe. Cells are to be joined with ``GAP``.
    """
    titles = [Cell(column.title, "bold") for column in columns]
    lines = [titles, *([clean_cell(cell) for cell in row] for row in rows)]
    needed = [max(text_width(line[i].text) for line in lines) for i in range(len(columns))]
    silent = [
        i
        for i, column in enumerate(columns)
        if column.spare and all(line[i].text == NOTHING for line in lines[1:])
    ]
    kept = _fit(columns, needed, silent, width)
    return [[_pad(line[i], wide, right=columns[i].right) for i, wide in kept] for line in lines]


def clean_cell(value: str | Cell) -> Cell:
    """Make a cell of a value, with its text made safe."""
    cell = Cell(value) if isinstance(value, str) else value
    return replace(cell, text=clean_line(cell.text))


def text_width(text: str) -> int:
    """Give how many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _fit(
    columns: Sequence[Column], needed: Sequence[int], silent: Sequence[int], width: int | None
) -> list[tuple[int, int]]:
    """Choose columns, by number, and their widths. ``silent`` are those not worth room."""
    kept = list(range(len(columns)))
    if width is not None and sum(needed) + len(GAP) * (len(kept) - 1) > width:
        kept = [i for i in kept if i not in silent]
    while True:
        widths = {i: needed[i] for i in kept}
        excess = 0 if width is None else sum(widths.values()) + len(GAP) * (len(kept) - 1) - width
        yielding = [i for i in kept if columns[i].yields]
        while excess > 0 and yielding:
            widest = max(yielding, key=widths.__getitem__)
            if widths[widest] <= _LEAST:
                break
            widths[widest] -= 1
            excess -= 1
        spare = max(kept, key=lambda i: columns[i].spare)
        if excess <= 0 or not columns[spare].spare:
            return list(widths.items())
        kept.remove(spare)


def _pad(cell: Cell, width: int, *, right: bool) -> Cell:
    text = cell.text
    taken = text_width(text)
    if taken > width:
        text = _cut(text, width - 1) + "…"
        taken = text_width(text)
    blanks = " " * (width - taken)
    return replace(cell, text=blanks + text if right else text + blanks)


def _cut(text: str, width: int) -> str:
    if text.isascii():
        return text[:width]
    from rich.cells import set_cell_size

    return set_cell_size(text, width)
