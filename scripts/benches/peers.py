"""Other systems to measure against, each a process of its own with a Python of its own.

Knows: where they are installed (a cache folder of the user, never this checkout's environment)
and how they are asked: a line of JSON in, one out. Does not know: what a rate is compared with.
A peer that cannot be had is a ``NotMeasured`` that says why.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import platformdirs
import profiling
from frame import NotMeasured

#: Tried on this very Python; pinned so that a figure of today can be compared with one of
#: next month.
PACKAGES: Final = ("hyperqueue==0.27.0", "distributed==2026.8.0")
_INSTALL_S: Final = 600


#: Set to leave peers out: their rows then say so.
WITHOUT: Final = "KOHAKU_BENCH_WITHOUT_PEERS"


class Peer:
    """A peer that runs until it is left."""

    def __init__(self, script: str, *arguments: str) -> None:
        """``script`` is beside this file and runs in the peers' own Python."""
        self._script = Path(__file__).with_name(script)
        self._arguments = arguments
        self._process: subprocess.Popen[str] | None = None
        self._folder = ""

    def start(self) -> None:
        """Start it, and wait until it is ready.

        Raises:
            NotMeasured: It cannot be installed or started.
        """
        python = peers_python()
        self._folder = tempfile.mkdtemp(prefix="kohaku-bench-peer-")
        with (Path(self._folder) / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-P", str(self._script), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._folder,
                text=True,
                start_new_session=True,
            )
        try:
            self._read()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and everything it started: it is the first of its own process group."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]  # it was asked for
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
            process.stdout.close()  # type: ignore[union-attr]  # it was asked for
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """Its process; what it started are children of it."""
        assert self._process is not None
        return self._process.pid

    def rate(self, work: str, count: int) -> float:
        """Have so many tasks done; give tasks a second."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(json.dumps({"work": work, "count": count}) + "\n")
        process.stdin.flush()
        return count / self._read()["seconds"]

    def _read(self) -> dict[str, float]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = (Path(self._folder) / "log").read_text(errors="replace")[-1000:]
            raise NotMeasured(f"{self._script.stem} ended; it wrote: {said}")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextmanager
def peer(script: str, *arguments: str) -> Iterator[tuple[Peer | None, str]]:
    """Give a running peer; or none, and why."""
    there = Peer(script, *arguments)
    try:
        there.start()
    except NotMeasured as reason:
        yield None, str(reason)
        return
    try:
        yield there, ""
    finally:
        there.stop()


def peers_python() -> str:
    """Give the Python that has the peers, installing them at the first call.

    Raises:
        NotMeasured: They cannot be installed, as without a network.
    """
    if profiling.is_on():
        raise NotMeasured("nothing is compared while a profiler runs")
    if os.environ.get(WITHOUT):
        raise NotMeasured("peers were left out")
    pins = " ".join((*PACKAGES, sys.version))
    name = f"peers-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    folder = platformdirs.user_cache_path("kohaku-bench") / name
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two benches at once install once
        if not (folder / "installed").exists():
            print(f"installing {', '.join(PACKAGES)} into {folder} ...", file=sys.stderr)
            _install(folder, python)
            (folder / "installed").touch()
    return str(python)


def _install(folder: Path, python: Path) -> None:
    venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S)
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"{', '.join(PACKAGES)}: pip took over {_INSTALL_S} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise NotMeasured(f"{', '.join(PACKAGES)} cannot be installed: {said[0]}")
