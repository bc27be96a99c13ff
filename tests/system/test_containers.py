"""Container tasks as people run them: three nodes, each with a Docker engine of its own.

What every test leaves behind is checked at the end: no container of ours, and one of somebody
else's that is still there.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.docker_images import busybox_image, python_image
from tests.support.dockerds import Dockerd, what_is_missing
from tests.system.container_home import ContainerHome
from tests.system.homes import Home, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IMAGE = "demo:1"
STRANGER = "somebody-elses"


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Dockerd]]:
    """Three engines that go on with their containers when they are killed."""
    if missing := what_is_missing():
        pytest.skip(missing)
    engines = [Dockerd(live_restore=True) for _ in range(3)]
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait_ready()
        # Of the host machine, which is the first node's: only there the image is from the outset.
        engines[0].load(python_image(IMAGE))
        for engine in engines:
            engine.load(busybox_image("bb:1"))
            made = engine.ask(
                "POST", f"/containers/create?name={STRANGER}",
                {"Image": "bb:1", "Cmd": ["sleep", "100000"]},
            )  # fmt: skip
            engine.ask("POST", f"/containers/{made['Id']}/start")
        yield engines
    finally:
        for engine in engines:
            engine.close()


@pytest.fixture(scope="module")
def place(
    engines: list[Dockerd], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ContainerHome]:
    """A cluster without shared storage."""
    yield from _running(engines, tmp_path_factory.mktemp("containers"))


@pytest.fixture
def shared_place(engines: list[Dockerd], tmp_path: Path) -> Iterator[ContainerHome]:
    """A cluster with a folder that all have, each at a path of its own."""
    (tmp_path / "storage").mkdir()
    settings = {}
    for number in range(4):
        (tmp_path / f"mount{number}").symlink_to(tmp_path / "storage")
    settings["KOHAKU_HOSTD_SHARED_DIR"] = str(tmp_path / "mount0")
    runner = {"KOHAKU_RUNNER_SHARED_DIR": str(tmp_path / "mount1")}
    yield from _running(engines, tmp_path / "home", host=settings, runner=runner)


def _running(
    engines: list[Dockerd],
    folder: Path,
    *,
    host: dict[str, str] | None = None,
    runner: dict[str, str] | None = None,
) -> Iterator[ContainerHome]:
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    socket = {"KOHAKU_HOSTD_DOCKER_SOCKET": str(engines[0].socket)}
    place = ContainerHome(Home(folder), engines, {**socket, **(host or {})}, runner or {})
    try:
        place.up()
        place.home.kohaku("environment", "create", "demo", "--from", IMAGE)
        place.home.kohaku("environment", "pack", "demo")
        yield place
    finally:
        place.down()
        for engine in engines:
            wait_for(partial(has_none_of_ours, engine), "our containers to be removed")
            assert engine.containers()[STRANGER]
            state = engine.ask("GET", f"/containers/{STRANGER}/json")["State"]
            assert state["Running"], "a container that is not ours was touched"
            _forget_images(engine)


def ours(engine: Dockerd) -> list[str]:
    """Name the containers of an engine that carry a label of a task."""
    found = engine.ask("GET", '/containers/json?all=1&filters={"label":["kohaku.task"]}')
    return [one["Names"][0] for one in found]


def has_none_of_ours(engine: Dockerd) -> bool:
    """Say whether no container of an engine carries a label of a task."""
    return ours(engine) == []


def _forget_images(engine: Dockerd) -> None:
    """Remove what was brought, so that the next cluster finds nodes that never saw it."""
    for image in engine.ask("GET", "/images/json"):
        if any(tag.startswith("kohaku/") for tag in image["RepoTags"] or ()):
            engine.ask("DELETE", f"/images/{image['Id']}?force=1")


def demo(*command: str, flags: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Give the arguments that submit a task in the environment."""
    return ("task", "submit", "--container", "demo", *flags, "--", *command)


