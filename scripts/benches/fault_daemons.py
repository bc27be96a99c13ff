"""A cluster whose daemons are killed and started again, by a supervisor of its own.

Knows: how one is started again as ``kohakud up`` started it, that only its own process is
killed, when it ended unasked. Does not know: tasks, when to kill.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.client import Cluster, connect

_BIN: Final = Path(sys.executable).parent
#: Seconds a killed process has to be gone.
_GONE_S: Final = 20.0
#: Lines of a log that say why a daemon ended.
_TAIL: Final = 15


class Supervised:
    """One daemon, started by ``kohakud up`` first and by this supervisor from then on."""

    def __init__(
        self, name: str, pid: int, arguments: Sequence[str], environ: dict[str, str], log: Path
    ) -> None:
        """Take over a daemon that runs.

        Args:
            name: ``host``, or that of the node.
            pid: Of its process.
            arguments: Of ``kohakud``, to start it as it was started.
            environ: Its environment.
            log: Where its words go.
        """
        self.name = name
        self.kills = 0
        #: What it wrote when it ended without having been killed, one text each time.
        self.crashes: list[str] = []
        self._pid = pid
        self._arguments = arguments
        self._environ = environ
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        #: One kill and start after the other.
        self._turn = asyncio.Lock()

    async def kill(self, down_s: float) -> None:
        """kill -9 its process, wait so many seconds, start it again."""
        async with self._turn:
            if self._is_over():
                self._note_crash()
            else:
                os.kill(self._pid, signal.SIGKILL)
                self.kills += 1
                await self._wait_gone()
            await asyncio.sleep(down_s)
            self._start()

    def check(self) -> None:
        """If it has ended unasked, note that and start it again."""
        if not self._turn.locked() and self._is_over():
            self._note_crash()
            self._start()

    def end(self) -> None:
        """kill -9 its process if that still runs, for good."""
        if not self._is_over():
            os.kill(self._pid, signal.SIGKILL)

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kohaku_daemon", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._environ,
                start_new_session=True,
            )
        self._pid = self._process.pid

    async def _wait_gone(self) -> None:
        clock = asyncio.get_running_loop()
        deadline = clock.time() + _GONE_S
        while not self._is_over():
            if clock.time() > deadline:
                raise TimeoutError(f"{self.name} does not even end by SIGKILL")
            await asyncio.sleep(0.002)

    def _is_over(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        try:
            stat = Path(f"/proc/{self._pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        return stat.rpartition(")")[2].split()[0] in {"Z", "X"}

    def _note_crash(self) -> None:
        lines = self._log.read_text(errors="replace").splitlines()[-_TAIL:]
        self.crashes.append("\n".join([f"{self.name} ended by itself; it wrote:", *lines]))


@dataclass(frozen=True, slots=True)
class Victims:
    """A running cluster to be ill-treated."""

    url: str
    token: str
    #: ``host`` and each node by name.
    daemons: dict[str, Supervised]

    def connect(self, *, patience_s: float) -> Cluster:
        """Name this cluster as its admin; for ``async with``."""
        return connect(self.url, self.token, agent="kohaku-bench", patience_s=patience_s)


@contextmanager
def victims(runners: int, **settings: str) -> Iterator[Victims]:
    """Give a cluster in a home of its own; it and its tasks are ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="kohaku-faults-"))
    folder.chmod(0o711)  # tasks of root have users of their own and pass through it
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KOHAKU_")}
    environ = {**kept, "KOHAKU_HOME": str(folder), **settings}
    up = ["up", "--detach", "--listen", "127.0.0.1:0", "--runners", str(runners)]
    found: Victims | None = None
    try:
        _kohakud(environ, *up).check_returncode()
        yield (found := _take_over(folder, environ, runners))
    finally:
        down = _kohakud(environ, "down", "--tasks")
        for daemon in found.daemons.values() if found is not None else ():
            daemon.end()
        if down.returncode:
            print(f"tasks may be left; what the daemons wrote is in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _kohakud(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [_BIN / "kohakud", *arguments], env=environ, check=False, stdout=subprocess.DEVNULL
    )


def _take_over(folder: Path, environ: dict[str, str], runners: int) -> Victims:
    (published,) = folder.rglob("host.url")
    url, host = published.read_text().strip(), published.parent
    listen = url.removeprefix("http://")
    arguments = {"host": ["host", "--data", str(host), "--listen", listen]}
    for node in (f"node{number}" for number in range(1, runners + 1)):
        data = host.parent / "runners" / node
        arguments[node] = ["runner", "--name", node, "--data", str(data), "--host", url]
    daemons = {}
    for name, words in arguments.items():
        (pid_file,) = folder.rglob("host.pid" if name == "host" else f"runner-{name}.pid")
        pid = int(pid_file.read_text().split()[0])
        log = host.parent / "logs" / f"{name}.log"
        daemons[name] = Supervised(name, pid, words, environ, log)
    return Victims(url, (host / "admin.token").read_text().strip(), daemons)
