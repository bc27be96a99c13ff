"""A cluster of its own for a measurement: a temporary home, started and stopped by kohakud."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Home:
    """A running cluster."""

    folder: Path
    environ: dict[str, str]
    #: Seconds that ``kohakud up --detach`` took as a whole.
    start_s: float

    def run(self, program: str, *arguments: str) -> str:
        """Run one of our programs against it; give what it printed."""
        done = subprocess.run(
            [BIN / program, *arguments],
            env=self.environ,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout

    def pid(self, name: str) -> int:
        """Give the process id of ``host`` or ``runner-NAME``."""
        (file,) = self.folder.rglob(f"{name}.pid")
        return int(file.read_text().split()[0])

    def cpu_s(self, name: str) -> float:
        """Give the CPU seconds a daemon has used, its threads included (man 5 proc)."""
        stat = Path(f"/proc/{self.pid(name)}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self, name: str) -> float:
        """Give the resident memory of a daemon."""
        pages = int(Path(f"/proc/{self.pid(name)}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def cluster(backend: str = "process", **settings: str) -> Iterator[Home]:
    """Start a host and a runner on free ports; stop them, and their tasks, at the end."""
    folder = Path(tempfile.mkdtemp(prefix="kohaku-bench-"))
    folder.chmod(0o711)  # tasks of root have users of their own and pass through it
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith("KOHAKU_")},
        "KOHAKU_HOME": str(folder),
        **settings,
    }
    arguments = ["up", "--detach", "--listen", "127.0.0.1:0", "--backend", backend]
    try:
        began = time.perf_counter()
        subprocess.run(
            [BIN / "kohakud", *arguments], env=environ, check=True, stdout=subprocess.DEVNULL
        )
        yield Home(folder, environ, time.perf_counter() - began)
    finally:
        subprocess.run([BIN / "kohakud", "down", "--tasks"], env=environ, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)
