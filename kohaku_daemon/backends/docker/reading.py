"""What an engine says of itself and of its images, as far as it matters here.

Knows: the layout of its answers (Docker Engine API 1.41, SystemInfo and ImageInspect).
Does not know: how it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kohaku_daemon.backends.docker.settings import DockerSettings
from protocol.models.node import BackendInfo
from protocol.models.task import DOCKER


def describe_engine(
    told: Mapping[str, Any], settings: DockerSettings, shared_dir: str
) -> BackendInfo:
    """Say what an engine allows, out of its answer to ``/info``."""
    # GPUs are devices that a container does not have unless they were claimed for it.
    enforces = ["adopt", "gpus", "pause"]
    if told.get("MemoryLimit"):
        enforces.append("memory")
    if told.get("CPUSet"):
        enforces += ["cores", "numa"]
    allows = {"privileged": settings.allow_privileged, "any-mount": settings.allow_any_mount}
    roots = [str(root) for root in settings.mount_roots]
    return BackendInfo(
        DOCKER,
        isolation=f"containers, Docker {told.get('ServerVersion', '')},"
        f" cgroup v{told.get('CgroupVersion') or 1}",
        enforces=tuple(sorted(enforces)),
        mount_roots=(*roots, *([shared_dir] if shared_dir else [])),
        allows=tuple(name for name, given in allows.items() if given),
    )


def read_image(told: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Give the variables and the working folder of an image, empty for none."""
    config = told.get("Config") or {}
    pairs = (str(one).partition("=") for one in config.get("Env") or ())
    env = {name: value for name, _, value in pairs}
    # Docker's own choice, which is no choice of the image's.
    workdir = str(config.get("WorkingDir") or "")
    return env, "" if workdir == "/" else workdir
