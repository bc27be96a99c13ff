"""The example scripts do what the README says they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.homes import Home

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("submit_and_wait.py", ["echo", "said by a task"], "said by a task"),
        ("sweep.py", ["--rates", "0.5", "--seeds", "4", "6"], "completed"),
        ("watcher.py", ["--until-idle"], "node node1: online"),
        ("raw_client.py", [], ""),
    ],
)
def test_example(home: Home, script: str, arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        env=home.environ(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    if script == "sweep.py":
        assert [line.split()[-1] for line in done.stdout.splitlines()[-2:]] == ["2", "3"]


@pytest.mark.parametrize("script", sorted(script.name for script in EXAMPLES.glob("*.py")))
def test_an_example_says_what_to_do_where_no_host_is_known(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script],
        env=Home(tmp_path).environ(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "no host is known" in done.stderr
    assert "kohaku login" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_example_is_in_the_readme() -> None:
    readme = (EXAMPLES.parents[1] / "README.md").read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f"python scripts/examples/{script.name}" in readme
