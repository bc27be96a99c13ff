"""What an administrator may choose about the docker backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kohaku_daemon.setting_kinds import Size


@dataclass(frozen=True, slots=True)
class DockerSettings:
    """What an administrator may choose about the docker backend."""

    #: Socket of the Docker engine. Where there is none, this backend is left out.
    socket: Path = Path("/var/run/docker.sock")
    #: Folders of this machine that every container sees, each as "SOURCE:DESTINATION", or with
    #: ":ro" behind it to be read only.
    mounts: tuple[str, ...] = ()
    #: Folders of this machine below which tasks may name mounts of their own, beside the shared
    #: folder. Containers write there as their own user, which may be root: let it be a file
    #: system that is mounted with nosuid, or one whose users you trust.
    mount_roots: tuple[Path, ...] = ()
    #: Let operators mount any folder of this machine but the daemons' own.
    allow_any_mount: bool = False
    #: Let operators have privileged containers, which can do all that root can on this machine.
    allow_privileged: bool = False
    #: Folders of this machine that tasks without an image see, read only, to find their programs
    #: in. File systems mounted below one of these are not seen unless they are named too.
    machine_folders: tuple[Path, ...] = (Path("/usr"), Path("/opt"))
    #: Processes and threads a container may have at once.
    max_processes: int = 8192
    #: Control group that containers are put below; empty for the engine's own choice.
    cgroup_parent: str = ""
    #: Where the cgroup file systems are, to read what containers use.
    cgroup_root: Path = Path("/sys/fs/cgroup")
    #: What is kept free of the disk that the engine has its images on: unused environments and
    #: images that this node brought go, the one unused longest first. Of a small disk, 10 %.
    images_free: Size = 10 * 2**30
