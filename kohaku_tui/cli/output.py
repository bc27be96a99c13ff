"""What commands write: data on stdout, talk on stderr, and how it looks.

Knows: when a terminal reads, how tables and facts are laid out for it and for a pipe, how an
error is shown.
Does not know: the cluster, what a command is about.

For a pipe: plain aligned columns, whole values, no colour. For a terminal: the same words,
fitted to its width. Text of the cluster comes in here and is made safe here; rich gets
it as ``Text``, so that no bracket of a name is taken for markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Final

from kohaku_tui.document import Plain, render_json, to_plain
from kohaku_tui.sanitize import clean_block, clean_line
from protocol.errors import KohakuError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GAP: Final = "  "


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
    #: Give up characters when the terminal is narrow; columns of ids and states never do.
    yields: bool = False


Row = Sequence[str | Cell]


def now() -> float:
    """Give the time, in UTC seconds."""
    return datetime.now(UTC).timestamp()


def reads_terminal() -> bool:
    """Say whether a terminal reads stdout."""
    return sys.stdout.isatty()


def talks_to_terminal() -> bool:
    """Say whether a terminal reads stderr: only then is progress worth telling."""
    return sys.stderr.isatty()


def can_ask() -> bool:
    """Say whether a question can be asked and answered."""
    return sys.stdin.isatty() and talks_to_terminal()


def say(text: str, style: str = "") -> None:
    """Write a line of data, at once: whoever follows through a pipe waits for it."""
    _write(sys.stdout, clean_block(text), style)
    sys.stdout.flush()


def note(text: str, style: str = "") -> None:
    """Write a line of talk."""
    sys.stdout.flush()
    _write(sys.stderr, clean_block(text), style)


def print_document(document: Mapping[str, Plain]) -> None:
    """Write one JSON document over several lines."""
    sys.stdout.write(render_json(document) + "\n")


def print_document_line(document: Mapping[str, Plain]) -> None:
    """Write one document of a stream on a line of its own, at once."""
    sys.stdout.write(render_json(document, indent=None) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Write rows under their titles."""
    cells = [[_clean_cell(cell) for cell in row] for row in rows]
    if reads_terminal():
        _console(stderr=False).print(build_table(columns, cells))
        return
    widths = [
        max([len(column.title), *(_width(row[i].text) for row in cells)])
        for i, column in enumerate(columns)
    ]
    titles = [Cell(column.title) for column in columns]
    for row in [titles, *cells]:
        padded = [
            _pad(cell.text, width, right=column.right)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        sys.stdout.write(_GAP.join(padded).rstrip() + "\n")


def build_table(columns: Sequence[Column], rows: Iterable[Row]) -> Table:
    """Make a table for a terminal, one line a row, that fits its width."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            no_wrap=not column.yields,
            min_width=min(len(column.title), 8),
        )
    for row in rows:
        cells = map(_clean_cell, row)
        table.add_row(
            *(Text(cell.text, cell.style, no_wrap=True, overflow="ellipsis") for cell in cells)
        )
    return table


def print_facts(facts: Iterable[tuple[str, str | Cell]]) -> None:
    """Write names and values of one thing, one a line; those without a value are left out."""
    cells = [(name, _clean_cell(value)) for name, value in facts]
    shown = [(name, cell) for name, cell in cells if cell.text]
    width = max((len(name) for name, _ in shown), default=0)
    for name, cell in shown:
        if reads_terminal():
            from rich.text import Text

            line = Text.assemble((name.ljust(width), "bold"), _GAP, (cell.text, cell.style))
            _console(stderr=False).print(line, soft_wrap=True)
        else:
            sys.stdout.write(f"{name.ljust(width)}{_GAP}{cell.text}\n")


def show_error(error: KohakuError, *, as_json: bool) -> None:
    """Write an error on stderr: what happened to which thing, and what to do next."""
    sys.stdout.flush()
    if as_json:
        body: dict[str, Plain] = {
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
            "details": to_plain(error.details),
        }
        sys.stderr.write(render_json({"error": body}) + "\n")
        return
    if talks_to_terminal():
        from rich.text import Text

        line = Text.assemble(("error:", "bold red"), " ", clean_block(error.message))
        _console(stderr=True).print(line, soft_wrap=True)
    else:
        sys.stderr.write(f"error: {clean_block(error.message)}\n")
    for line_of_reason in _reason_lines(error.details.get("reasons")):
        sys.stderr.write(line_of_reason + "\n")
    if error.hint:
        note(error.hint)


def _reason_lines(reasons: object) -> list[str]:
    """Lay out reasons by node, as ``no_fit`` and others carry them."""
    if not isinstance(reasons, Mapping):
        return []
    rows = [
        (clean_line(str(node)), clean_line(str(reason)))
        for node, own in reasons.items()
        for reason in (own if isinstance(own, list | tuple) else (own,))
    ]
    width = max((_width(node) for node, _ in rows), default=0)
    return [f"  {_pad(node, width)}{_GAP}{reason}" for node, reason in rows]


def _write(stream: object, text: str, style: str) -> None:
    to_stderr = stream is sys.stderr
    if style and (talks_to_terminal() if to_stderr else reads_terminal()):
        from rich.text import Text

        _console(stderr=to_stderr).print(Text(text, style), soft_wrap=True)
        return
    (sys.stderr if to_stderr else sys.stdout).write(text + "\n")


@cache
def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _clean_cell(value: str | Cell) -> Cell:
    cell = Cell(value) if isinstance(value, str) else value
    return Cell(clean_line(cell.text), cell.style)


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _pad(text: str, width: int, *, right: bool = False) -> str:
    blanks = " " * (width - _width(text))
    return blanks + text if right else text + blanks
