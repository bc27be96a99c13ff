"""One scripted host a test, and two ways to run ``kohaku`` against it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kohaku_tui.cli.main import main
from tests.kohaku_tui.cli.scripted_host import TOKEN, ScriptedHost

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command went."""

    status: int
    out: str
    err: str


Kohaku = Callable[..., Ran]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ScriptedHost]:
    """A host in whose place the environment puts the context."""
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KOHAKU_DEBUG", raising=False)
    scripted = ScriptedHost()
    scripted.start()
    monkeypatch.setenv("KOHAKU_HOST", scripted.url)
    monkeypatch.setenv("KOHAKU_TOKEN", TOKEN)
    yield scripted
    scripted.stop()


@pytest.fixture
def kohaku(capfd: pytest.CaptureFixture[str]) -> Kohaku:
    """Run a command line in this process."""

    def run(*arguments: str) -> Ran:
        capfd.readouterr()
        status = main(arguments)
        out, err = capfd.readouterr()
        return Ran(status, out, err)

    return run


@pytest.fixture
def process(host: ScriptedHost) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start ``kohaku`` as a process of its own, which does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        running = subprocess.Popen(
            [sys.executable, "-m", "kohaku_tui", *arguments],
            cwd=ROOT,
            env=dict(os.environ),
            **options,
        )
        started.append(running)
        return running

    yield start
    for running in started:
        running.kill()
        with running:
            pass
