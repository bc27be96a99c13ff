"""How a keeper starts a program: quickly where that can be done, else by a fork.

Knows: both ways, and which one a launch needs. Does not know: records, outputs, what follows.

Quickly means ``posix_spawn``: the child borrows the keeper's memory until it runs the program
(glibc: CLONE_VM | CLONE_VFORK), so that no page of it is copied: 0.8 ms of CPU for
``/bin/true`` where a fork of the same small process took 1.2. ``posix_spawn`` can do little to
the child, so the keeper does it to itself for that moment: it goes into the launch's cgroup,
cores, namespaces and working directory, and becomes its user but for the saved user id, which
``exec`` overwrites (``man 2 execve``). Then it comes back. The keeper has no threads, so
nothing of it runs meanwhile, and nobody freezes or kills a launch's cgroup before its program
is recorded. If it cannot come back it ends, and its guard goes on.

A fork is needed where the way back is closed: an ordinary user's user namespace, a hard limit
of address space, or a cgroup so small that the keeper itself might be the one to be killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from kohaku_daemon.backends.process import linux, sandbox
from kohaku_daemon.backends.process.group import Group, enter
from kohaku_daemon.backends.process.record import LaunchPlan, Program
from kohaku_daemon.backends.process.sandbox import StepFailed, step

#: Bytes; several times what a keeper may be charged for while it visits a cgroup.
_ROOMY: Final = 32 << 20
_NAMESPACES: Final = (
    ("mnt", linux.CLONE_NEWNS),
    ("ipc", linux.CLONE_NEWIPC),
    ("uts", linux.CLONE_NEWUTS),
    ("pid", linux.CLONE_NEWPID),
)


class _Doors(NamedTuple):
    """Descriptors to go into a launch's cgroup by, and back: see ``Group.open_doors``."""

    group: Sequence[int]
    homes: Sequence[int]


