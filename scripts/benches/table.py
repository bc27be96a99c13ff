"""The table that people read.

Knows: columns and widths. Does not know: what rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from frame import TIMES, Goal, Row


def render(rows: Sequence[Row]) -> str:
    """Write the table, and under it what its rows have to say beside figures."""
    header: tuple[str, ...] = ("ROW", "WHAT", "OURS", "BASELINE", "RATIO", "SPREAD", "GOAL", "")
    lines = [header, *map(_line, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*text, *([""] if notes else []), *notes])


def _line(row: Row) -> tuple[str, ...]:
    facts = row.facts()
    figure, theirs, ratio = facts["figure"], facts["baseline"], facts["ratio"]
    ours = f"{short(figure['median'])} {row.unit}" if row.ours else "-"
    is_ratio = bool(row.goal) and Goal.parse(row.goal).unit == TIMES
    about, unit = (ratio, "x") if ratio and (is_ratio or not row.goal) else (figure, "")
    spread = f"{short(about['low'])} to {short(about['high'])}{unit}" if row.ours else ""
    return (
        row.name,
        row.what,
        ours,
        f"{short(theirs['median'])} {row.unit}, {row.baseline}" if theirs else "",
        f"{short(ratio['median'])}x" if ratio else "",
        spread,
        row.goal,
        row.verdict,
    )


def short(value: float) -> str:
    """Write a figure with as many digits as it is worth."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
