"""What a launch needs of the engine, as calls that raise a backend's errors.

Knows: the requests about containers, what each refusal means that is none.
Does not know: launches, when anything is to be done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.docker.container import PLAN_LABEL, RUNNER_LABEL, TASK_LABEL
from kohaku_daemon.backends.docker.errors import engine_errors
from kohaku_daemon.backends.docker.facts import ALIVE, ContainerFacts, parse_container
from kohaku_daemon.dockerd.connection import Dockerd
from kohaku_daemon.dockerd.errors import EngineRefused

#: Of HTTP, as the engine means them: it is not there; it is in another state.
_NOT_FOUND: Final = 404
_CONFLICT: Final = 409


@dataclass(frozen=True, slots=True)
class ListedContainer:
    """One of our containers, as a list has it."""

    id: str
    plan: str
    task: int
    #: It runs or is paused.
    is_alive: bool


class Containers:
    """The containers of one runner on its engine."""

    def __init__(self, dockerd: Dockerd, runner: str) -> None:
        self._dockerd = dockerd
        self._runner = runner

    async def create(self, name: str, body: Mapping[str, Any]) -> str:
        """Make a container and give its id. There is at most one of each name."""
        with engine_errors():
            told = await self._dockerd.ask(
                "containers/create", "POST", params={"name": name}, body=body
            )
        return str(told["Id"])

    async def start(self, container: str) -> None:
        """Start one that was made. One that has been started stays as it is."""
        await self._do(container, "start")

    async def list_ours(self, plan: str = "") -> list[ListedContainer]:
        """List all of ours, whatever became of them, or the one of one plan."""
        labels = [f"{RUNNER_LABEL}={self._runner}"]
        labels += [f"{PLAN_LABEL}={plan}"] if plan else []
        params: dict[str, str | int] = {"all": 1, "filters": json.dumps({"label": labels})}
        with engine_errors():
            told = await self._dockerd.ask("containers/json", params=params)
        return [
            ListedContainer(
                id=str(one["Id"]),
                plan=str(one["Labels"].get(PLAN_LABEL, "")),
                task=int(one["Labels"].get(TASK_LABEL, 0)),
                is_alive=str(one["State"]) in ALIVE,
            )
            for one in told
        ]

    async def find(self, plan: str) -> ContainerFacts | None:
        """Give the container of a plan, if there is one."""
        for listed in await self.list_ours(plan):
            if (facts := await self.inspect(listed.id)) is not None:
                return facts
        return None

    async def inspect(self, container: str) -> ContainerFacts | None:
        """Say what is the matter with one; None if it is gone."""
        with engine_errors():
            try:
                return parse_container(await self._dockerd.ask(f"containers/{container}/json"))
            except EngineRefused as error:
                if error.status != _NOT_FOUND:
                    raise
        return None

    async def signal(self, container: str, name: str) -> None:
        """Signal its first process, which hands it on, and let it go on if it is held still."""
        await self._do(container, "kill", {"signal": name}, may_fail=True)
        await self._do(container, "unpause", may_fail=True)

    async def pause(self, container: str) -> None:
        """Hold it still. One that is, or has ended, stays as it is."""
        await self._hold(container, "pause", paused=True)

    async def unpause(self, container: str) -> None:
        """Let it go on. One that does, or has ended, stays as it is."""
        await self._hold(container, "unpause", paused=False)

    async def remove(self, container: str, *, force: bool = False) -> bool:
        """Remove one with its own volumes; say whether it is gone.

        It is not if it runs, unless it is forced to end.
        """
        params = {"v": 1, "force": int(force)}
        with engine_errors():
            try:
                await self._dockerd.ask(f"containers/{container}", "DELETE", params=params)
            except EngineRefused as error:
                if error.status == _CONFLICT:  # it runs, or is being removed
                    return False
                if error.status != _NOT_FOUND:
                    raise
        return True

    async def _hold(self, container: str, verb: str, *, paused: bool) -> None:
        try:
            await self._do(container, verb)
        except BackendFailed:
            # It says 409 and 500 for what it is already, in words of its own.
            facts = await self.inspect(container)
            if facts is not None and facts.is_alive and facts.is_paused is not paused:
                raise

    async def _do(
        self,
        container: str,
        verb: str,
        params: Mapping[str, str] | None = None,
        *,
        may_fail: bool = False,
    ) -> None:
        """Ask for something; ``may_fail`` for what is refused where there is nothing to do."""
        try:
            with engine_errors():
                await self._dockerd.ask(f"containers/{container}/{verb}", "POST", params=params)
        except BackendFailed:
            if not may_fail:
                raise