class Starter:
    """Starts programs as children of the calling process, which it needs for itself."""

    def __init__(self) -> None:
        self._namespaces = [
            (os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind)
            for name, kind in _NAMESPACES
        ]
        self._root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        #: Doors of groups that this process stays in when it starts nothing, by folder.
        self._homes: dict[str, int] = {}
        self._cores = os.sched_getaffinity(0)
        soft, self._most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._files = soft

    def start(self, plan: LaunchPlan, sinks: Sequence[int]) -> Program:
        """Start a program; its outputs are ``sinks``.

        Raises:
            StepFailed: It did not start; the text is for the task's owner.
        """
        with self._usual_files():
            if _needs_fork(plan):
                return _start_by_fork(plan, sinks)
            with contextlib.ExitStack() as ways_back:
                # Before the walls, behind which no cgroup can be written to.
                doors = self._open_doors(plan, ways_back)
                init = self._enter_namespaces(plan, ways_back)
                try:
                    return Program(self._start_inside(plan, sinks, doors), init)
                except BaseException:  # whatever it was, no init is left behind
                    _end(init)
                    raise

    def allow_many_files(self) -> None:
        """Let the calling process open as many files as it may, its programs as many as usual."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._most_files, self._most_files))

    @contextlib.contextmanager
    def _usual_files(self) -> Iterator[None]:
        if self._files == self._most_files:
            yield
            return
        # What is open already stays so.
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._files, self._most_files))
        try:
            yield
        finally:
            self.allow_many_files()

    def _open_doors(self, plan: LaunchPlan, ways_back: contextlib.ExitStack) -> _Doors:
        if plan["group"] is None:
            return _Doors((), ())
        with step("find its cgroup"):
            homes = [self._find_home(*item) for item in plan["group"]["homes"].items()]
            doors = Group(plan["group"]["folders"]).open_doors()
            ways_back.callback(_close_each, doors)
        return _Doors(doors, homes)

    def _find_home(self, name: str, folder: str) -> int:
        if folder not in self._homes:
            (door,) = Group({name: folder}).open_doors()
            enter([door])  # being there, nobody can remove it
            self._homes[folder] = door
        return self._homes[folder]

    def _enter_namespaces(self, plan: LaunchPlan, ways_back: contextlib.ExitStack) -> int:
        if plan["sandbox"] is None:
            return 0
        ways_back.callback(_must, self._leave_namespaces)
        with step("make its namespaces"):
            return _enter_walls(plan)

    def _start_inside(self, plan: LaunchPlan, sinks: Sequence[int], doors: _Doors) -> int:
        with contextlib.ExitStack() as ways_back:
            self._go_in(plan, doors, ways_back)
            outputs = [(os.POSIX_SPAWN_DUP2, sink, number) for number, sink in enumerate(sinks, 1)]
            return sandbox.run(
                plan,
                lambda path: os.posix_spawn(
                    path, plan["argv"], plan["env"],
                    file_actions=outputs, setsid=True, setsigdef=sandbox.IGNORED,
                ),
            )  # fmt: skip

    def _go_in(self, plan: LaunchPlan, doors: _Doors, ways_back: contextlib.ExitStack) -> None:
        """Join what the program shall be in; ``ways_back`` undoes it."""
        ways_back.callback(_must, lambda: enter(doors.homes))
        with step("join its cgroup"):
            enter(doors.group)
        if plan["cores"]:
            ways_back.callback(_must, lambda: os.sched_setaffinity(0, self._cores))
            with step("stay on its cores"):
                os.sched_setaffinity(0, plan["cores"])
        ways_back.callback(_must, lambda: os.chdir("/"))
        if plan["uid"] >= 0:
            ways_back.callback(_must, _become_root)
            with step("give up its rights"):
                _lend_to(plan["uid"])
        with step(f"enter its working directory {plan['workdir']}", named=False):
            os.chdir(plan["workdir"])

    def _leave_namespaces(self) -> None:
        for descriptor, kind in self._namespaces:
            linux.enter_namespace(descriptor, kind)
        # Entering a mount namespace moves to its root, which need not be what ours was.
        os.fchdir(self._root)
        if not os.path.samestat(os.stat("/"), os.stat(".")):
            os.chroot(".")


def _needs_fork(plan: LaunchPlan) -> bool:
    walls = plan["sandbox"]
    return (
        (walls is not None and walls["user"])
        or plan["address_space"] > 0
        or (plan["group"] is not None and 0 < plan["memory"] < _ROOMY)
    )


def _close_each(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _must(way_back: Callable[[], None]) -> None:
    """Come back from where a launch is, or end: the guard goes on with all others."""
    try:
        way_back()
    except OSError as error:
        os.write(2, f"kohaku-keeper cannot come back from a launch: {error}\n".encode())
        os._exit(1)


def _enter_walls(plan: LaunchPlan) -> int:
    """Move into new namespaces; give the pid of the first process of the pid namespace."""
    read, write = os.pipe()
    init = 0

    def start_init() -> None:
        nonlocal init
        linux.unshare(linux.CLONE_NEWPID)
        init = os.fork()
        if init == 0:
            sandbox.be_init(write)

    try:
        sandbox.build_walls(plan, start_init)
        os.close(write)
        write = -1
        if not os.read(read, 1):  # it mounts /proc, which only a process inside can
            raise OSError(errno.EPERM, "cannot mount it", "/proc")
    except BaseException:  # whatever it was, no init is left behind
        _end(init)
        raise
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    return init


def _end(init: int) -> None:
    """End the first process of a pid namespace, and with it all that is inside."""
    if init:
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)


def _lend_to(uid: int) -> None:
    os.setresgid(uid, uid, 0)
    os.setresuid(uid, uid, 0)


def _become_root() -> None:
    os.setresuid(0, 0, 0)
    os.setresgid(0, 0, 0)


def _start_by_fork(plan: LaunchPlan, sinks: Sequence[int]) -> Program:
    try:
        read, write = os.pipe()  # both close on exec: its end of file means "it runs"
        stage = os.fork()
    except OSError as error:
        raise StepFailed(f"cannot start a process: {error.strerror}") from error
    if stage == 0:
        _be_stage(plan, sinks, write)
    os.close(write)
    said = b""
    while part := os.read(read, 4096):
        said += part
    os.close(read)
    words = dict(json.loads(line) for line in said.splitlines())
    program = Program(*words.get("runs", (stage, 0)))
    if program.pid != stage:
        os.waitpid(stage, 0)
    if "failed" in words:
        _end(program.init)
        os.waitpid(program.pid, 0)
        raise StepFailed(str(words["failed"]))
    return program


def _be_stage(plan: LaunchPlan, sinks: Sequence[int], answer: int) -> None:
    """Become the program, or start it and its namespace's first process beside us, and end."""

    def say(kind: str, what: object) -> None:
        os.write(answer, (json.dumps([kind, what]) + "\n").encode())

    try:
        if plan["sandbox"] is not None:
            with step("make namespaces"):
                init, program = _start_beside(needs_user=plan["sandbox"]["user"])
            if program:
                say("runs", [program, init])
                os._exit(0)
        sandbox.become(plan, sinks)
    except StepFailed as error:
        say("failed", str(error))
    except BaseException as error:
        say("failed", f"cannot start: {error!r}")  # a bug of ours; silence would mean "it runs"
    finally:
        os._exit(127)


def _start_beside(*, needs_user: bool) -> tuple[int, int]:
    """Make a pid namespace, its first process, and the one that will be the program.

    Gives the pids of both; 0 for the second in that one itself.
    """
    if needs_user:
        sandbox.make_user_namespace()
    else:
        linux.unshare(linux.CLONE_NEWPID)
    init = linux.fork_sibling()
    if init == 0:
        sandbox.be_init()
    return init, linux.fork_sibling()
