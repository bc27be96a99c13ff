"""What a command loads: starting must stay quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from protocol.messages.task import TaskPage
from protocol.methods import TASK_LIST
from tests.kohaku_tui.cli.conftest import ROOT
from tests.kohaku_tui.cli.scripted_host import ScriptedHost, a_task

PROBE = """
import sys
from kohaku_tui.cli.main import main
status = main(sys.argv[1:])
print(*sorted(sys.modules), file=sys.stderr)
sys.exit(status)
"""


def loaded(*arguments: str) -> set[str]:
    """Run a command in a fresh interpreter and give the modules it loaded."""
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return set(ran.stderr.split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["context", "list"]])
def test_what_needs_no_host_loads_no_client(host: ScriptedHost, words: list[str]) -> None:
    modules = loaded(*words)
    assert not modules & {"aiohttp", "asyncio", "rich", "textual"}


def test_a_pipe_loads_no_rich_and_nothing_loads_the_daemons(host: ScriptedHost) -> None:
    host.answer(TASK_LIST, TaskPage((a_task(7),)))
    modules = loaded("task", "list")
    assert "protocol.client" in modules
    assert not modules & {"rich", "textual", "kohaku_daemon"}
