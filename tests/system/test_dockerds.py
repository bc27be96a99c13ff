"""What the other tests with real engines rely on: they start, survive a crash, leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.docker_fixtures import (
    TEST_IMAGE,
    StartDockerds,
    need_dockerd,
    need_registry,
)
from tests.support.docker_images import bare_image, big_image, busybox_image, python_image
from tests.support.docker_registry import USER, Registry, login_header
from tests.support.dockerds import Dockerd, DockerRefused, is_alive
from tests.support.nvidia_hook import NvidiaHook, device_requests

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

#: Both kinds of machines that these tests may meet, made of the one they run on.
LAYOUTS = {
    "version 2 alone": """
        awk '$3 ~ "^cgroup" {print $2}' /proc/mounts | sort -r | xargs -n 1 umount
        # What is left of a machine with version 1: the tmpfs that held the mounts of it.
        [ "$(stat -f -c %T /sys/fs/cgroup)" = sysfs ] || umount /sys/fs/cgroup
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
    """,
    "as it is": "",
}

#: Starts an engine with a container that runs and one that is paused, says its name and folder.
PROGRAM = f"""
import sys
from tests.support.docker_images import busybox_image
from tests.support.dockerds import Dockerd

dockerd = Dockerd(live_restore=True)
dockerd.start()
dockerd.wait_ready()
dockerd.load(busybox_image({TEST_IMAGE!r}))
for name in "runs", "paused":
    wanted = {{"Image": {TEST_IMAGE!r}, "Cmd": ["sleep", "1000"]}}
    dockerd.ask("POST", f"/containers/create?name={{name}}", wanted)
    dockerd.ask("POST", f"/containers/{{name}}/start")
