"""The mock keeps the promises of a backend, and does as it is told."""

from collections.abc import AsyncIterator

import pytest

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.mock import MockBackend, MockWorld
from kohaku_daemon.core.workload import Found
from protocol.models.task import Cause, TaskSpec
from tests.kohaku_daemon.backends.conformance import Conformance, Rig, build_rig, open_folder


class MockPrograms:
    def _tell(self, **env: object) -> TaskSpec:
        variables = {f"MOCK_{name}": str(value) for name, value in env.items()}
        return TaskSpec(command=("mock",), env=variables)

    def exits(self, code: int) -> TaskSpec:
        return self._tell(EXIT=code)

    def dies(self, number: int) -> TaskSpec:
        return self._tell(SIGNAL=int(number))

    def prints(self, out: str, err: str) -> TaskSpec:
        return self._tell(STDOUT=out, STDERR=err)

    def works(self) -> TaskSpec:
        return self._tell(RUN_S="forever")

    def runs(self, seconds: float) -> TaskSpec:
        return self._tell(RUN_S=seconds)

    def refuses_term(self) -> TaskSpec:
        return self._tell(RUN_S="forever", ON_TERM="ignore", STDOUT="ready\nready\n")

    def handles_term(self, code: int) -> TaskSpec:
        return self._tell(RUN_S="forever", ON_TERM=code, STDOUT="ready\n")

    def cannot_start(self) -> tuple[TaskSpec, str]:
        return self._tell(START_ERROR="no such program"), "no such program"

    def exceeds_memory(self, limit: int) -> TaskSpec:
        return self._tell(MEMORY=4 * limit)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    world = MockWorld()
    with open_folder() as root:
        async with build_rig(lambda: MockBackend(world), MockPrograms(), root) as rig:
            yield rig


class TestMock(Conformance):
    """All of it."""


async def test_an_oom_is_told_as_asked(rig: Rig) -> None:
    exit_, _ = await rig.run(TaskSpec(command=("mock",), env={"MOCK_OOM": "2"}))
    assert (exit_.cause, exit_.oom_kills) == (Cause.OOM, 2)


@pytest.mark.parametrize("variable", ["MOCK_RUN_S", "MOCK_EXIT", "MOCK_ON_TERM", "MOCK_MEMORY"])
async def test_a_variable_it_cannot_read_is_named(rig: Rig, variable: str) -> None:
    launch, handle, folders = rig.launch(TaskSpec(command=("mock",), env={variable: "soon"}))
    with pytest.raises(BackendFailed, match=f"{variable}=soon"):
        await rig.backend.start(launch, handle, folders)


async def test_a_task_of_another_world_ended_with_it(rig: Rig) -> None:
    handle, _ = await rig.start(TaskSpec(command=("mock",), env={"MOCK_RUN_S": "forever"}))
    finding = await MockBackend().adopt(handle)
    assert finding.found is Found.ENDED
    assert finding.exit is not None
    assert finding.exit.cause is Cause.NODE_FAILED
