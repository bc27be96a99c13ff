"""From a launch to what Docker is told to make of it.

Knows: how a claim, a spec and the node's policy are written as a container (Docker Engine API
1.41, ContainerCreate). Does not know: engines, the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kohaku_daemon.backends.base import BackendFailed, TaskFolders
from kohaku_daemon.backends.docker.init import find_candidates, make_arguments
from kohaku_daemon.backends.docker.mounts import LOCAL_TEMP, OURS, SHARED, bind
from kohaku_daemon.backends.docker.settings import DockerSettings
from kohaku_daemon.backends.variables import tell_launch
from kohaku_daemon.core.workload import Launch
from protocol.models.task import Network

#: Labels by which our containers are found. Names are for people.
RUNNER_LABEL: Final = "kohaku.runner"
PLAN_LABEL: Final = "kohaku.plan"
TASK_LABEL: Final = "kohaku.task"

#: Where the folder of the output files and our own helper are in each container.
INIT: Final = f"{OURS}/init"
_STDOUT: Final = f"{OURS}/stdout"
_STDERR: Final = f"{OURS}/stderr"
_EXIT: Final = f"{OURS}/exit"

#: Where programs are that no image and no spec says.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Less is refused by Docker (20.10, "Minimum memory limit allowed is 6MB").
_LEAST_MEMORY: Final = 6 * 2**20
#: Users of tasks that name no image, one each: those of the process backend, see
#: ``ProcessSettings``. Root could read what others may not in the folders that they see.
_USERS: Final = range(0x70000000, 0x78000000)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a container gets of its image."""

    id: str
    #: For people, such as ``image python:3.12``.
    title: str
    env: Mapping[str, str]
    #: Empty for none.
    workdir: str = ""
    #: It has the machine's own programs, see ``machine``.
    is_machine: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all containers of a node share."""

    node: str
    #: Tells this runner's containers from those of others on the same engine.
    runner: str
    #: Path of ``init`` on the machine.
    init: str
    settings: DockerSettings
    #: Path of the shared folder on the machine; empty if there is none.
    shared_dir: str = ""


def write_container(
    launch: Launch,
    plan: str,
    image: ImageFacts,
    here: Surroundings,
    *,
    folders: TaskFolders,
    exit_file: str,
    mounts: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Write the body of ContainerCreate.

    Args:
        launch: What to run.
        plan: Name of this plan of it.
        image: What it runs in.
        here: What all containers share.
        folders: Its scratch folder, as it is to be mounted, and output files.
        exit_file: What ``init`` writes into.
        mounts: Others, as ``mounts`` writes them.

    Raises:
        BackendFailed: The node does not give what it asks for.
    """
    _check(launch, image, here.settings)
    spec = launch.spec
    env = _build_environment(launch, image, here)
    candidates = find_candidates(spec.command[0], env.get("PATH", _PATH))
    ours = [
        bind(here.init, INIT, read_only=True),
        bind(str(folders.stdout), _STDOUT),
        bind(str(folders.stderr), _STDERR),
        bind(exit_file, _EXIT),
        bind(str(folders.scratch), LOCAL_TEMP),
    ]
    shared = [bind(here.shared_dir, SHARED)] if here.shared_dir else []
    return {
        "Image": image.id,
        "Entrypoint": [INIT],
        "Cmd": make_arguments(_STDOUT, _STDERR, _EXIT, candidates, spec.command),
        "Env": [f"{name}={value}" for name, value in env.items()],
        "WorkingDir": spec.workdir or image.workdir or LOCAL_TEMP,
        "User": spec.user or (_choose_user(plan) if image.is_machine else ""),
        "Hostname": f"task-{launch.task}",
        "Labels": _label(launch, plan, here),
        # The image's own check would start a program of its own in the task, over and over.
        "Healthcheck": {"Test": ["NONE"]},
        "StopSignal": "SIGTERM",
        "HostConfig": {
            **_limit(launch, here.settings),
            "Mounts": [*ours, *shared, *mounts],
            "NetworkMode": "none" if spec.network is Network.NONE else "default",
            "LogConfig": {"Type": "none"},
            "RestartPolicy": {"Name": ""},
            "AutoRemove": False,
            "Init": False,
            "Privileged": spec.privileged,
            "SecurityOpt": [] if spec.privileged else ["no-new-privileges"],
            "CgroupParent": here.settings.cgroup_parent,
        },
    }


