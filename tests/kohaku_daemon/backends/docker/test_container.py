"""How a launch is written as a container: no engine, no disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kohaku_daemon.backends.base import BackendFailed, TaskFolders
from kohaku_daemon.backends.docker.container import ImageFacts, Surroundings, write_container
from kohaku_daemon.backends.docker.settings import DockerSettings
from kohaku_daemon.core.workload import Launch
from protocol.ids import BatchId, TaskId
from protocol.models.task import Claim, Network, TaskSpec

IMAGE = ImageFacts("sha256:1", "image python:3", {"PATH": "/opt/bin", "A": "image"}, "/srv")
MACHINE = ImageFacts("sha256:2", "the node itself", {}, is_machine=True)
PLAN = "7-2-0123456789abcdef"


def write(
    claim: Claim | None = None,
    image: ImageFacts = IMAGE,
    settings: DockerSettings | None = None,
    *,
    trusted: bool = False,
    **fields: Any,
) -> dict[str, Any]:
    spec = msgspec.structs.replace(TaskSpec(command=("run", "-x")), **fields)
    launch = Launch(
        task=TaskId(7), attempt=2, batch=BatchId(6), spec=spec, claim=claim or Claim(),
        trusted=trusted,
    )  # fmt: skip
    here = Surroundings("node1", "node1-abc", "/state/init-1", settings or DockerSettings())
    folders = TaskFolders(Path("/scratch/files"), Path("/logs/7.stdout"), Path("/logs/7.stderr"))
    return write_container(
        launch, PLAN, image, here, folders=folders, exit_file="/state/exit", mounts=[]
    )


def test_a_claim_becomes_limits_with_cores_and_their_memory_together() -> None:
    host = write(Claim(cores=(0, 2), memory=64 << 20, numa=1))["HostConfig"]
    assert (host["CpusetCpus"], host["CpusetMems"]) == ("0,2", "1")
    assert host["Memory"] == host["MemorySwap"] == 64 << 20, "swap would make it crawl"
    assert host["DeviceRequests"] == []


def test_no_claim_is_no_limit() -> None:
    host = write()["HostConfig"]
    assert (host["CpusetCpus"], host["CpusetMems"], host["Memory"]) == ("", "", 0)
    assert host["PidsLimit"] == DockerSettings().max_processes, "but a fork bomb has an end"


def test_gpus_are_asked_for_by_uuid() -> None:
    body = write(Claim(gpus=("GPU-a", "GPU-b")), env={"NVIDIA_VISIBLE_DEVICES": "all"})
    (request,) = body["HostConfig"]["DeviceRequests"]
    assert request == {"DeviceIDs": ["GPU-a", "GPU-b"], "Capabilities": [["gpu"]]}
    assert not [line for line in body["Env"] if line.startswith("NVIDIA_VISIBLE_DEVICES=")]


def test_without_a_claim_no_variable_opens_a_gpu() -> None:
    env = write(env={"NVIDIA_VISIBLE_DEVICES": "all"})["Env"]
    assert [line for line in env if line.startswith("NVIDIA_")] == ["NVIDIA_VISIBLE_DEVICES=void"]


def test_the_program_is_looked_for_where_the_spec_says_then_the_image_then_as_usual() -> None:
    assert "/own/run" in write(env={"PATH": "/own"})["Cmd"]
    assert "/opt/bin/run" in write()["Cmd"]
    assert "/usr/bin/run" in write(image=MACHINE)["Cmd"]
    assert write()["Cmd"][-3:] == ["", "run", "-x"]


def test_variables_of_the_spec_win_over_the_images_and_ours_over_both() -> None:
    env = write(env={"A": "spec", "KOHAKU_TASK_ID": "1"})["Env"]
    assert "A=spec" in env
    assert "KOHAKU_TASK_ID=7" in env
    assert "KOHAKU_TASK_ID=1" not in env


@pytest.mark.parametrize(
    ("image", "workdir", "expected"),
    [(IMAGE, "", "/srv"), (IMAGE, "/x", "/x"), (MACHINE, "", "/local_temp")],
)
def test_it_begins_where_the_spec_says_or_the_image_or_in_its_own_folder(
    image: ImageFacts, workdir: str, expected: str
) -> None:
    assert write(image=image, workdir=workdir)["WorkingDir"] == expected


def test_nothing_that_docker_would_add_changes_what_runs() -> None:
    body = write()
    host = body["HostConfig"]
    assert body["Entrypoint"] == ["/.kohaku/init"], "the image's own is not run"
    assert body["Healthcheck"] == {"Test": ["NONE"]}
    assert host["RestartPolicy"] == {"Name": ""}
    assert (host["AutoRemove"], host["Init"]) == (False, False)
    assert host["LogConfig"] == {"Type": "none"}


def test_its_labels_say_whose_it_is() -> None:
    assert write()["Labels"] == {
        "kohaku.task": "7",
        "kohaku.attempt": "2",
        "kohaku.batch": "6",
        "kohaku.node": "node1",
        "kohaku.runner": "node1-abc",
        "kohaku.plan": PLAN,
    }


def test_rights_are_not_gained_but_by_operators_where_the_node_allows_it() -> None:
    assert write()["HostConfig"]["SecurityOpt"] == ["no-new-privileges"]
    allowing = DockerSettings(allow_privileged=True)
    host = write(settings=allowing, trusted=True, privileged=True)["HostConfig"]
    assert (host["Privileged"], host["SecurityOpt"]) == (True, [])
    with pytest.raises(BackendFailed, match="for operators"):
        write(settings=allowing, privileged=True)
    with pytest.raises(BackendFailed, match="this node allows no privileged"):
        write(trusted=True, privileged=True)


def test_in_the_machines_own_image_everybody_is_somebody_else() -> None:
    user, group = write(image=MACHINE)["User"].split(":")
    assert user == group
    assert 0x70000000 <= int(user) < 0x78000000
    assert write()["User"] == "", "an image has its own choice"
    for root in ("root", "0", "0:0", "root:root"):
        with pytest.raises(BackendFailed, match="cannot be root there"):
            write(image=MACHINE, user=root)
    assert write(image=MACHINE, user="0", trusted=True)["User"] == "0"


def test_networks_limits_and_users_are_passed_on() -> None:
    body = write(
        network=Network.NONE, shm_size=1 << 20, user="1000:1000", ulimits={"nofile": (1, -1)}
    )
    host = body["HostConfig"]
    assert (host["NetworkMode"], host["ShmSize"], body["User"]) == ("none", 1 << 20, "1000:1000")
    assert host["Ulimits"] == [{"Name": "nofile", "Soft": 1, "Hard": -1}]


def test_memory_that_docker_refuses_is_refused_in_words() -> None:
    with pytest.raises(BackendFailed, match="less than the 6 MiB"):
        write(Claim(memory=1024))
