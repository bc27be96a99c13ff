"""What a container truly has and is held to, with a real engine."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.docker.settings import DockerSettings
from kohaku_daemon.backends.process.files import read_text
from protocol.models.task import Cause, Claim, Exit, Mount, Network, TaskSpec
from tests.kohaku_daemon.backends.conformance import Rig, build_rig, open_folder
from tests.kohaku_daemon.backends.docker.rigs import ImagePrograms, make_maker, sh, wanted
from tests.support.docker_fixtures import TEST_IMAGE
from tests.support.docker_images import bare_image
from tests.support.dockerds import Dockerd
from tests.support.nvidia_hook import NvidiaHook

MIB = 1 << 20


@pytest.fixture
def root() -> Iterator[Path]:
    with open_folder() as root:
        yield root


@pytest.fixture
async def rig(dockerd: Dockerd, root: Path) -> AsyncIterator[Rig]:
    """A backend that allows what an administrator may allow, with a shared folder."""
    shared = root.with_name(root.name + "-shared")
    settings = DockerSettings(
        allow_privileged=True, allow_any_mount=True, mount_roots=(root / "data",)
    )
    (root / "data").mkdir()
    shared.mkdir()
    make = make_maker(dockerd, root / "own", image=TEST_IMAGE, settings=settings, shared_dir=shared)
    try:
        async with build_rig(make, ImagePrograms(), root) as rig:
            yield rig
    finally:
        shutil.rmtree(shared)


async def say(rig: Rig, spec: TaskSpec, claim: Claim | None = None, **fields: object) -> str:
    """Run, and give what it wrote."""
    launch, handle, folders = rig.launch(spec, claim)
    await rig.backend.start(msgspec.structs.replace(launch, **fields), handle, folders)
    exit_ = await rig.watch(handle).wait()
    assert exit_ == Exit(Cause.EXITED, code=0), (exit_, folders.stderr.read_text())
    return folders.stdout.read_text()


async def test_its_variables_say_which_task_it_is(rig: Rig) -> None:
    launch, handle, folders = rig.launch(sh("env"))
    launch = msgspec.structs.replace(launch, index=2, size=3, hosts=("a.lab", "b.lab", "c.lab"))
    await rig.backend.start(launch, handle, folders)
    await rig.watch(handle).wait()
    env = dict(line.split("=", 1) for line in folders.stdout.read_text().splitlines())
    assert {name: env[name] for name in env if name.startswith("KOHAKU_")} == {
        "KOHAKU_TASK_ID": str(launch.task),
        "KOHAKU_ATTEMPT": "1",
        "KOHAKU_BATCH_ID": "5",
        "KOHAKU_TASK_INDEX": "2",
        "KOHAKU_BATCH_SIZE": "3",
        "KOHAKU_BATCH_HOSTS": "a.lab,b.lab,c.lab",
        "KOHAKU_NODE": "test",
        "KOHAKU_SHARED_DIR": "/shared",
        "KOHAKU_LOCAL_TEMP": "/local_temp",
    }
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["NVIDIA_VISIBLE_DEVICES"] == "void"


async def test_the_shared_folder_and_its_own_are_there_to_be_written(rig: Rig) -> None:
    spec = sh("echo 1 > /shared/all; echo 2 > here; pwd; ls /.kohaku; cat /local_temp/here")
    said = await say(rig, msgspec.structs.replace(spec, workdir="/local_temp"))
    assert said == "/local_temp\nexit\ninit\nstderr\nstdout\n2\n"
    shared = rig.root.with_name(rig.root.name + "-shared")
    assert (shared / "all").read_text() == "1\n"


async def test_what_it_leaves_in_its_folder_can_be_reached_by_nobody_else(rig: Rig) -> None:
    """Root in a container could leave a program there that makes root of whoever runs it."""
    _, folders = await rig.run(sh("cp /bin/busybox /local_temp/x; chmod 6777 /local_temp/x"))
    assert (folders.scratch / "files" / "x").stat().st_mode & 0o6000
    assert folders.scratch.stat().st_mode & 0o077 == 0


async def test_an_ordinary_user_can_write_all_that_is_its_own(rig: Rig) -> None:
    spec = sh("id -un; id -u >&2; echo x > /local_temp/x; : > /.kohaku/init")
    handle, folders = await rig.start(msgspec.structs.replace(spec, user="worker"))
    exit_ = await rig.watch(handle).wait()
    assert exit_.code == 1, "init cannot be overwritten"
    assert folders.stdout.read_text() == "worker\n"
    assert folders.stderr.read_text().startswith("1000\n")
    assert (folders.scratch / "files" / "x").read_text() == "x\n"


async def test_a_user_the_image_does_not_have_is_named(rig: Rig) -> None:
    launch, handle, folders = rig.launch(msgspec.structs.replace(sh("id"), user="nobody-here"))
    with pytest.raises(BackendFailed, match="its image has no user nobody-here"):
        await rig.backend.start(launch, handle, folders)


async def test_no_network_is_its_own_loopback_alone(rig: Rig) -> None:
    interfaces = sh("cd /sys/class/net; echo *")
    assert "eth0" in await say(rig, interfaces)
    alone = msgspec.structs.replace(interfaces, network=Network.NONE)
    assert "eth0" not in await say(rig, alone)


async def test_limits_are_those_of_the_spec(rig: Rig) -> None:
    spec = msgspec.structs.replace(
        sh("ulimit -n; ulimit -Hn; df -k /dev/shm | tail -n1 | awk '{print $2}'"),
        ulimits={"nofile": (100, 200)},
        shm_size=8 * MIB,
    )
    assert await say(rig, spec) == "100\n200\n8192\n"


async def test_it_runs_on_the_cores_and_memory_it_claimed(rig: Rig) -> None:
    claim = Claim(cores=(0,), numa=0, memory=32 * MIB)
    said = await say(
        rig, sh("grep -E 'Cpus_allowed_list|Mems_allowed_list' /proc/self/status"), claim
    )
    assert said.split() == ["Cpus_allowed_list:", "0", "Mems_allowed_list:", "0"]


async def test_a_core_that_is_not_there_is_named(rig: Rig, dockerd: Dockerd) -> None:
    launch, handle, folders = rig.launch(sh("true"), Claim(cores=(4000,)))
    with pytest.raises(BackendFailed, match="does not have the cores it was to run on: 4000"):
        await rig.backend.start(launch, handle, folders)
    assert f"kohaku-{launch.key}" not in " ".join(dockerd.containers()), "nothing is left of it"
    finding = await rig.backend.adopt(handle)
    assert finding.exit is not None
    assert finding.exit.cause is Cause.START_FAILED


async def test_memory_that_no_container_can_live_with_is_named(rig: Rig) -> None:
    launch, handle, folders = rig.launch(sh("true"), Claim(memory=1024))
    with pytest.raises(BackendFailed, match="1024 bytes is less than the 6 MiB"):
        await rig.backend.start(launch, handle, folders)


async def test_a_child_that_ran_out_of_memory_is_no_end_of_the_task(rig: Rig) -> None:
    script = f"tail -c {400 * MIB} /dev/zero; echo $?; exit 0"
    exit_, folders = await rig.run(sh(script), Claim(memory=32 * MIB))
    assert (exit_.cause, exit_.code) == (Cause.EXITED, 0)
    assert exit_.oom_kills >= 1
    assert folders.stdout.read_text() == "137\n"


async def test_a_program_that_returns_what_docker_says_of_kills_is_told_apart(rig: Rig) -> None:
    exit_, _ = await rig.run(sh("exit 137"), Claim(memory=32 * MIB))
    assert exit_ == Exit(Cause.EXITED, code=137)


async def test_an_image_without_a_shell_runs_and_says_all(rig: Rig, dockerd: Dockerd) -> None:
    dockerd.load(bare_image("kohaku-bare:1"))
    image = wanted(dockerd, "kohaku-bare:1")
    try:
        said = await say(rig, TaskSpec(command=("/busybox", "echo", "hi")), image=image)
        assert said == "hi\n"
        launch, handle, folders = rig.launch(TaskSpec(command=("python3",)))
        launch = msgspec.structs.replace(launch, image=image)
        with pytest.raises(BackendFailed, match="command not found: python3 in environment"):
            await rig.backend.start(launch, handle, folders)
    finally:
        await remove_all(rig)
        dockerd.ask("DELETE", "/images/kohaku-bare:1")


async def remove_all(rig: Rig) -> None:
    """Remove what a test has run before its image goes."""
    for handle in rig.handles:
        await rig.backend.remove(handle)


async def test_a_script_without_a_line_that_says_whose_is_explained(rig: Rig) -> None:
    script = rig.root / "data" / "plain"
    script.write_text("echo hi\n")
    script.chmod(0o755)
    mount = Mount(str(rig.root / "data"), "/data", read_only=True)
    launch, handle, folders = rig.launch(TaskSpec(command=("/data/plain",), mounts=(mount,)))
    with pytest.raises(BackendFailed, match="begin it with #!"):
        await rig.backend.start(launch, handle, folders)


async def test_a_mount_below_a_root_is_seen_and_read_only_if_asked(rig: Rig) -> None:
    (rig.root / "data" / "set").mkdir()
    mounts = (
        Mount(str(rig.root / "data" / "set"), "/set"),
        Mount(str(rig.root / "data"), "/data", read_only=True),
    )
    spec = sh("echo 1 > /set/a; echo 2 > /data/set/b || echo no; cat /data/set/a")
    assert await say(rig, msgspec.structs.replace(spec, mounts=mounts)) == "no\n1\n"


async def test_a_link_does_not_lead_out_of_a_root(rig: Rig) -> None:
    (rig.root / "data" / "link").symlink_to("/etc")
    mount = Mount(str(rig.root / "data" / "link"), "/x")
    launch, handle, folders = rig.launch(msgspec.structs.replace(sh("true"), mounts=(mount,)))
    with pytest.raises(BackendFailed, match="leads to /etc, which is not below"):
        await rig.backend.start(launch, handle, folders)


async def test_only_operators_mount_elsewhere_and_nobody_the_daemons_own(rig: Rig) -> None:
    def spec(source: str) -> TaskSpec:
        return msgspec.structs.replace(sh("ls /x"), mounts=(Mount(source, "/x", read_only=True),))

    launch, handle, folders = rig.launch(spec("/etc/ssl"))
    with pytest.raises(BackendFailed, match="is not below a folder that tasks may mount"):
        await rig.backend.start(launch, handle, folders)
    assert "certs" in await say(rig, spec("/etc/ssl"), trusted=True)
    for source in (str(rig.root / "own" / "state"), str(rig.root)):
        launch, handle, folders = rig.launch(spec(source))
        launch = msgspec.structs.replace(launch, trusted=True)
        with pytest.raises(BackendFailed, match="holds data of the cluster's daemons"):
            await rig.backend.start(launch, handle, folders)


async def test_privileges_are_for_operators(rig: Rig) -> None:
    spec = sh("grep -E 'CapEff|NoNewPrivs' /proc/self/status | tr -d '\\n'")
    assert "NoNewPrivs:\t1" in await say(rig, spec)
    privileged = msgspec.structs.replace(spec, privileged=True)
    launch, handle, folders = rig.launch(privileged)
    try:
        await rig.backend.start(msgspec.structs.replace(launch, trusted=True), handle, folders)
    except BackendFailed as error:
        # A machine that is a container itself has not got all that root can have. It is the
        # engine that says so: it was asked.
        refusal = error.message
    else:
        await rig.watch(handle).wait()
        refusal = ""
        assert "NoNewPrivs:\t0" in folders.stdout.read_text()
    assert refusal == "" or "has not got all privileges itself" in refusal
    launch, handle, folders = rig.launch(privileged)
    with pytest.raises(BackendFailed, match="for operators"):
        await rig.backend.start(launch, handle, folders)


async def test_privileges_are_refused_where_the_node_has_none(dockerd: Dockerd, root: Path) -> None:
    async with build_rig(make_maker(dockerd, root, image=TEST_IMAGE), ImagePrograms(), root) as rig:
        assert rig.info.allows == ()
        launch, handle, folders = rig.launch(msgspec.structs.replace(sh("true"), privileged=True))
        launch = msgspec.structs.replace(launch, trusted=True)
        with pytest.raises(BackendFailed, match="this node allows no privileged containers"):
            await rig.backend.start(launch, handle, folders)


async def test_gpus_without_nvidia_say_what_to_install(rig: Rig) -> None:
    launch, handle, folders = rig.launch(sh("true"), Claim(gpus=("GPU-1",)))
    with pytest.raises(BackendFailed, match="install nvidia-container-toolkit"):
        await rig.backend.start(launch, handle, folders)


async def test_an_engine_hears_which_gpus_by_their_uuids(
    root: Path, start_dockerds: Callable[..., None]
) -> None:
    hook = NvidiaHook(root / "hook")
    engine = Dockerd(path=[hook.folder])
    await asyncio.to_thread(start_dockerds, engine)
    make = make_maker(engine, root / "own", image=TEST_IMAGE)
    async with build_rig(make, ImagePrograms(), root) as rig:
        spec = msgspec.structs.replace(
            sh("echo $NVIDIA_VISIBLE_DEVICES $CUDA_VISIBLE_DEVICES"),
            env={"NVIDIA_VISIBLE_DEVICES": "all"},
        )
        said = await say(rig, spec, Claim(gpus=("GPU-aa", "GPU-bb")))
        assert said == "GPU-aa,GPU-bb GPU-aa,GPU-bb\n"
        assert len(hook.containers()) == 1
        assert await say(rig, spec) == "void\n"
        assert len(hook.containers()) == 1


async def test_the_machines_own_image_shows_nothing_else_of_the_machine(
    dockerd: Dockerd, root: Path
) -> None:
    async with build_rig(make_maker(dockerd, root), ImagePrograms(), root) as rig:
        said = await say(
            rig,
            sh("ls /; python3 -c 'import ssl, json; print(6*7)'; id -u; touch /usr/x || echo kept;"
               " cat /etc/shadow || echo none; ls /root || echo closed"),
        )  # fmt: skip
        lines = said.splitlines()
        assert {"42", "kept", "none"} <= set(lines)
        assert "work" not in lines
        assert any(line.isdigit() and int(line) >= 0x70000000 for line in lines)
        launch, handle, folders = rig.launch(msgspec.structs.replace(sh("id"), user="0:0"))
        with pytest.raises(BackendFailed, match="cannot be root there"):
            await rig.backend.start(launch, handle, folders)


async def test_the_owner_of_a_process_is_found_by_its_control_groups(
    rig: Rig, dockerd: Dockerd
) -> None:
    launch, handle, folders = rig.launch(sh("sleep 60"))
    await rig.backend.start(launch, handle, folders)
    (name,) = [name for name in dockerd.containers() if launch.key in name]
    pid = dockerd.ask("GET", f"/containers/{name}/json")["State"]["Pid"]
    assert rig.backend.owner(pid, read_text(f"/proc/{pid}/cgroup")) == launch.task
    assert rig.backend.owner(os.getpid(), read_text("/proc/self/cgroup")) is None


async def test_containers_of_others_are_not_touched(rig: Rig, dockerd: Dockerd, root: Path) -> None:
    """Of people, and of a runner of the same name with another data folder."""
    made = dockerd.ask(
        "POST",
        "/containers/create?name=theirs",
        {"Image": TEST_IMAGE, "Cmd": ["sleep", "60"], "Labels": {"kohaku.node": "test"}},
    )["Id"]
    dockerd.ask("POST", f"/containers/{made}/start")
    other = make_maker(dockerd, root / "other", image=TEST_IMAGE)
    try:
        async with build_rig(other, ImagePrograms(), root) as neighbour:
            handle, _ = await neighbour.start(sh("sleep 60"))
            mine, _ = await rig.start(sh("sleep 60"))
            await rig.backend.tidy([])
            assert (await neighbour.backend.read(handle)) is not None
            assert await rig.backend.read(mine) is None
        assert dockerd.ask("GET", f"/containers/{made}/json")["State"]["Running"]
    finally:
        dockerd.ask("DELETE", f"/containers/{made}?force=1")


async def test_a_container_that_somebody_removes_ends_its_task(rig: Rig, dockerd: Dockerd) -> None:
    launch, handle, folders = rig.launch(sh("sleep 60"))
    await rig.backend.start(launch, handle, folders)
    ended = rig.watch(handle)
    (name,) = [name for name in dockerd.containers() if launch.key in name]
    await asyncio.to_thread(dockerd.ask, "DELETE", f"/containers/{name}?force=1")
    exit_ = await ended.wait()
    assert exit_.cause in {Cause.NODE_FAILED, Cause.SIGNALLED}
    assert "somebody" in exit_.message
    await rig.restart()
    finding = await rig.backend.adopt(handle)
    assert finding.exit is not None
    assert finding.exit.cause is Cause.NODE_FAILED
    assert "removed its container" in finding.exit.message


async def test_a_container_killed_from_outside_says_so(rig: Rig, dockerd: Dockerd) -> None:
    launch, handle, folders = rig.launch(sh("sleep 60"))
    await rig.backend.start(launch, handle, folders)
    ended = rig.watch(handle)
    (name,) = [name for name in dockerd.containers() if launch.key in name]
    dockerd.ask("POST", f"/containers/{name}/kill")
    exit_ = await ended.wait()
    assert (exit_.cause, exit_.signal) == (Cause.SIGNALLED, signal.SIGKILL)
    assert exit_.message == "somebody on test ended its container"


async def test_nothing_is_left_when_all_is_removed(rig: Rig, dockerd: Dockerd) -> None:
    before = dockerd.containers()
    handle, _ = await rig.start(sh("exit 0"))
    await rig.watch(handle).wait()
    await rig.backend.remove(handle)
    assert dockerd.containers() == before
    assert list((rig.root / "own" / "state" / "launches").iterdir()) == []
