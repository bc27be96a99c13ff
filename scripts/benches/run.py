"""Run measurements and print them; see scripts/bench."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
import traceback
from pathlib import Path

import peers
import profiling
from frame import Row
from rows import PROGRAMS, ROWS
from table import render

import kohaku_daemon

#: Of the document that ``--json`` prints; a field may be added without a new number.
_FORMAT = 1


def main() -> int:
    """Measure what the command line names."""
    # Whoever stops the bench by its process id expects it to clean up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        return PROGRAMS[sys.argv[1]](sys.argv[2:])
    parser = _parser()
    args = parser.parse_args()
    if args.list:
        _list()
        return 0
    groups = list(dict.fromkeys(name.partition(".")[0] for name in args.rows)) or list(ROWS)
    if unknown := set(groups) - set(ROWS):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    _set_environment(args)
    try:
        rows, failed = _measure(groups, args)
    except KeyboardInterrupt:
        print("stopped; what was started has been ended", file=sys.stderr)
        return 130
    print(json.dumps(_document(rows, failed, args), indent=2) if args.json else render(rows))
    for name, why in failed.items():
        print(f"error: {name} could not be measured: {why}", file=sys.stderr)
    missed = [row.name for row in rows if row.goal and row.verdict != "reached"]
    return 1 if failed or (args.strict and missed) else 0


def _list() -> None:
    for name, measure in ROWS.items():
        print(f"{name:<12} {(measure.__doc__ or '').strip().splitlines()[0]}")
    for name in PROGRAMS:
        print(f"{name:<12} A program of its own; see: scripts/bench {name} --help")


def _measure(groups: list[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in groups:
        began = time.monotonic()
        print(f"measuring {name} ...", file=sys.stderr, end=" ", flush=True)
        try:
            rows += [row for row in ROWS[name](args.rounds) if _is_wanted(row, args.rows)]
        except Exception as error:  # whatever one row meets, the others are still measured
            failed[name] = _explain(error)
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return rows, failed


def _explain(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_explain, error.exceptions))
    *_, last = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    return "\n".join([text, *getattr(error, "__notes__", ())])


def _is_wanted(row: Row, asked: list[str]) -> bool:
    return not asked or any(row.name == name or row.name.startswith(f"{name}.") for name in asked)


def _document(
    rows: list[Row], failed: dict[str, str], args: argparse.Namespace
) -> dict[str, object]:
    return {
        "format": _FORMAT,
        "version": kohaku_daemon.version(),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load": os.getloadavg()[0],
        },
        "rounds": args.rounds,
        "profiled": args.profile or None,
        "rows": [row.facts() for row in rows],
        "failed": failed,
    }


def _set_environment(args: argparse.Namespace) -> None:
    if args.profile:
        os.environ[profiling.VARIABLE] = args.profile
    if args.keep_profiles:
        os.environ[profiling.KEEP] = os.path.abspath(args.keep_profiles)
    if args.without_peers:
        os.environ[peers.WITHOUT] = "1"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure speed and memory against stated goals.",
        epilog="Exit status: 0 if all was measured, whether goals are reached or not; 1 if a "
        "group could not be measured, or with --strict if a goal was not reached; 2 for a "
        "mistake on the command line.",
    )
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="a group such as control, or a row of one")
    add("--list", action="store_true", help="name the groups and end")
    add("--rounds", type=int, default=5, help="of each measurement, interleaved (default 5)")
    add("--json", action="store_true", help="one document instead of a table")
    add("--strict", action="store_true", help="exit with 1 if a goal is not reached")
    add("--without-peers", action="store_true", help="install and run no other systems")
    add("--profile", metavar="DAEMON", choices=("host", "runner", "host,runner"),
        help="run host, runner or host,runner under cProfile and print where their time goes; "
        "the figures are then no figures")  # fmt: skip
    add("--keep-profiles", metavar="FOLDER", help="keep the profiles there, for python -m pstats")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
