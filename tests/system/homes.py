"""A whole cluster for a test: a home of its own, real daemons, the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_daemon.local import pidfiles

BIN = Path(sys.executable).parent
DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Done:
    """What a program printed and how it ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Home:
    """One KOHAKU_HOME."""

    folder: Path

    def environ(self, **more: str) -> dict[str, str]:
        """Give the environment of programs that belong to this home."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("KOHAKU_")}
        return {**kept, "KOHAKU_HOME": str(self.folder), **more}

    def run(self, program: str, *arguments: str, **more: str) -> Done:
        """Run ``kohaku`` or ``kohakud`` to its end."""
        done = subprocess.run(
            [BIN / program, *arguments],
            env=self.environ(**more),
            capture_output=True,
            text=True,
            timeout=90,
            stdin=subprocess.DEVNULL,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def kohaku(self, *arguments: str) -> str:
        """Run ``kohaku``, which must succeed; give what it printed without the last newline."""
        done = self.run("kohaku", *arguments)
        assert done.code == 0, f"kohaku {' '.join(arguments)}: {done}"
        return done.out.removesuffix("\n")

    def json(self, *arguments: str) -> Any:
        """Run ``kohaku`` with --json; give the document."""
        return json.loads(self.kohaku(*arguments, "--json"))

    def up(self, runners: int = 1) -> None:
        """Start what is missing of a cluster."""
        done = self.run(
            "kohakud", "up", "--detach", "--listen", "127.0.0.1:0", "--runners", str(runners)
        )
        assert done.code == 0, done

    def down(self) -> None:
        """Stop the cluster and end its tasks."""
        done = self.run("kohakud", "down", "--tasks")
        assert done.code == 0, done

    def pid(self, name: str) -> int:
        """Give the process id of ``host`` or ``runner-NAME``."""
        (file,) = self.folder.rglob(f"{name}.pid")
        # What is in it may not have reached a disk that fails; who holds it the kernel knows.
        return pidfiles.holder(file) or int(file.read_text().split()[0])

    def runs(self, name: str) -> bool:
        """Say whether ``host`` or ``runner-NAME`` runs."""
        return any(pidfiles.holder(file) for file in self.folder.rglob(f"{name}.pid"))

    def kill(self, name: str) -> None:
        """kill -9 a daemon and wait until it is gone."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_running(pid), f"{name} to be gone")

    def state(self, task: str) -> str:
        """Give the state of a task."""
        return str(self.json("task", "show", task)["state"])

    def wait_state(self, task: str, *states: str) -> None:
        """Wait until a task is in one of these states."""
        wait_for(lambda: self.state(task) in states, f"task {task} to be {' or '.join(states)}")


def is_running(pid: int) -> bool:
    """Say whether a process is there and no zombie (man 5 proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until something is so, or fail saying what was awaited."""
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"waited {deadline_s:g} s for {what}"
        time.sleep(0.05)