dockerd.ask("POST", "/containers/paused/pause")
dockerd.kill()
dockerd.start()
dockerd.wait_ready()
assert dockerd.ask("GET", "/containers/runs/json")["State"]["Status"] == "running"
assert dockerd.ask("GET", "/containers/paused/json")["State"]["Status"] == "paused"
assert dockerd.run({TEST_IMAGE!r}, "echo", "hi") == (0, "hi\\n")
print(dockerd.name, dockerd.folder, flush=True)
sys.stdin.read()
dockerd.close()
"""


@pytest.fixture(autouse=True)
def _can_run() -> None:
    need_dockerd()


@pytest.fixture(scope="module")
def two(start_dockerds: StartDockerds) -> tuple[Dockerd, Dockerd]:
    """Two engines that the tests of this module share."""
    one, other = Dockerd(), Dockerd()
    start_dockerds(one, other)
    return one, other


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_stays_after_a_crash_of_dockerd(layout: str) -> None:
    with _program(LAYOUTS[layout]) as (process, name, folder):
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")
        assert _traces(name, folder) == []


def test_nothing_stays_after_the_tests_themselves_are_killed() -> None:
    with _program("") as (process, name, folder):
        assert len(_traces(name, folder)) > 5  # the search finds something where there is something
        process.kill()
        _until(lambda: not _traces(name, folder))


def test_dockerd_that_stays_down_leaves_no_containers_either() -> None:
    dockerd = Dockerd()
    try:
        dockerd.start()
        dockerd.wait_ready()
        dockerd.load(busybox_image(TEST_IMAGE))
        pid = _start_sleeper(dockerd)
        dockerd.kill()
        assert dockerd.pid is None
        assert is_alive(pid)
    finally:
        dockerd.close()
    assert not is_alive(pid)
    assert _traces(dockerd.name, dockerd.folder) == []


def test_a_stop_ends_containers_unless_they_are_to_live(start_dockerds: StartDockerds) -> None:
    mortal, lasting = Dockerd(), Dockerd(live_restore=True)
    start_dockerds(mortal, lasting)
    pids = {each: _start_sleeper(each) for each in (mortal, lasting)}
    for dockerd in pids:
        dockerd.stop()
        assert dockerd.pid is None
    assert not is_alive(pids[mortal])
    assert is_alive(pids[lasting])

    for dockerd in pids:
        dockerd.start()
    for dockerd in pids:
        dockerd.wait_ready()
    assert mortal.ask("GET", "/containers/sleeper/json")["State"]["Status"] == "exited"
    assert lasting.ask("GET", "/containers/sleeper/json")["State"]["Pid"] == pids[lasting]


def test_engines_know_nothing_of_each_other(two: tuple[Dockerd, Dockerd]) -> None:
    for dockerd in two:
        # The same address in both: their networks are their own.
        network = {"NetworkMode": "bridge"}
        status, said = dockerd.run(TEST_IMAGE, "ip", "-o", "-4", "addr", host=network)
        assert (status, "172.17.0.2/16" in said) == (0, True)
    ids = {dockerd.ask("GET", "/info")["ID"] for dockerd in two}
    assert len(ids) == 2
    assert [dockerd.containers() for dockerd in two] == [{}, {}]


def test_what_does_not_start_says_why_and_leaves_nothing() -> None:
    dockerd = Dockerd(flags=["--no-such-flag"])
    with pytest.raises(RuntimeError, match="no-such-flag"), dockerd:
        pass
    assert _traces(dockerd.name, dockerd.folder) == []


def test_a_folder_too_deep_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long"):
        Dockerd(folder=tmp_path / ("x" * 100))


def test_a_full_disk_refuses_an_image(tmp_path: Path) -> None:
    image = big_image(tmp_path / "big.tar", "big:1", 40 * 2**20)
    with Dockerd(disk_mib=30) as dockerd, pytest.raises(DockerRefused, match="no space left"):
        dockerd.load(image)


def test_images_run(two: tuple[Dockerd, Dockerd], tmp_path: Path) -> None:
    dockerd, _ = two
    dockerd.load(bare_image("bare:1"))
    assert dockerd.run("bare:1", "/busybox", "echo", "hi") == (0, "hi\n")
    with pytest.raises(DockerRefused, match="executable file not found"):
        dockerd.run("bare:1", "sh")

    dockerd.load(python_image("python:1"))
    script = "import ctypes, lzma, sqlite3, ssl; print(6*7)"
    assert dockerd.run("python:1", "python3", "-c", script) == (0, "42\n")

    dockerd.load(big_image(tmp_path / "big.tar", "big:1", 10_000_001, layers=3))
    status, said = dockerd.run("big:1", "sh", "-c", "cat /noise/* | wc -c")
    assert (status, said.strip()) == (0, "10000001")


def test_an_image_has_what_was_asked_for_and_the_same_id(two: tuple[Dockerd, Dockerd]) -> None:
    image = busybox_image(
        "own:1", env={"A": "1"}, workdir="/home/worker", user="worker", files={"/opt/x": b"x\n"}
    )
    for dockerd in two:
        dockerd.load(image)
    status, said = two[0].run("own:1", "sh", "-c", "pwd; id -un; echo $A; cat /opt/x; test -w /tmp")
    assert (status, said.split()) == (0, ["/home/worker", "worker", "1", "x"])
    assert len({dockerd.ask("GET", "/images/own:1/json")["Id"] for dockerd in two}) == 1


def test_what_one_engine_pushes_another_pulls(two: tuple[Dockerd, Dockerd], tmp_path: Path) -> None:
    need_registry()
    one, other = two
    other.load(busybox_image("other:1", env={"A": "2"}))
    with Registry(tmp_path) as registry:
        registry.serve(one)
        registry.serve(other)
        pinned = registry.push(other, "other:1", "lab/bb:1")
        registry.pull(one, pinned)
        assert one.run(pinned, "sh", "-c", "echo $A") == (0, "2\n")

        wrong = login_header(USER, "wrong", registry.address)
        with pytest.raises(DockerRefused, match="authentication required"):
            registry.pull(one, registry.reference("lab/bb:1"), login=wrong)
        with pytest.raises(DockerRefused, match="manifest unknown"):
            registry.pull(one, registry.reference("lab/bb:2"))
        registry.stop(one)
        with pytest.raises(DockerRefused, match="connection refused"):
            registry.pull(one, registry.reference("lab/bb:1"))
        registry.pull(other, registry.reference("lab/bb:1"))


def test_gpus_are_given_where_there_is_a_hook(
    two: tuple[Dockerd, Dockerd], start_dockerds: StartDockerds, tmp_path: Path
) -> None:
    hook = NvidiaHook(tmp_path)
    dockerd = Dockerd(path=[hook.folder])
    start_dockerds(dockerd)
    asked = {"DeviceRequests": device_requests("GPU-a", "GPU-b")}
    seen = dockerd.run(TEST_IMAGE, "sh", "-c", "echo $NVIDIA_VISIBLE_DEVICES", host=asked)
    assert seen == (0, "GPU-a,GPU-b\n")
    assert len(hook.containers()) == 1

    hook.refuse("no such GPU")
    with pytest.raises(DockerRefused, match="no such GPU"):
        dockerd.run(TEST_IMAGE, "true", host=asked)
    hook.accept()
    assert dockerd.run(TEST_IMAGE, "true", host=asked) == (0, "")
    with pytest.raises(DockerRefused, match="could not select device driver"):
        two[0].run(TEST_IMAGE, "true", host=asked)


@contextmanager
def _program(layout: str) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """Run PROGRAM where control groups are mounted as ``layout`` says, until it has an engine."""
    python = f'exec {sys.executable} -c "$1"'
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-ec", f"{layout}\n{python}", "sh", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            said = process.stdout.readline().decode().split()
            if len(said) != 2:
                pytest.fail(process.stderr.read().decode())
            yield process, said[0], Path(said[1])
        finally:
            process.kill()


def _start_sleeper(dockerd: Dockerd) -> int:
    # SIGTERM does nothing to a pid 1 that has no handler for it, and dockerd would wait 10 s.
    wanted = {"Image": TEST_IMAGE, "Cmd": ["sleep", "1000"], "StopSignal": "SIGKILL"}
    dockerd.ask("POST", "/containers/create?name=sleeper", wanted)
    dockerd.ask("POST", "/containers/sleeper/start")
    pid = dockerd.ask("GET", "/containers/sleeper/json")["State"]["Pid"]
    assert isinstance(pid, int)
    return pid


def _traces(name: str, folder: Path) -> list[str]:
    """What is left of an engine: folders, processes, namespaces' mounts, control groups."""
    found = [str(folder)] if folder.exists() else []
    found += [place for place, _, _ in os.walk("/sys/fs/cgroup") if f"/{name}" in place]
    for process in Path("/proc").glob("[0-9]*"):
        if not is_alive(int(process.name)):
            continue
        # OSError: it ended since it was listed.
        with suppress(OSError):
            for file in ("cmdline", "cgroup", "mounts"):
                content = (process / file).read_text(errors="replace")
                if name in content or str(folder) in content:
                    found.append(f"{process}/{file}")
    return found


def _until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)
