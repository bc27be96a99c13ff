"""The daemons of a home as processes: started, found again, stopped.

Knows: how a daemon is started apart from whoever starts it, and where its words go.
Does not know: when it is ready, what it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from kohaku_daemon.local import pidfiles
from kohaku_daemon.local.home import Home
from protocol.errors import KohakuError

#: Bytes after which a log is set aside at the next start; one older log is kept.
_LOG_FULL: Final = 8 * 2**20
#: Lines of a log that are shown when a start fails.
_TAIL: Final = 20
#: Seconds a daemon has to put things in order after SIGTERM.
_STOP_S: Final = 15.0
#: Of whoever calls ``up``, and wrong for a daemon: a client's cluster, systemd's channel.
_NOT_INHERITED: Final = ("KOHAKU_HOST", "KOHAKU_TOKEN", "NOTIFY_SOCKET")


class StartFailed(KohakuError):
    """A daemon did not start. The message has the end of its log."""


class Daemon:
    """One daemon of a home, running or not."""

    def __init__(self, name: str, arguments: Sequence[str], data: Path, stem: str, log: Path):
        #: As people know it: ``host``, or the name of the node.
        self.name = name
        self.log = log
        self.data = data
        self._arguments = [*arguments, "--data", str(data)]
        self._pid_file = data / f"{stem}.pid"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begin = 0

    def __repr__(self) -> str:
        return f"<Daemon {self.name} pid {self.pid}>"

    @property
    def pid(self) -> int | None:
        """Number of its process, None if it does not run."""
        return pidfiles.holder(self._pid_file)

    @property
    def was_started_here(self) -> bool:
        """Say whether this very object started it."""
        return self._process is not None

    def start(self, *flags: str) -> None:
        """Start it in a session of its own, so that no terminal's Ctrl-C reaches it.

        Raises:
            StartFailed: There is no such program, or no room for its log.
        """
        command = [sys.executable, "-P", "-m", "kohaku_daemon", *self._arguments, *flags]
        try:
            with _open_log(self.log) as log:
                self._log_begin = log.tell()
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=_environment(),
                    start_new_session=True,
                )
        except OSError as error:
            raise StartFailed(f"{self.name} could not be started: {error}") from error

    def check(self) -> None:
        """See that the process started here still runs.

        Raises:
            StartFailed: It has ended.
        """
        if self._process is not None and self._process.poll() is not None:
            raise self.failure(f"ended with status {self._process.returncode}")

    def failure(self, what: str) -> StartFailed:
        """Make the error that says what is wrong, with what the daemon wrote since its start."""
        with self.log.open("rb") as log:
            log.seek(self._log_begin)
            lines = log.read().decode(errors="replace").splitlines()[-_TAIL:]
        said = "".join(f"\n  | {line}" for line in lines) or "\n  | (nothing)"
        return StartFailed(f"{self.name} {what}; it wrote:{said}", hint=f"all of it: {self.log}")

    def ask_to_stop(self) -> pidfiles.Ending | None:
        """Send SIGTERM; None if it does not run."""
        ending = pidfiles.Ending.begin(self._pid_file)
        if ending is None and self._process is not None and self._process.poll() is None:
            ending = pidfiles.Ending.begin_of_child(self._pid_file, self._process.pid)
        return ending

    def status(self) -> int | None:
        """Give the exit status of the process started here; None if it runs or is not known."""
        return None if self._process is None else self._process.poll()


def host_of(home: Home) -> Daemon:
    """Give the host of a home."""
    return Daemon("host", ["host"], home.host, "host", home.logs / "host.log")


def runner_of(home: Home, name: str) -> Daemon:
    """Give one runner of a home."""
    return Daemon(
        name,
        ["runner", "--name", name],
        home.runner(name),
        f"runner-{name}",
        home.logs / f"{name}.log",
    )


def stop(daemons: Iterable[Daemon]) -> dict[str, bool]:
    """Stop daemons together. Gives the names of those that ran: True if one ended by itself.

    Raises:
        Forbidden: One belongs to another user.
        TimedOut: One does not even end by SIGKILL.
    """
    endings = {daemon.name: daemon.ask_to_stop() for daemon in daemons}
    return {name: ending.finish(_STOP_S) for name, ending in endings.items() if ending is not None}


def _open_log(path: Path) -> BinaryIO:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _LOG_FULL:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def _environment() -> dict[str, str]:
    environ = {name: text for name, text in os.environ.items() if name not in _NOT_INHERITED}
    if "KOHAKU_HOME" in environ:
        environ["KOHAKU_HOME"] = str(Path(environ["KOHAKU_HOME"]).expanduser().absolute())
    # A checkout that is not installed must find itself from another folder too.
    root = str(Path(__file__).parents[2])
    paths = environ.get("PYTHONPATH", "").split(os.pathsep)
    environ["PYTHONPATH"] = os.pathsep.join(path for path in (*paths, root) if path)
    return environ
