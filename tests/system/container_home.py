"""A cluster whose nodes each have a Docker engine of their own, as real daemons.

Knows: which daemon gets which engine and folders, how each is killed and started again.
Does not know: how an engine is started (``tests.support.dockerds``).
"""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.dockerds import Dockerd
from tests.system.homes import BIN, DEADLINE_S, Done, Home, is_running, wait_for


@dataclass
class ContainerHome:
    """A host and one runner for each engine; nodes are called node1 and so on."""

    home: Home
    engines: list[Dockerd]
    #: Settings of the daemons, as variables of their environment.
    host_settings: dict[str, str] = field(default_factory=dict)
    runner_settings: dict[str, str] = field(default_factory=dict)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def up(self) -> None:
        """Start the host and all runners, and wait until all nodes are online."""
        self.start_host()
        for number in range(1, len(self.engines) + 1):
            self.start_runner(number)
        wait_for(
            lambda: (
                len([one for one in self.nodes() if one["state"] == "online"]) == len(self.engines)
            ),
            "all nodes to be online",
        )

    def start_host(self) -> None:
        """Start the host, or start it again after it was killed."""
        done = self.run_kohakud("up", "--detach", "--listen", "127.0.0.1:0", "--runners", "0")
        assert done.code == 0, done

    def start_runner(self, number: int) -> None:
        """Start a runner, or start it again after it was killed."""
        name = f"node{number}"
        token = self.home.folder / f"{name}.join"
        if not token.exists():
            token.write_text(self.home.json("node", "join-token")["token"])
        engine = self.engines[number - 1]
        settings = {
            "KOHAKU_RUNNER_BACKENDS": "docker,process",
            "KOHAKU_RUNNER_DOCKER_SOCKET": str(engine.socket),
            **{key: value.format(node=name) for key, value in self.runner_settings.items()},
        }
        url = self.home.json("context", "show")["url"]
        with (self.home.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [BIN / "kohakud", "runner", "--name", name, "--host", url,
                 "--join-token-file", str(token)],
                env=self.home.environ(**settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._started.append(process)

    def kill_runner(self, number: int) -> None:
        """kill -9 a runner."""
        self._reap(self.home.pid(f"runner-node{number}"))

    def kill_host(self) -> None:
        """kill -9 the host."""
        self.home.kill("host")

    def _reap(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        for process in self._started:
            if process.pid == pid:
                process.wait(DEADLINE_S)
        wait_for(lambda: not is_running(pid), f"{pid} to be gone")

    def nodes(self) -> list[dict[str, object]]:
        """Give all nodes."""
        return list(self.home.json("node", "list")["nodes"])

    def run_kohakud(self, *arguments: str) -> Done:
        """Run ``kohakud`` with the host's settings."""
        return self.home.run("kohakud", *arguments, **self.host_settings)

    def down(self) -> None:
        """End all tasks and all daemons."""
        try:
            live = ("queued", "assigned", "preparing", "running", "paused")
            states = [argument for state in live for argument in ("--state", state)]
            ids = [task["id"] for task in self.home.json("task", "list", *states, "--all")["tasks"]]
            if ids:
                self.home.run("kohaku", "task", "kill", *ids)
                self.home.run("kohaku", "task", "wait", *ids)
        finally:
            for process in self._started:
                process.terminate()
            for process in self._started:
                process.wait(DEADLINE_S)
            done = self.run_kohakud("down")
        assert done.code == 0, done

    def logs(self) -> str:
        """Give the last of what the daemons wrote, for a test that failed."""
        files = sorted(self.home.folder.rglob("*.log"))
        return "\n".join(f"== {file.name}\n{_tail(file)}" for file in files)


def _tail(file: Path) -> str:
    return file.read_text(errors="replace")[-3000:]
