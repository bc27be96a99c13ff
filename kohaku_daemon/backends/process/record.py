"""What a launch leaves in its state folder, so that any later runner can find it again.

One file, ``keeper``, of at most two lines of JSON. The first says who holds the launch. It
appears whole and never changes: the file is made by ``link(2)``, which fails if the name
exists. The shim makes it before it runs anything; a runner that decides "this never started"
makes it in the shim's place, and the shim, however late it comes, then finds the launch taken
and runs nothing. The second line says how the launch ended. It is appended by one ``write``
into a block the file already has, so that a disk the task itself has filled loses no exit.

Nothing is synced: a power cut may take the file or its content, and is recognised by the boot
id, which the handle carries too. Standard library only: the launcher runs it without
site-packages.
"""

from __future__ import annotations

import json
import os
from typing import Any, Final, NamedTuple, TypedDict

from kohaku_daemon.backends.process.files import append_text, read_text, write_text

_FILE: Final = "keeper"


class GroupPlan(TypedDict):
    """The cgroup of a launch: which folders to make, what to write into them, in order."""

    #: Controller (``memory``, ``cpuset`` ..., or ``unified`` for cgroup v2) to folder.
    folders: dict[str, str]
    #: File and value.
    settings: list[tuple[str, str]]


class SandboxPlan(TypedDict):
    """The namespaces of a launch."""

    #: Whether a user namespace must give the right to make the others.
    user: bool
    hostname: str
    #: Folders replaced by empty ones.
    hidden: list[str]
    #: Folders that stay writable beside the scratch folder.
    writable: list[str]
    #: Bytes that each private temporary folder may hold; 0 for the kernel's default.
    tmp_size: int


class LaunchPlan(TypedDict):
    """All that the launcher needs for one launch. It goes to it as one line of JSON."""

    #: The launch's state folder. It exists.
    folder: str
    argv: list[str]
    env: dict[str, str]
    #: Folder to start in.
    workdir: str
    scratch: str
    stdout: str
    stderr: str
    #: User and group to run as; -1 to stay who we are.
    uid: int
    #: Cores to run on where no cpuset holds it; empty for all.
    cores: list[int]
    #: Bytes of address space of each process; 0 for no limit.
    address_space: int
    group: GroupPlan | None
    sandbox: SandboxPlan | None
    #: What the launch is given, for people. Kept, so that it can be said again.
    note: str
    #: Of this boot of the machine.
    boot: str


class Keeper(NamedTuple):
    """Who holds a launch: a shim, or, with pid 0, nobody for ever."""

    pid: int
    #: The shim's start in clock ticks after boot: tells it from a later owner of its pid.
    start: int
    #: Of the machine's boot it ran in.
    boot: str
    #: UTC seconds at which the program was started.
    started_at: float
    #: Pid of the namespace's first process, which belongs to us; 0 without namespaces.
    init: int
    #: User the launch has for itself; -1 if it shares the runner's.
    uid: int
    #: See ``GroupPlan.folders``; empty without cgroups.
    group: dict[str, str]
    note: str


#: What a runner leaves that decided: this launch shall never start.
NOBODY: Final = Keeper(0, 0, "", 0.0, 0, -1, {}, "")


class Ending(NamedTuple):
    """How a launch ended, as the kernel told the shim."""

    #: As of ``wait4``.
    status: int
    #: UTC seconds.
    ended_at: float
    #: Processes of the launch the kernel killed for memory.
    oom_kills: int = 0
    #: Seconds of CPU of the program and of the children it waited for.
    user_s: float = 0.0
    system_s: float = 0.0
    #: Bytes; the largest of its processes.
    peak_memory: int = 0
    #: Why it did not start; empty if it did.
    error: str = ""


def take(folder: str, keeper: Keeper) -> bool:
    """Try to become the keeper of a launch. Only one ever succeeds.

    Raises:
        OSError: The folder is gone or cannot be written.
    """
    draft = f"{folder}/.{_FILE}.{os.getpid()}"
    write_text(draft, json.dumps(keeper) + "\n")
    try:
        os.link(draft, f"{folder}/{_FILE}")
    except FileExistsError:
        return False
    finally:
        os.unlink(draft)
    return True


def write_ending(folder: str, ending: Ending) -> None:
    """Record how a launch ended, below its keeper.

    Raises:
        OSError: The folder is gone or cannot be written.
    """
    append_text(f"{folder}/{_FILE}", json.dumps(ending) + "\n")


def read_keeper(folder: str) -> Keeper | None:
    """Read who holds a launch; None if nobody has decided yet."""
    fields = _read_line(folder, 0)
    return None if fields is None else Keeper(*fields)


def read_ending(folder: str) -> Ending | None:
    """Read how a launch ended; None if that is not recorded."""
    fields = _read_line(folder, 1)
    return None if fields is None else Ending(*fields)


def _read_line(folder: str, number: int) -> list[Any] | None:
    try:
        *lines, _ = read_text(f"{folder}/{_FILE}").split("\n")
        fields: list[Any] = json.loads(lines[number])
    except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
        # ValueError: a power cut may leave the name without its content (ext4 writes data
        # after names). That is as good as no file: the boot id tells what happened.
        return None
    return fields