def _limit(launch: Launch, settings: DockerSettings) -> dict[str, Any]:
    """Write what a launch is held to, out of its claim and its spec."""
    claim, spec = launch.claim, launch.spec
    ulimits = [
        {"Name": name, "Soft": soft, "Hard": hard} for name, (soft, hard) in spec.ulimits.items()
    ]
    devices = [{"DeviceIDs": list(claim.gpus), "Capabilities": [["gpu"]]}] if claim.gpus else []
    return {
        "CpusetCpus": ",".join(map(str, claim.cores)),
        "CpusetMems": "" if claim.numa is None else str(claim.numa),
        "Memory": claim.memory,
        # With swap it is the same: a task over its claim must not crawl.
        "MemorySwap": claim.memory,
        "PidsLimit": settings.max_processes,
        "ShmSize": spec.shm_size,
        "Ulimits": ulimits,
        "DeviceRequests": devices,
    }


def _check(launch: Launch, image: ImageFacts, settings: DockerSettings) -> None:
    claim, spec = launch.claim, launch.spec
    if 0 < claim.memory < _LEAST_MEMORY:
        raise BackendFailed(
            f"memory of {claim.memory} bytes is less than the 6 MiB that Docker gives a container:"
            " ask for more, such as -m 64M"
        )
    if spec.privileged and not launch.trusted:
        raise BackendFailed(
            "privileged containers are for operators: submit it without --privileged"
        )
    if spec.privileged and not settings.allow_privileged:
        raise BackendFailed(
            "this node allows no privileged containers: set docker.allow_privileged of its"
            " runner, or run the task on another node"
        )
    if image.is_machine and spec.user.partition(":")[0] in {"0", "root"} and not launch.trusted:
        raise BackendFailed(
            "a task without an image sees the machine's own programs and cannot be root there:"
            " name an image, or leave out --user"
        )


def _build_environment(launch: Launch, image: ImageFacts, here: Surroundings) -> dict[str, str]:
    """Build what the container's variables are, beside those of its image.

    The spec's win over the image's. Those that say which launch this is, and which GPUs it
    holds, win over both.
    """
    usual = dict(image.env)
    if image.is_machine:
        usual |= {
            "PATH": _PATH,
            "HOME": LOCAL_TEMP,
            "TMPDIR": "/tmp",
            "LANG": "C.UTF-8",
            "SHELL": "/bin/sh",
            "USER": "kohaku",
            "LOGNAME": "kohaku",
        }
    told = tell_launch(
        launch,
        node=here.node,
        local_temp=LOCAL_TEMP,
        shared_dir=SHARED if here.shared_dir else "",
    )
    env = {**usual, **launch.spec.env, **told}
    # Docker sets it to what is asked for in DeviceRequests. Where NVIDIA's runtime is the default
    # of the engine, the variable alone would open GPUs that were not claimed.
    env.pop("NVIDIA_VISIBLE_DEVICES", None)
    if not launch.claim.gpus:
        env["NVIDIA_VISIBLE_DEVICES"] = "void"
    return env


def _label(launch: Launch, plan: str, here: Surroundings) -> dict[str, str]:
    return {
        TASK_LABEL: str(launch.task),
        "kohaku.attempt": str(launch.attempt),
        "kohaku.batch": str(launch.batch),
        "kohaku.node": here.node,
        RUNNER_LABEL: here.runner,
        PLAN_LABEL: plan,
    }


def _choose_user(plan: str) -> str:
    """Choose the user of a launch, as the process backend does."""
    digest = hashlib.blake2b(plan.encode(), digest_size=8).digest()
    user = _USERS[int.from_bytes(digest, "big") % len(_USERS)]
    return f"{user}:{user}"
