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

import errno
import functools
import json
import os
import resource
import signal
from collections.abc import Callable, Sequence
from typing import Final

from kohaku_daemon.backends.process import linux, sandbox
from kohaku_daemon.backends.process.group import Group, enter
from kohaku_daemon.backends.process.init import Seed
from kohaku_daemon.backends.process.record import LaunchPlan, Program
from kohaku_daemon.backends.process.sandbox import Step, StepFailed

#: Bytes; several times what a keeper may be charged for while it visits a cgroup.
_ROOMY: Final = 32 << 20
_NAMESPACES: Final = (
    ("mnt", linux.CLONE_NEWNS),
    ("ipc", linux.CLONE_NEWIPC),
    ("uts", linux.CLONE_NEWUTS),
    ("pid", linux.CLONE_NEWPID),
)


class Starter:
    """Starts programs as children of the calling process, which it needs for itself."""

    def __init__(self) -> None:
        self._namespaces = [
            (os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind)
            for name, kind in _NAMESPACES
        ]
        self._root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        #: Doors of groups that this process stays in when it starts nothing, by their folders.
        self._homes: dict[tuple[str, ...], list[int]] = {}
        self._cores = os.sched_getaffinity(0)
        soft, self._most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._files = soft

    def start(self, plan: LaunchPlan, sinks: Sequence[int]) -> Program:
        """Start a program; its outputs are ``sinks``.

        Raises:
            StepFailed: It did not start; the text is for the task's owner.
        """
        if self._files == self._most_files:
            return self._start(plan, sinks)
        # What is open already stays so.
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._files, self._most_files))
        try:
            return self._start(plan, sinks)
        finally:
            self.allow_many_files()

    def allow_many_files(self) -> None:
        """Let the calling process open as many files as it may, its programs as many as usual."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._most_files, self._most_files))

    def _start(self, plan: LaunchPlan, sinks: Sequence[int]) -> Program:
        if _needs_fork(plan):
            return _start_by_fork(plan, sinks)
        # Before the walls, behind which no cgroup can be written to.
        with Step("find its cgroup"):
            homes, doors = self._open_doors(plan)
        try:
            if plan["sandbox"] is None:
                return Program(self._start_inside(plan, sinks, homes, doors), 0)
            return self._start_behind_walls(plan, sinks, homes, doors)
        finally:
            for door in doors:
                os.close(door)

    def _open_doors(self, plan: LaunchPlan) -> tuple[Sequence[int], Sequence[int]]:
        """Open the ways into the groups that we stay in, and into those of the launch."""
        group = plan["group"]
        if group is None:
            return (), ()
        folders = tuple(group["homes"].values())
        homes = self._homes.get(folders)
        if homes is None:
            homes = self._homes[folders] = Group(group["homes"]).open_doors()
            enter(homes)  # being there, nobody can remove them
        return homes, Group(group["folders"]).open_doors()

    def _start_behind_walls(
        self, plan: LaunchPlan, sinks: Sequence[int], homes: Sequence[int], doors: Sequence[int]
    ) -> Program:
        init = 0
        try:
            with Step("make its namespaces"):
                init = self._enter_walls(plan)
            return Program(self._start_inside(plan, sinks, homes, doors), init)
        except BaseException:  # whatever it was, no init is left behind
            _end(init)
            raise
        finally:
            _must(self._leave_walls)

    def _start_inside(
        self, plan: LaunchPlan, sinks: Sequence[int], homes: Sequence[int], doors: Sequence[int]
    ) -> int:
        try:
            _go_in(plan, doors)
            outputs = [(os.POSIX_SPAWN_DUP2, sink, number) for number, sink in enumerate(sinks, 1)]
            return sandbox.run(
                plan,
                lambda path: os.posix_spawn(
                    path, plan["argv"], plan["env"],
                    file_actions=outputs, setsid=True, setsigdef=sandbox.IGNORED,
                ),
            )  # fmt: skip
        finally:
            _must(lambda: self._come_back(plan, homes))

    def _come_back(self, plan: LaunchPlan, homes: Sequence[int]) -> None:
        """Undo ``_go_in``, however far that went."""
        if plan["uid"] >= 0:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)
        os.chdir("/")
        if plan["cores"]:
            os.sched_setaffinity(0, self._cores)
        enter(homes)

    def _enter_walls(self, plan: LaunchPlan) -> int:
        """Move into new namespaces; give the pid of the first process of the pid namespace."""
        seed = _find_seed()
        if seed is None:
            return _enter_walls_by_fork(plan)
        init = 0

        def start_init() -> None:
            nonlocal init
            init = seed.start()

        try:
            sandbox.build_walls(plan, start_init, linux.CLONE_NEWPID)
        except BaseException:  # whatever it was, no init is left behind
            _end(init)
            raise
        return init

    def _leave_walls(self) -> None:
        for descriptor, kind in self._namespaces:
            linux.enter_namespace(descriptor, kind)
        # Entering a mount namespace moves to its root, which need not be what ours was.
        os.fchdir(self._root)
        os.chroot(".")


#: Made when it is first needed.
_find_seed: Final = functools.cache(Seed.plant)


def _go_in(plan: LaunchPlan, doors: Sequence[int]) -> None:
    """Join what the program shall be in. Whatever comes of it, ``_come_back`` must follow."""
    with Step("join its cgroup"):
        enter(doors)
    if plan["cores"]:
        with Step("stay on its cores"):
            os.sched_setaffinity(0, plan["cores"])
    if plan["uid"] >= 0:
        with Step("give up its rights"):
            os.setresgid(plan["uid"], plan["uid"], 0)
            os.setresuid(plan["uid"], plan["uid"], 0)
    with Step(f"enter its working directory {plan['workdir']}", named=False):
        os.chdir(plan["workdir"])


def _needs_fork(plan: LaunchPlan) -> bool:
    walls = plan["sandbox"]
    return (
        (walls is not None and walls["user"])
        or plan["address_space"] > 0
        or (plan["group"] is not None and 0 < plan["memory"] < _ROOMY)
    )


def _must(way_back: Callable[[], None]) -> None:
    """Come back from where a launch is, or end: the guard goes on with all others."""
    try:
        way_back()
    except OSError as error:
        os.write(2, f"kohaku-keeper cannot come back from a launch: {error}\n".encode())
        os._exit(1)


def _enter_walls_by_fork(plan: LaunchPlan) -> int:
    """Do the same with a copy of ourselves as the first process, where there is no seed."""
    read, write = os.pipe()
    init = 0

    def start_init() -> None:
        nonlocal init
        init = os.fork()
        if init == 0:
            sandbox.be_init(write)

    try:
        sandbox.build_walls(plan, start_init, linux.CLONE_NEWPID)
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
            with Step("make namespaces"):
                init, program = _start_beside(needs_user=plan["sandbox"]["user"])
            if program:
                say("runs", [program, init])
                os._exit(0)
        sandbox.become(plan, sinks)
    except StepFailed as error:
        say("failed", str(error))
    except BaseException as error:  # even a bug of ours; silence would mean "it runs"
        say("failed", f"cannot start: {error!r}")
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
