"""Run measurements and print them; see scripts/bench."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys

from frame import Row, render
from rows import ROWS


def main() -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (5)")
    parser.add_argument("--json", action="store_true", help="one document instead of a table")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    arguments = parser.parse_args()
    if arguments.list:
        for name, measure in ROWS.items():
            print(f"{name:<10} {(measure.__doc__ or '').strip()}")
        return 0
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    rows: list[Row] = []
    for name in arguments.rows or ROWS:
        print(f"measuring {name} ...", file=sys.stderr)
        rows += ROWS[name](arguments.rounds)
    if arguments.json:
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        facts = {"machine": machine, "rows": [row.facts() for row in rows]}
        print(json.dumps(facts, indent=2))
    else:
        print(render(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
