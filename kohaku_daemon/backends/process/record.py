"""What a launch leaves behind, so that any later runner can find it again: one small file.

Knows: who takes a launch, and how that is decided once. Does not know: processes, plans' use.

The runner makes the file, empty, before it sends the plan, and unlinks it when the launch is
removed. All else is lines of JSON at its end, each added by one ``write`` with O_APPEND:

- ``keeper``: who holds the launch. The first such line counts, for ever: the kernel puts lines
  of several writers in an order, and whoever wants the launch looks afterwards whether its line
  is the first. A keeper adds it before it runs anything; a runner that decides "this never
  started" adds one that names nobody, and the keeper, however late it comes, runs nothing. A
  file that is gone cannot be taken either.
- ``free``: the guard of a keeper that was killed between taking and starting says that nothing
  ran: the next ``keeper`` line counts.
- ``program``: it runs, under this pid.
- ``status``: of a program in namespaces, how it ended, while what is left of it is being ended.
- ``ending``: how it ended, and that nothing is left of it. It fits into the block that the file
  already has, so that a disk the task itself has filled loses no exit.

Nothing is synced: a power cut may take the file or its content, and is recognised by the boot
id, which the handle carries too. Standard library only: the keeper runs it without
site-packages.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Final, NamedTuple, TypedDict

from kohaku_daemon.backends.process.files import append_text, read_text

_KEEPER: Final = "keeper"
_FREE: Final = "free"
_PROGRAM: Final = "program"
_STATUS: Final = "status"
_ENDING: Final = "ending"


class GroupPlan(TypedDict):
    """The cgroup of a launch: which folders to make, what to write into them, in order."""

    #: Controller (``memory``, ``cpuset`` ..., or ``unified`` for cgroup v2) to folder.
    folders: dict[str, str]
    #: File and value.
    settings: list[tuple[str, str]]
    #: Controller to the folder that keepers stay in when they are not starting something.
    homes: dict[str, str]


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
    """All that a keeper needs for one launch. It goes to it as one line of JSON."""

    #: The launch's record. The file exists.
    record: str
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
    #: Bytes that the launch's cgroup may use; 0 for no limit.
    memory: int
    group: GroupPlan | None
    sandbox: SandboxPlan | None
    #: What the launch is given, for people. Kept, so that it can be said again.
    note: str
    #: Of this boot of the machine.
    boot: str


class Keeper(NamedTuple):
    """Who holds a launch: a keeper and its guard, or, with pid 0, nobody for ever."""

    pid: int
    #: Its start in clock ticks after boot: tells it from a later owner of its pid.
    start: int
    #: The process that goes on keeping if the keeper is killed, and its start.
    guard: int
    guard_start: int
    #: Of the machine's boot it ran in.
    boot: str
    #: UTC seconds at which the program was started.
    started_at: float
    #: User the launch has for itself; -1 if it shares the runner's.
    uid: int
    #: See ``GroupPlan.folders``; empty without cgroups.
    group: dict[str, str]
    note: str
    #: Files and, in the keeper's and guard's table, the pipes that they are filled from.
    outputs: list[tuple[str, int]]


#: What a runner leaves that decided: this launch shall never start.
NOBODY: Final = Keeper(0, 0, 0, 0, "", 0.0, -1, {}, "", [])


class Program(NamedTuple):
    """What runs of a launch."""

    pid: int
    #: Pid of the namespace's first process, which belongs to us; 0 without namespaces.
    init: int


class Ending(NamedTuple):
    """How a launch ended, as the kernel told its keeper."""

    #: As of ``wait``.
    status: int
    #: UTC seconds.
    ended_at: float
    #: Processes of the launch the kernel killed for memory.
    oom_kills: int = 0
    #: Why it did not start; empty if it did.
    error: str = ""
    #: Bytes of its output that the disk did not take, and why.
    lost: int = 0
    why_lost: str = ""


class Record(NamedTuple):
    """All that is recorded of a launch. What is not yet there is None."""

    keeper: Keeper | None = None
    program: Program | None = None
    #: The ending to be, of a program that has been waited for.
    status: Ending | None = None
    ending: Ending | None = None

    @property
    def is_given_up(self) -> bool:
        """Say whether it was decided that this launch shall never start."""
        return self.keeper is not None and self.keeper.pid == 0


def mark_launch(task: int, attempt: int) -> dict[str, str]:
    """Give the variables that tell a launch's processes from all others."""
    return {"KOHAKU_TASK_ID": str(task), "KOHAKU_ATTEMPT": str(attempt)}


