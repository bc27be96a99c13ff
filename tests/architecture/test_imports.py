"""What each way in really loads, in a fresh interpreter.

The import-linter contracts read source and cannot tell an import at the top of a module from
one that is made when a command needs it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_LOADED = """
import contextlib, io, sys
sys.path.insert(0, {root!r})
before = set(sys.modules)
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    exec({code!r})
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}})
print(*(name for name in sys.modules if name.startswith(("kohaku", "protocol"))))
"""

HEAVY = {"aiohttp", "asyncio", "msgspec", "rich", "tinydb", "sqlite3", "typer", "prometheus_client"}


def load(code: str) -> tuple[set[str], set[str]]:
    """Give the top packages that running ``code`` loads, and the modules of ours."""
    script = _LOADED.format(root=str(_ROOT), code=code)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    packages, modules = done.stdout.splitlines()
    return set(packages.split()), set(modules.split())


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("from kohaku_daemon.cli import main; main(['--help'])", HEAVY - {"msgspec"}),
        ("from kohaku_daemon.cli import main; main(['up', '--help'])", HEAVY - {"msgspec"}),
        ("import kohaku_tui.cli.main", {"textual", "aiohttp", "kohaku_daemon"}),
        ("import protocol.client", {"kohaku_daemon", "kohaku_tui", "textual", "rich", "typer"}),
        ("import kohaku_daemon.host.daemon", {"kohaku_tui", "rich", "typer", "pynvml"}),
        ("import kohaku_daemon.runner.daemon", {"kohaku_tui", "rich", "typer", "tinydb"}),
    ],
)
def test_a_way_in_loads_nothing_it_does_not_need(code: str, unwanted: AbstractSet[str]) -> None:
    packages, _ = load(code)
    assert not packages & unwanted


@pytest.mark.parametrize(("daemon", "other"), [("host", "runner"), ("runner", "host")])
def test_a_daemon_does_not_load_the_other(daemon: str, other: str) -> None:
    _, modules = load(f"import kohaku_daemon.{daemon}.daemon")
    assert not [name for name in modules if name.startswith(f"kohaku_daemon.{other}")]


def test_importing_the_packages_costs_next_to_nothing() -> None:
    _, modules = load("import protocol, kohaku_daemon, kohaku_tui")
    assert modules == {"protocol", "kohaku_daemon", "kohaku_tui"}
