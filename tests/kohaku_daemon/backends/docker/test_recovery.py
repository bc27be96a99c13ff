"""What the docker backend finds again after its engine, or its runner, was killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kohaku_daemon.backends.base import BackendAbsent, BackendAway, BackendFailed
from kohaku_daemon.backends.docker.backend import DockerBackend
from kohaku_daemon.backends.docker.record import ContainerRecord, name_launch
from kohaku_daemon.core.workload import Found
from protocol.models.task import Cause, Exit
from tests.kohaku_daemon.backends.conformance import Rig, build_rig, open_folder, until
from tests.kohaku_daemon.backends.docker.rigs import ImagePrograms, make_maker, sh
from tests.support.docker_fixtures import TEST_IMAGE, StartDockerds
from tests.support.dockerds import Dockerd


@pytest.fixture
def root() -> Iterator[Path]:
    with open_folder() as root:
        yield root


@pytest.fixture(scope="module")
def engines(start_dockerds: StartDockerds) -> tuple[Dockerd, Dockerd]:
    """One that keeps its containers when it is stopped, and one that does not."""
    keeping, ending = Dockerd(live_restore=True), Dockerd()
    start_dockerds(keeping, ending)
    return keeping, ending


@pytest.fixture
def keeping(engines: tuple[Dockerd, Dockerd]) -> Dockerd:
    return engines[0]


@pytest.fixture
def ending(engines: tuple[Dockerd, Dockerd]) -> Dockerd:
    return engines[1]


@pytest.fixture
async def rig(keeping: Dockerd, root: Path) -> AsyncIterator[Rig]:
    make = make_maker(keeping, root, image=TEST_IMAGE)
    async with build_rig(make, ImagePrograms(), root) as rig:
        yield rig


async def kill_engine(engine: Dockerd, rig: Rig) -> None:
    """kill -9 it, and wait until the backend has noticed."""
    await asyncio.to_thread(engine.kill)
    await until(lambda: rig.backend.trouble != "")


async def revive(engine: Dockerd, rig: Rig) -> None:
    """Start it again, and wait until the backend has noticed."""
    engine.start()
    await asyncio.to_thread(engine.wait_ready)
    await until(lambda: rig.backend.trouble == "")


def make_gate(folder: Path) -> str:
    """Make a line of shell that waits until a file is there."""
    return f"while [ ! -e /local_temp/go ]; do sleep 0.02; done; echo {folder.name}; exit 7"


async def test_a_killed_engine_that_keeps_containers_costs_nothing(
    rig: Rig, keeping: Dockerd
) -> None:
    running, folders = await rig.start(sh(make_gate(rig.root)))
    quick, quick_folders = await rig.start(sh(make_gate(rig.root)))
    ends = [rig.watch(running), rig.watch(quick)]
    await kill_engine(keeping, rig)
    with pytest.raises(BackendAway):
        await rig.backend.adopt(running)
    with pytest.raises(BackendAway):
        await rig.backend.kill(running, 5)
    launch, handle, new = rig.launch(sh("true"))
    with pytest.raises(BackendAway):
        await rig.backend.start(launch, handle, new)
    # It ends, and has its output and code, while there is no engine at all.
    (quick_folders.scratch / "files" / "go").touch()
    await until(lambda: quick_folders.stdout.read_text() != "")
    await revive(keeping, rig)
    assert await ends[1].wait() == Exit(Cause.EXITED, code=7)
    (folders.scratch / "files" / "go").touch()
    assert await ends[0].wait() == Exit(Cause.EXITED, code=7)
    assert folders.stdout.read_text() == f"{rig.root.name}\n"
    assert (await rig.backend.adopt(handle)).found is Found.NEVER_STARTED
    assert [len(end.told) for end in ends] == [1, 1]


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_an_engine_that_ends_its_containers_is_said_to_have(
    ending: Dockerd, root: Path, how: str
) -> None:
    make = make_maker(ending, root, image=TEST_IMAGE)
    async with build_rig(make, ImagePrograms(), root) as rig:
        handle, _ = await rig.start(sh("exec sleep 60"))
        ended = rig.watch(handle)
        await asyncio.to_thread(getattr(ending, how))
        await until(lambda: rig.backend.trouble != "")
        await revive(ending, rig)
        exit_ = await ended.wait()
        assert exit_.cause is Cause.SIGNALLED
        assert exit_.signal in {signal.SIGTERM, signal.SIGKILL}
        assert exit_.message == (
            "Docker was stopped or restarted on test, which ends containers unless live-restore"
            " is set there"
        )
        assert len(ended.told) == 1
        # And a program that comes to its end by itself afterwards is not told to have been ended.
        assert (await rig.run(sh("kill -TERM $$")))[0] == Exit(Cause.SIGNALLED, signal=15)


async def test_an_engine_that_hangs_is_as_good_as_gone(
    rig: Rig, keeping: Dockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.backends.docker.engine_watch._ASK_EVERY_S", 0.05)
    monkeypatch.setattr("kohaku_daemon.backends.docker.engine_watch._ANSWER_S", 0.2)
    await rig.restart()
    assert keeping.pid is not None
    main = dockerd_pid(keeping)
    os.kill(main, signal.SIGSTOP)
    try:
        await until(lambda: "did not answer" in rig.backend.trouble)
    finally:
        os.kill(main, signal.SIGCONT)
    await until(lambda: rig.backend.trouble == "")


def dockerd_pid(engine: Dockerd) -> int:
    """Give the pid of dockerd itself: what was started may only lead to it."""
    return int((engine.folder / "pid").read_text())


async def test_no_engine_at_all_is_no_fault(root: Path) -> None:
    class Nowhere(Dockerd):
        pass

    nowhere = Nowhere(folder=root / "none")
    make = make_maker(nowhere, root)
    backend = make()
    with pytest.raises(BackendAbsent, match="there is no Docker engine at"):
        await backend.open()
    await backend.close()


async def test_an_engine_that_does_not_answer_is_unwell_and_then_well(
    rig: Rig, keeping: Dockerd
) -> None:
    handle, _ = await rig.start(sh("exec sleep 60"))
    await rig.backend.close()
    await asyncio.to_thread(keeping.kill)
    rig.backend = rig.make()
    try:
        info = await rig.backend.open()
        assert not info.healthy
        assert "does not answer" in info.message
        with pytest.raises(BackendAway):
            await rig.backend.adopt(handle)
    finally:
        keeping.start()
        await asyncio.to_thread(keeping.wait_ready)
    assert (await rig.backend.open()).healthy
    assert (await rig.backend.adopt(handle)).found is Found.RUNNING


async def test_a_container_that_was_made_and_not_started_never_is(rig: Rig) -> None:
    """The runner was killed between making and starting, or before it was sure of its mark."""
    for has_mark in (False, True):
        launch, handle, folders = rig.launch(sh("echo ran"))
        backend = rig.backend
        assert isinstance(backend, DockerBackend)

        async def start(container: str) -> None:
            raise asyncio.CancelledError

        backend._containers.start = start  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await backend.start(launch, handle, folders)
        if not has_mark:
            (rig.root / "state" / "launches" / name_launch(handle) / "begun").unlink()
        await rig.restart()
        assert (await rig.backend.adopt(handle)).found is Found.NEVER_STARTED
        with pytest.raises(BackendFailed, match="given up"):
            await rig.backend.start(launch, handle, folders)
        assert folders.stdout.read_text() == ""
        assert await rig.backend._containers.list_ours(name_launch(handle)) == []  # type: ignore[attr-defined]


async def test_what_may_have_run_before_a_power_cut_is_not_run_again(rig: Rig) -> None:
    _, handle, _ = rig.launch(sh("echo ran"))
    record = ContainerRecord(rig.root / "state" / "launches", name_launch(handle))
    record.make()
    record.mark_begun()
    handle.data["boot"] = "another"
    exit_ = (await rig.backend.adopt(handle)).exit
    assert exit_ == Exit(Cause.NODE_FAILED, message="test restarted while the task ran")


_RUNNER = """
import asyncio, sys
from pathlib import Path
from kohaku_daemon.backends.base import TaskFolders
from kohaku_daemon.backends.docker.backend import DockerBackend
from kohaku_daemon.backends.docker.images.no_source import NoImages
from kohaku_daemon.backends.docker.settings import DockerSettings
from kohaku_daemon.core.workload import Handle, Launch
from protocol.ids import BatchId, TaskId
from protocol.models.task import TaskSpec