def test_a_packed_environment_runs_on_a_node_that_never_saw_it(place: ContainerHome) -> None:
    for node in ("node2", "node3"):
        done = place.home.run(
            "kohaku",
            *demo("python3", "-c", "print(6*7)", flags=("-t", node, "--follow")),
        )
        assert (done.code, done.out) == (0, "42\n"), (done, place.logs())


def test_it_runs_from_shared_storage_without_a_copy_through_the_host(
    shared_place: ContainerHome,
) -> None:
    done = shared_place.home.run(
        "kohaku", *demo("python3", "-c", "print(6*7)", flags=("-t", "node2", "--follow"))
    )
    assert (done.code, done.out) == (0, "42\n"), (done, shared_place.logs())
    packed = list((shared_place.home.folder.parent / "storage" / "environments").iterdir())
    assert any(file.name.endswith(".tar.zst") for file in packed)

    # The folder is there for all tasks, and what is packed in it for none.
    script = (
        "import os, pathlib;"
        "pathlib.Path('/shared/by-a-task').write_text('1');"
        "print(os.listdir('/shared/environments'))"
    )
    done = shared_place.home.run("kohaku", *demo("python3", "-c", script, flags=("--follow",)))
    assert (done.code, done.out) == (0, "[]\n"), (done, shared_place.logs())
    storage = shared_place.home.folder.parent / "storage"
    assert (storage / "by-a-task").read_text() == "1"
    mount = f"{storage}:/x"
    done = shared_place.home.run("kohaku", *demo("true", flags=("--wait", "--mount", mount)))
    assert done.code != 0, "what is packed was mounted beside the shared folder"


def test_a_task_sees_who_it_is_and_its_own_folders(place: ContainerHome) -> None:
    script = (
        "import os, json, pathlib;"
        "pathlib.Path('/local_temp/x').write_text('1');"
        "print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('KOHAKU_')}))"
    )
    ids = place.home.kohaku(
        *demo("python3", "-c", script, flags=("-t", "node1", "-t", "node2"))
    ).split()
    assert place.home.run("kohaku", "task", "wait", *ids).code == 0, place.logs()
    seen = [json.loads(place.home.kohaku("task", "logs", task)) for task in ids]
    assert [one["KOHAKU_TASK_ID"] for one in seen] == ids
    assert [one["KOHAKU_TASK_INDEX"] for one in seen] == ["0", "1"]
    assert {one["KOHAKU_BATCH_SIZE"] for one in seen} == {"2"}
    assert [one["KOHAKU_NODE"] for one in seen] == ["node1", "node2"]
    assert all(one["KOHAKU_BATCH_HOSTS"].count(",") == 1 for one in seen)


def test_a_memory_hog_is_told_from_one_that_lost_a_child(place: ContainerHome) -> None:
    hog = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    done = place.home.run("kohaku", *demo("python3", "-c", hog, flags=("-m", "64M", "--wait")))
    shown = place.home.json("task", "show", done.out.split()[0])
    assert shown["state"] == "oom_killed", (shown, place.logs())
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hog!r}])"
    done = place.home.run("kohaku", *demo("python3", "-c", parent, flags=("-m", "64M", "--wait")))
    shown = place.home.json("task", "show", done.out.split()[0])
    assert (done.code, shown["state"]) == (0, "completed"), (shown, place.logs())
    assert shown["exit"]["oom_kills"] >= 1
    assert "memory" in shown["reason"]


