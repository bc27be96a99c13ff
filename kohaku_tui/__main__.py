"""``python -m kohaku_tui`` is the same as ``kohaku``."""

from __future__ import annotations

from kohaku_tui.cli.main import run

if __name__ == "__main__":
    run()