def find_marks(path: str) -> dict[str, str]:
    """Give those of the launch with this record, whose name is ``TASK-ATTEMPT-PLAN``."""
    task, attempt, _ = os.path.basename(path).split("-")
    return mark_launch(int(task), int(attempt))


def make_record(path: str) -> None:
    """Make the empty record of a launch; one that is there stays as it is.

    Raises:
        OSError: The disk is full or read-only.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def take(path: str, keeper: Keeper) -> int | None:
    """Try to become the keeper of a launch. Only one ever succeeds.

    Gives a descriptor of the record for ``write_program``, or None if another one has it.

    Raises:
        OSError: The record is gone (FileNotFoundError) or cannot be written.
    """
    line = _encode(_KEEPER, keeper)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            raise OSError(28, "no room for the whole record", path)  # ENOSPC
        is_first = os.lseek(descriptor, 0, os.SEEK_CUR) == written
        if is_first or read_record(path).keeper == keeper:
            taken, descriptor = descriptor, -1
            return taken
        return None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def give_up(path: str) -> bool:
    """Decide that a launch never starts, unless a keeper was faster; say which.

    Raises:
        OSError: The record is gone (FileNotFoundError) or cannot be written.
    """
    descriptor = take(path, NOBODY)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None or read_record(path).is_given_up


def free(path: str) -> None:
    """Say that nothing ran of a launch whose keeper is gone: it may be taken again.

    Raises:
        OSError: The record is gone or cannot be written.
    """
    append_text(path, f'["{_FREE}"]\n')


def write_program(descriptor: int, program: Program) -> None:
    """Record what runs, through the descriptor of ``take``, which is closed.

    Raises:
        OSError: It cannot be written.
    """
    try:
        os.write(descriptor, f'["{_PROGRAM}", {program.pid}, {program.init}]\n'.encode())
    finally:
        os.close(descriptor)


def write_status(path: str, ending: Ending) -> None:
    """Record how a program ended, of which something may be left.

    Raises:
        OSError: The record is gone or cannot be written.
    """
    append_text(path, _encode(_STATUS, ending).decode())


def encode_ending(ending: Ending) -> str:
    """Give an ending as JSON."""
    return json.dumps(ending)


def write_ending(path: str, ending: Ending) -> None:
    """Record how a launch ended.

    Raises:
        OSError: The record is gone or cannot be written.
    """
    write_encoded_ending(path, encode_ending(ending))


def write_encoded_ending(path: str, ending: str) -> None:
    """Record how a launch ended, by what ``encode_ending`` gave.

    Raises:
        OSError: The record is gone or cannot be written.
    """
    append_text(path, f'["{_ENDING}", {ending[1:]}\n')


def read_record(path: str) -> Record:
    """Read what is recorded; nothing, if there is no such launch."""
    try:
        *lines, _ = read_text(path).split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return Record()
    record = Record()
    for line in lines:
        # A power cut may leave part of a line, or zeros in its place (ext4 writes data after
        # lengths). That is as good as no line: the boot id tells what happened.
        with contextlib.suppress(ValueError, TypeError, IndexError):
            record = _add(record, json.loads(line))
    return record


def _add(record: Record, fields: list[Any]) -> Record:
    match fields[0]:
        case "keeper" if record.keeper is None:
            keeper = Keeper(*fields[1:])
            outputs = [(str(path), int(source)) for path, source in keeper.outputs]
            return record._replace(keeper=keeper._replace(outputs=outputs))
        case "program":
            return record._replace(program=Program(*fields[1:]))
        case "status":
            return record._replace(status=Ending(*fields[1:]))
        case "ending":
            return record._replace(ending=Ending(*fields[1:]))
        case "free" if record.program is None:
            return Record()
        case _:
            return record


def _encode(kind: str, fields: tuple[Any, ...]) -> bytes:
    return (json.dumps((kind, *fields)) + "\n").encode()
