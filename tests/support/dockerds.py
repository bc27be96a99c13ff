"""Real Docker engines for tests: each alone in its own namespaces, and gone without a trace.

Knows: how to start dockerd 20.10 and newer beside others on one machine, crash it, start it
again, ask its API without any library of ours. Does not know: pytest (see
``tests.support.docker_fixtures``), images (``docker_images``), registries (``docker_registry``).

Use::

    with Dockerd() as dockerd:                      # started, answers; closed at the end
        dockerd.load(busybox_image("bb:1"))         # bytes or a file
        assert dockerd.run("bb:1", "echo", "hi") == (0, "hi\n")
        Docker(url=f"unix://{dockerd.socket}")      # or aiodocker, or a runner of ours

    dockerd = Dockerd(live_restore=True, flags=["--debug"], path=[folder], env={"A": "1"})
    dockerd.start(); dockerd.wait_ready()           # start returns at once: start many, then wait
    dockerd.kill()                                  # kill -9 of dockerd alone; containers go on
    dockerd.start(); dockerd.wait_ready()           # same namespaces, same state
    dockerd.stop()                                  # SIGTERM, as `systemctl stop docker`
    dockerd.close()                                 # always, also after a crash

========================  ====================================================================
``socket``                path of the API's unix socket
``folder``                everything of it is below this one
``data_root``             ``folder/data``, what ``docker info`` calls its root
``name``                  ``kd-…``, also its cgroup: containers are in ``/kd-…/<id>``
``pid``                   of dockerd; None when it does not run
``holder``                pid of a process in its network and mount namespaces
``inside(*command)``      a command line that runs in these: give it to subprocess
``ask(method, path, …)``  the API: parsed JSON, or ``DockerRefused`` with ``status``
``run(image, *command)``  status and output of a container that is removed again
``load`` ``containers``   an image from a tar; names and ids of all containers, also ended ones
``log()``                 what dockerd wrote
========================  ====================================================================

An engine sees the machine's files, as mounted when it was first started: a folder below /tmp can
be bound into a container, a disk mounted later cannot. Its network is its own: a container's
address is reached only with ``inside`` (or by its namespace, ``/proc/<State.Pid>/ns/net``), and
a registry on loopback must be inside too. All calls here block; what takes long in an async test
(``stop``, ``close``, ``run``) belongs into ``asyncio.to_thread``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

_GUARD: Final = Path(__file__).with_name("dockerd_guard.py")

#: ``sun_path`` of man 7 unix, less the zero at its end.
_LONGEST_SOCKET: Final = 107

#: What an engine and the guard call, and the Debian package that has it.
_PROGRAMS: Final = {
    "dockerd": "docker.io",
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}

#: A shell of an ordinary user has no sbin, and dockerd must be found all the same.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class DockerRefused(Exception):
    """An engine answered a request with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


def what_is_missing() -> str:
    """Say why no engine can run on this machine; empty where one can."""
    if os.geteuid() != 0:
        return "only root can start dockerd"
    missing = [package for name, package in _PROGRAMS.items() if not shutil.which(name, path=_PATH)]
    return f"not installed: {' '.join(dict.fromkeys(missing))}" if missing else ""


