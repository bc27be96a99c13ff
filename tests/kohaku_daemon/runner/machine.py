"""A runner on a machine that survives it: the same vault, files and mock tasks run after run."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohaku_daemon.backends.mock import MockBackend, MockWorld
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.runner.backend_kit import BackendKit
from kohaku_daemon.runner.config import RunnerConfig
from kohaku_daemon.runner.daemon import VAULT, Runner, image_source
from kohaku_daemon.runner.memory import Identity, Memory
from kohaku_daemon.store.vault import Vault
from kohaku_daemon.supervise import spawn
from protocol.ids import BatchId, NodeName, TaskId
from protocol.messages.runner import OrderStart
from protocol.models.task import TaskSpec
from tests.kohaku_daemon.runner.fake_host import JOIN_TOKEN, FakeHost
from tests.kohaku_daemon.runner.waiting import until


def a_start(task: int, attempt: int = 1, backend: str = "mock", **env: str) -> OrderStart:
    """Order a mock task; its variables say how it goes."""
    spec = TaskSpec(
        command=("mock",),
        backend=backend,
        env={f"MOCK_{name.upper()}": value for name, value in env.items()},
    )
    return OrderStart(task=TaskId(task), attempt=attempt, batch=BatchId(task), spec=spec)


class Power(RuntimeError):
    """The machine lost its power."""


class Machine:
    """One node."""

    def __init__(self, data: Path, host: FakeHost) -> None:
        self.world = MockWorld()
        self.token_file = data.with_suffix(".token")
        self.token_file.write_text(JOIN_TOKEN)
        self.config = RunnerConfig(
            name=NodeName("gpu-01"),
            data=data,
            host=host.url,
            join_token_file=self.token_file,
            reconnect_max_s=0.2,
            labels={"rack": "1"},
        )
        data.mkdir()
        self.backend = MockBackend(self.world)
        #: The power fails at the commit of this number, counted from 1; 0 for never.
        self.fails_at = 0
        #: Whether that commit is on the disk by then.
        self.fails_after = False
        self.ready: list[str] = []
        self._commits = 0
        self._stop = asyncio.Event()
        self._job: asyncio.Task[None] | None = None
        self._memory: Memory | None = None

    # A run of the runner ------------------------------------------------------------

    async def start(self, backend: MockBackend | None = None) -> None:
        vault = Vault.open(self.config.data / VAULT)
        self._commits = 0
        vault.write = self._failing(vault)  # type: ignore[method-assign]
        self._memory = Memory(vault)
        self.backend = backend or MockBackend(self.world)
        kit = BackendKit({"mock": self.backend}, (await self.backend.open(),), "mock")
        self._stop = asyncio.Event()
        runner = Runner(self.config, self._memory, kit, image_source(self.config, self._memory))
        self._job = spawn(self._run(runner), name="runner")

    async def stop(self) -> None:
        """End the runner as SIGTERM does; a runner that is not there is no error."""
        self._stop.set()
        if self._job is not None:
            await self._job
            self._job = None

    async def crash(self) -> None:
        """End the runner without its leave."""
        assert self._job is not None
        self._job.cancel()
        await asyncio.gather(self._job, return_exceptions=True)
        self._job = None

    async def lose_power(self) -> None:
        """Wait for the commit at which the power fails."""
        assert self._job is not None
        await asyncio.wait_for(self._job, 20)
        self._job = None

    async def _run(self, runner: Runner) -> None:
        assert self._memory is not None
        try:
            await runner.run(self._stop, self.ready.append)
        except* Power:
            pass
        finally:
            await self.backend.close()
            self._memory.close()
            self._memory = None

    def _failing(self, vault: Vault) -> Any:
        write = vault.write

        def failing(puts: Mapping[str, bytes], drops: Any = ()) -> None:
            if any(key.startswith(("launch/", "fences/")) for key in puts):
                self._commits += 1
            due = self._commits == self.fails_at > 0
            if due and not self.fails_after:
                raise Power
            write(puts, drops)
            if due:
                raise Power

        return failing

    # What is there ------------------------------------------------------------------

    def launches(self) -> dict[str, LaunchRecord]:
        """Give what the vault of the runner that is there holds."""
        assert self._memory is not None
        return {record.key: record for record in self._memory.launches()}

    def identity(self) -> Identity | None:
        assert self._memory is not None
        return self._memory.identity()

    def output(self, key: str) -> str:
        """Give what a task wrote; a task that wrote nothing may have no file."""
        path = self._stdout(key)
        return path.read_text() if path.exists() else ""

    def write(self, key: str, text: str) -> None:
        """Write to a task's standard output, as the task would."""
        with self._stdout(key).open("a") as file:
            file.write(text)

    def _stdout(self, key: str) -> Path:
        return self.config.data / "logs" / f"{key}.stdout"

    async def settled(self, key: str) -> LaunchRecord:
        """Wait until the host's knowledge of the end is in the vault."""
        await until(lambda: (record := self.launches().get(key)) and record.settled)
        return self.launches()[key]
