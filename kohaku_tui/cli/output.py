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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING

from kohaku_tui.cli.table import GAP, Cell, Column, Row, clean_cell, lay_out
from kohaku_tui.document import Plain, render_json, to_plain
from kohaku_tui.sanitize import clean_block, clean_line
from protocol.errors import KohakuError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


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
    _write(text, style, stderr=False)
    sys.stdout.flush()


def note(text: str, style: str = "") -> None:
    """Write a line of talk."""
    sys.stdout.flush()
    _write(text, style, stderr=True)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Give a function that shows one line of progress, in the place of the line before.

    The line is on stderr and goes away again. Where no terminal reads that, nothing is shown.
    """
    if not talks_to_terminal():
        yield lambda text: None
        return
    from rich.text import Text

    status = _console(stderr=True).status("")

    def show(text: str) -> None:
        status.update(Text(clean_line(text)))
        status.start()

    try:
        yield show
    finally:
        status.stop()


def print_document(document: Mapping[str, Plain]) -> None:
    """Write one JSON document over several lines."""
    sys.stdout.write(render_json(document) + "\n")


def print_document_line(document: Mapping[str, Plain]) -> None:
    """Write one document of a stream on a line of its own, at once."""
    sys.stdout.write(render_json(document, indent=None) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Write rows under their titles, fitted to the terminal if one reads them."""
    if reads_terminal():
        console = _console(stderr=False)
        console.print(draw_table(columns, rows, console.width), soft_wrap=True)
        return
    for line in lay_out(columns, rows, None):
        sys.stdout.write(GAP.join(cell.text for cell in line).rstrip() + "\n")


def draw_table(columns: Sequence[Column], rows: Iterable[Row], width: int) -> Text:
    """Make a table of styled text, a line a row."""
    from rich.text import Text

    lines = lay_out(columns, rows, width)
    gap = Text(GAP)
    return Text("\n").join(gap.join(Text(cell.text, cell.style) for cell in line) for line in lines)


def print_facts(facts: Iterable[tuple[str, str | Cell]]) -> None:
    """Write names and values of one thing, one a line; those without a value are left out."""
    cells = [(name, clean_cell(value)) for name, value in facts]
    shown = [(name, cell) for name, cell in cells if cell.text]
    width = max((len(name) for name, _ in shown), default=0)
    for name, cell in shown:
        if reads_terminal():
            from rich.text import Text

            line = Text.assemble((name.ljust(width), "bold"), GAP, (cell.text, cell.style))
            _console(stderr=False).print(line, soft_wrap=True)
        else:
            sys.stdout.write(f"{name.ljust(width)}{GAP}{cell.text}\n")


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
    for reason in _reason_lines(error.details.get("reasons")):
        sys.stderr.write(reason + "\n")
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
    width = max((len(node) for node, _ in rows), default=0)
    return [f"{GAP}{node.ljust(width)}{GAP}{reason}" for node, reason in rows]


def _write(text: str, style: str, *, stderr: bool) -> None:
    text = clean_block(text)
    stream = sys.stderr if stderr else sys.stdout
    if style and stream.isatty():
        from rich.text import Text

        _console(stderr=stderr).print(Text(text, style), soft_wrap=True)
    else:
        stream.write(text + "\n")


@cache
def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)