class Dockerd:
    """One dockerd with its own containerd, network, mounts and control groups."""

    def __init__(
        self,
        *,
        folder: Path | None = None,
        live_restore: bool = False,
        flags: Sequence[str] = (),
        path: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
        disk_mib: int | None = None,
    ) -> None:
        """Take what shall be started; nothing runs yet.

        Args:
            folder: Where all its state goes, removed by ``close``. A short path of our own in
                /tmp if left out: unix sockets are below it.
            live_restore: Whether containers outlive a stop of dockerd.
            flags: More arguments for dockerd.
            path: Folders searched for programs before the machine's.
            env: More variables of dockerd's environment, which has little else.
            disk_mib: A disk of this size in memory for images and containers, to fill it.
        """
        self.folder = folder or Path(tempfile.mkdtemp(prefix="kd-", dir="/tmp"))
        self.name = f"kd-{secrets.token_hex(4)}"
        self.data_root = self.folder / "data"
        self.socket = self.folder / "d.sock"
        # The longest of them is containerd's.
        if len(str(self._exec_root / "containerd/containerd.sock")) > _LONGEST_SOCKET:
            raise ValueError(f"{self.folder} is too long for the unix sockets of dockerd below it")
        self._flags = [*(["--live-restore"] if live_restore else []), *flags]
        self._env = {
            "PATH": ":".join([*map(str, path), _PATH]),
            "HOME": str(self.folder),
            **(env or {}),
        }
        self._disk_mib = disk_mib or 0
        self._guard: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._procs = ""
        self._holder = 0

    def __repr__(self) -> str:
        return f"<Dockerd {self.name} in {self.folder}, pid {self.pid}>"

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process id of dockerd, None when it does not run."""
        if self._daemon is None or self._daemon.poll() is not None:
            return None
        return self._daemon.pid

    @property
    def holder(self) -> int:
        """A process in the engine's namespaces, also while dockerd is down.

        As in ``ip link set veth1 netns <holder>`` or ``/proc/<holder>/ns/net``.
        """
        self._make_place()
        return self._holder

    def inside(self, *command: str) -> list[str]:
        """Say how to run ``command`` in the engine's network and mounts; it dies with ``close``."""
        enter = ["nsenter", "--target", str(self.holder), "--mount", "--net", "--"]
        join = ["sh", "-ec", 'echo 0 >"$1"; shift; exec "$@"', "sh", self._procs]
        return [*enter, *join, *command]

    def start(self) -> None:
        """Start dockerd, at first or again; ``wait_ready`` tells when it answers."""
        if self.pid is not None:
            raise RuntimeError(f"{self!r} runs already")
        self._make_place()
        self._forget_containerd()
        # The old one is no sign of life of the new daemon.
        self.socket.unlink(missing_ok=True)
        (self.folder / "pid").unlink(missing_ok=True)
        (self.folder / "daemon.json").write_text("{}")
        with (self.folder / "log").open("ab") as log:
            self._daemon = subprocess.Popen(
                self.inside("dockerd", *self._arguments()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd="/",
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Return when the engine answers.

        Raises:
            RuntimeError: It ended, or did not answer in time; with the end of its log.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.pid is None:
                raise RuntimeError(f"{self!r} ended:\n{self.log()[-2000:]}")
            with contextlib.suppress(OSError, http.client.HTTPException, DockerRefused):
                self.ask("GET", "/_ping", timeout_s=5)
                return
            time.sleep(0.01)
        raise RuntimeError(f"{self!r} does not answer:\n{self.log()[-2000:]}")

    def kill(self) -> None:
        """End dockerd as ``kill -9`` does: containerd goes with it, shims and containers stay."""
        self._end(signal.SIGKILL, timeout_s=10)

    def stop(self, timeout_s: float = 60) -> None:
        """End dockerd in order: it stops its containers first, without ``live_restore``."""
        self._end(signal.SIGTERM, timeout_s)

    def close(self) -> None:
        """Leave nothing: processes, mounts, control groups, network, folder.

        Raises:
            RuntimeError: Something is left; it says what.
        """
        guard, self._guard = self._guard, None
        if guard is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        _, said = guard.communicate(timeout=90)
        if self._daemon is not None:
            self._daemon.wait(10)
        if guard.returncode != 0:
            raise RuntimeError(f"{self!r} is not gone: {said.decode()}")

    def log(self) -> str:
        """What dockerd and its containerd wrote, of all starts."""
        file = self.folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> Any:
        """Send one request to the API, such as ``ask("GET", "/containers/json?all=1")``.

        Args:
            method: GET, POST, DELETE.
            path: With the query, without a version.
            body: Bytes or an open file are sent as they are, anything else as JSON.
            headers: More of them, such as X-Registry-Auth.
            timeout_s: For the whole silence of the engine, not for the whole answer.

        Returns:
            Parsed JSON; a list for a stream of it; bytes for what is none; None for no content.

        Raises:
            DockerRefused: With the status and the engine's own words.
        """
        raw = body if body is None or isinstance(body, bytes) or hasattr(body, "read") else None
        kind = "application/json" if raw is None else "application/x-tar"
        if body is not None and raw is None:
            raw = json.dumps(body).encode()
        connection = _UnixConnection(self.socket, timeout_s)
        try:
            connection.request(method, path, raw, {"Content-Type": kind, **(headers or {})})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        parsed = _parse(content, answer.headers.get("Content-Type", ""))
        if answer.status >= 400:
            message = parsed["message"] if isinstance(parsed, dict) else content.decode()
            raise DockerRefused(answer.status, message)
        return parsed

    def load(self, image: bytes | Path) -> None:
        """Load what ``docker save`` writes."""
        if isinstance(image, bytes):
            told = self.ask("POST", "/images/load?quiet=1", image)
        else:
            with image.open("rb") as file:
                told = self.ask("POST", "/images/load?quiet=1", file)
        raise_for_errors(told)

    def run(
        self,
        image: str,
        *command: str,
        env: Mapping[str, str] | None = None,
        host: Mapping[str, object] | None = None,
        timeout_s: float = 60,
    ) -> tuple[int, str]:
        """Run ``command``, without a network unless ``host``, a HostConfig, says otherwise.

        Returns:
            Exit status, standard output and standard error in one.
        """
        wanted = {
            "Image": image,
            "Cmd": list(command),
            "Env": [f"{name}={value}" for name, value in (env or {}).items()],
            # A terminal, so that the log is plain text and not frames.
            "Tty": True,
            "HostConfig": {"NetworkMode": "none", **(host or {})},
        }
        identity = self.ask("POST", "/containers/create", wanted)["Id"]
        try:
            self.ask("POST", f"/containers/{identity}/start")
            waited = self.ask("POST", f"/containers/{identity}/wait", timeout_s=timeout_s)
            log = self.ask("GET", f"/containers/{identity}/logs?stdout=1&stderr=1") or b""
        finally:
            self.ask("DELETE", f"/containers/{identity}?force=1&v=1")
        return waited["StatusCode"], log.decode(errors="replace").replace("\r\n", "\n")

    def containers(self) -> dict[str, str]:
        """All containers, ended ones too: names to ids."""
        listed = self.ask("GET", "/containers/json?all=1")
        return {each["Names"][0].removeprefix("/"): each["Id"] for each in listed}

    @property
    def _exec_root(self) -> Path:
        return self.folder / "exec"

    def _arguments(self) -> list[str]:
        options = {
            "--data-root": self.data_root,
            "--exec-root": self._exec_root,
            "--pidfile": self.folder / "pid",
            "--host": f"unix://{self.socket}",
            "--config-file": self.folder / "daemon.json",
            "--cgroup-parent": f"/{self.name}",
            # Where systemd runs, version 2 of control groups would make it ask systemd, which
            # knows nothing of ours.
            "--exec-opt": "native.cgroupdriver=cgroupfs",
        }
        return [*(f"{name}={value}" for name, value in options.items()), *self._flags]

    def _make_place(self) -> None:
        if self._guard is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = [self.name, str(self.folder), str(self._disk_mib)]
        # A session of its own: Ctrl-C at the terminal ends pytest, and that ends the guard.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": _PATH},
            cwd="/",
            start_new_session=True,
        )
        assert self._guard.stdout is not None
        line = self._guard.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"{self!r} has no place to run")
        place = json.loads(line)
        self._holder, self._procs = place["holder"], place["procs"]

    def _end(self, how: signal.Signals, timeout_s: float) -> None:
        if self._daemon is None or self.pid is None:
            raise RuntimeError(f"{self!r} does not run")
        self._daemon.send_signal(how)
        self._daemon.wait(timeout_s)

    def _forget_containerd(self) -> None:
        """Wait until the containerd of a killed dockerd is dead, and take away its pid file.

        dockerd asks with kill(pid, 0), which also finds a dead process that pid 1 has not yet
        reaped, and then waits 15 s for it (20.10, libcontainerd/supervisor).
        """
        file = self._exec_root / "containerd" / "containerd.pid"
        if not file.exists():
            return
        end = time.monotonic() + 10
        while is_alive(int(file.read_text())):
            if time.monotonic() > end:
                raise RuntimeError(f"the containerd of {self!r} does not end")
            time.sleep(0.005)
        file.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether this process runs: one that waits to be reaped does not."""
    try:
        # man 5 proc: the state follows the name, which may hold parentheses itself.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def raise_for_errors(told: object) -> None:
    """Raise for an error inside a stream of progress: its status was 200 before it happened.

    Raises:
        DockerRefused: With status 200 and the engine's words.
    """
    for line in told if isinstance(told, list) else [told]:
        if isinstance(line, dict) and "error" in line:
            raise DockerRefused(200, line["error"])


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _parse(content: bytes, kind: str) -> Any:
    if not content:
        return None
    if not kind.startswith("application/json"):
        return content
    lines = content.decode().splitlines()
    return json.loads(lines[0]) if len(lines) == 1 else [json.loads(line) for line in lines if line]