@pytest.mark.parametrize(
    ("flags", "command", "words"),
    [
        ((), ("no-such-program",), "no-such-program"),
        (("--user", "nobody-knows"), ("true",), "nobody-knows"),
        (("--workdir", "/etc/passwd"), ("true",), "/etc/passwd"),
    ],
)
def test_what_cannot_begin_says_why(
    place: ContainerHome, flags: tuple[str, ...], command: tuple[str, ...], words: str
) -> None:
    done = place.home.run("kohaku", *demo(*command, flags=(*flags, "--wait")))
    shown = place.home.json("task", "show", done.out.split()[0])
    assert shown["state"] == "failed", (shown, place.logs())
    assert shown["exit"]["cause"] == "start_failed"
    assert words in shown["reason"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--container", "no-such"), "no-such"),
        (("--container", "demo", "-m", "1K"), "6 MiB"),
        (("--container", "demo", "--mount", "/etc:/x"), "/etc"),
        (("--container", "demo", "-t", "node1::7"), "GPU"),
        (("--container", "demo", "--image", "x"), "--image"),
        (("--container", "demo", "--backend", "process"), "process"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_door(
    place: ContainerHome, flags: tuple[str, ...], words: str
) -> None:
    done = place.home.run("kohaku", "task", "submit", *flags, "--", "true")
    assert done.code != 0
    assert done.out == ""
    assert words in done.err, done


def test_daemons_killed_in_the_middle_lose_and_repeat_nothing(place: ContainerHome) -> None:
    """kill -9 of engines, runners and host while 60 tasks run; the seed is in the failure."""
    seed = int.from_bytes(os.urandom(4))
    draw = random.Random(seed)
    script = (
        "import os, sys, time;"
        "i = int(os.environ['KOHAKU_TASK_INDEX']);"
        "[(print(n, flush=True), time.sleep(0.01)) for n in range(i * 3)];"
        "sys.exit(i)"
    )
    ids = place.home.kohaku(*demo("python3", "-c", script, flags=("--array", "60"))).split()
    assert len(ids) == 60

    def has_ended(count: int) -> bool:
        rows = place.home.json(
            "task", "list", "--batch", batch_of(place, ids[0]), "--limit", "100"
        )["tasks"]
        return sum(row["state"] in {"completed", "failed"} for row in rows) >= count

    strikes: list[Callable[[], None]] = []
    for number in (1, 2, 3):
        strikes += [
            partial(_crash_engine, place.engines[number - 1]),
            partial(_crash_runner, place, number),
        ]
    strikes += [partial(_crash_host, place)] * 2
    draw.shuffle(strikes)
    for done, strike in enumerate(strikes):
        wait_for(partial(has_ended, 6 * done), f"task {6 * done} to end, seed {seed}", 120)
        strike()
    place.home.run("kohaku", "task", "wait", *ids)
    for index, task in enumerate(ids):
        shown = place.home.json("task", "show", task)
        told = f"seed {seed}: task {task} of index {index}: {shown}\n{place.logs()}"
        assert shown["exit"]["cause"] == "exited", told
        assert shown["exit"].get("code", 0) == index, told
        assert shown["attempt"] == 1, told
        output = place.home.kohaku("task", "logs", task).split()
        assert output == [str(number) for number in range(index * 3)], told


def batch_of(place: ContainerHome, task: str) -> str:
    """Give the batch of a task."""
    return str(place.home.json("task", "show", task)["batch"])


def _crash_engine(engine: Dockerd) -> None:
    engine.kill()
    engine.start()
    engine.wait_ready()


def _crash_runner(place: ContainerHome, number: int) -> None:
    place.kill_runner(number)
    place.start_runner(number)


def _crash_host(place: ContainerHome) -> None:
    place.kill_host()
    place.start_host()


def test_a_container_that_a_killed_task_had_is_gone_with_all_its_processes(
    place: ContainerHome,
) -> None:
    task = place.home.kohaku(*demo("sh", "-c", "sleep 1000 & sleep 1000", flags=("--grace", "1")))
    place.home.wait_state(task, "running")
    node = place.home.json("task", "show", task)["node"]
    engine = place.engines[int(node.removeprefix("node")) - 1]
    (name,) = ours(engine)
    pid = engine.ask("GET", f"/containers{name}/json")["State"]["Pid"]
    place.home.kohaku("task", "kill", task)
    assert place.home.run("kohaku", "task", "wait", task).code == 128 + signal.SIGTERM
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "its first process to be gone")
    wait_for(partial(has_none_of_ours, engine), "its container to be removed")