async def main(socket, root):
    backend = DockerBackend(state_root=root / "state", node="test", source=NoImages(),
                            settings=DockerSettings(socket=socket))
    await backend.open()
    async def start(number):
        spec = TaskSpec(command=("/bin/sh", "-c", "echo ran; exit 5"))
        launch = Launch(task=TaskId(number), attempt=1, batch=BatchId(5), spec=spec)
        await backend.prepare(launch, print)
        handle = backend.plan(launch)
        place = root / "tasks" / launch.key
        (place / "scratch").mkdir(parents=True)
        print(number, handle.data["plan"], handle.data["boot"], flush=True)
        await backend.start(launch, handle,
                            TaskFolders(place / "scratch", place / "stdout", place / "stderr"))
    await asyncio.gather(*(start(number) for number in range(1, 9)))
    await asyncio.sleep(60)

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


async def test_a_killed_runner_finds_each_launch_run_once_or_never(rig: Rig, root: Path) -> None:
    """Killed at once after the first has run, with others anywhere between plan and end."""
    backend = rig.backend
    assert isinstance(backend, DockerBackend)
    place = root / "killed"
    runner = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-c", _RUNNER, str(backend._dockerd.socket), str(place)],
        stdout=subprocess.PIPE,
        text=True,
    )
    stdouts = [place / "tasks" / f"{number}-1" / "stdout" for number in range(1, 9)]
    try:
        await until(lambda: any(one.exists() and one.read_text() for one in stdouts))
    finally:
        runner.kill()
    told, _ = await asyncio.to_thread(runner.communicate)
    other = make_maker(Dockerd(folder=backend._dockerd.socket.parent), place, image="")
    async with build_rig(other, ImagePrograms(), place) as found:
        for line in told.splitlines():
            number, plan, boot = line.split()
            handle = found.backend.plan(found.launch(sh("true"))[0])
            handle.data.update(task=int(number), attempt=1, plan=plan, boot=boot)
            found.handles.append(handle)
        verdicts = []
        for handle in found.handles:
            finding = await found.backend.adopt(handle)
            stdout = place / "tasks" / f"{handle.data['task']}-1" / "stdout"
            if finding.found is Found.NEVER_STARTED:
                assert not stdout.exists() or stdout.read_text() == ""
            elif finding.found is not Found.ENDED:
                assert await found.watch(handle).wait() == Exit(Cause.EXITED, code=5)
                assert stdout.read_text() == "ran\n"
            else:
                assert finding.exit == Exit(Cause.EXITED, code=5)
                assert stdout.read_text() == "ran\n"
            verdicts.append(finding.found)
        assert Found.NEVER_STARTED in verdicts
        assert set(verdicts) - {Found.NEVER_STARTED}
        await found.backend.tidy([])
        assert await found.backend._containers.list_ours() == []  # type: ignore[attr-defined]
