"""Walls around a task, and what a fork of a keeper does to itself to become one.

Knows: the order in which walls must be put up, each needing a right that a later one takes
away. Does not know: how it is decided which ones (``planning``), or how most programs start
without a fork (``starting``). Every step that fails ends
the launch: a task never gets less than was said. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NoReturn, TypeVar

from kohaku_daemon.backends.process import linux
from kohaku_daemon.backends.process.files import read_text, write_text
from kohaku_daemon.backends.process.group import Group
from kohaku_daemon.backends.process.init import PROC_FLAGS
from kohaku_daemon.backends.process.record import LaunchPlan

#: Replaced by empty folders of the launch's own, in memory.
_PRIVATE: Final = ("/tmp", "/var/tmp", "/dev/shm")
_NO_SPECIAL: Final = linux.MS_NOSUID | linux.MS_NODEV
#: What a keeper ignores, so that a write to whoever has gone fails with an error; its programs
#: get the default back.
IGNORED: Final = (signal.SIGPIPE, signal.SIGXFSZ)
T = TypeVar("T")


class StepFailed(Exception):
    """One step could not be done; the text is for the task's owner."""


def make_user_namespace() -> None:
    """Take the right to make other namespaces, as an ordinary user, by one of our own.

    Raises:
        OSError: The kernel refused.
    """
    uid, gid = os.geteuid(), os.getegid()
    linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWPID)
    for name, text in (
        # Without "deny" an ordinary user may not write gid_map (man 7 user_namespaces).
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        write_text(f"/proc/self/{name}", text)
    linux.bound_capabilities()  # a new user namespace begins with all of them


def be_init(ready: int = -1) -> NoReturn:
    """Be the first process of a pid namespace: reap, until the keeper kills it.

    Args:
        ready: Where to say, with one byte, that ``/proc`` is mounted anew in our own mount
            namespace; -1 if the program has one of its own and does so itself.
    """
    try:
        linux.name_process("kohaku-init")
        # It is ours: the program must reach nothing through it.
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        if ready >= 0:
            mount_proc()
            os.write(ready, b"1")
        os.closerange(0, 1 << 20)
        while True:
            signal.sigwait({signal.SIGCHLD})
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    finally:
        os._exit(1)


def become(plan: LaunchPlan, sinks: Sequence[int]) -> NoReturn:
    """Turn the calling process into the task.

    Args:
        plan: What to become.
        sinks: Its standard output and standard error.

    Raises:
        StepFailed: A step failed. The process is half-way and must end.
    """
    os.setsid()
    for number, sink in enumerate(sinks, start=1):
        os.dup2(sink, number)
    for signal_number in IGNORED:
        signal.signal(signal_number, signal.SIG_DFL)
    if plan["group"] is not None:
        with Step("join its cgroup"):
            Group(plan["group"]["folders"]).join()
    if plan["cores"]:
        with Step("stay on its cores"):
            os.sched_setaffinity(0, plan["cores"])
    if plan["sandbox"] is not None:
        with Step("make its namespaces"):
            build_walls(plan, mount_proc)
    with Step("give up its rights"):
        _drop_rights(plan["uid"])
    if plan["address_space"]:
        limit = plan["address_space"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with Step(f"enter its working directory {plan['workdir']}", named=False):
        os.chdir(plan["workdir"])
    run(plan, lambda path: os.execve(path, plan["argv"], plan["env"]))
    raise AssertionError  # execve does not return


class Step:
    """A context that names what is being done, for whoever is told that it failed.

    Raises:
        StepFailed: In place of an OSError.
    """

    __slots__ = ("_is_named", "_what")

    def __init__(self, what: str, *, named: bool = True) -> None:
        self._what = what
        self._is_named = named

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, OSError):
            return
        where = f" ({error.filename})" if self._is_named and error.filename else ""
        # ENOSPC of a namespace is the kernel's word for a limit in /proc/sys/user.
        is_limit = error.errno == errno.ENOSPC and "namespaces" in self._what
        why = "their number is limited" if is_limit else error.strerror
        raise StepFailed(f"cannot {self._what}: {why}{where}") from error


def build_walls(plan: LaunchPlan, make_proc: Callable[[], None], also: int = 0) -> None:
    """Give the calling process mounts, IPC and a host name of its own, as the plan says.

    Args:
        plan: It has a sandbox.
        make_proc: Called when ``/proc`` can be mounted anew, or that can begin elsewhere.
        also: Namespaces to make beside these, as ``CLONE_NEW*``.

    Raises:
        OSError: The kernel refused.
    """
    sandbox, scratch = plan["sandbox"], plan["scratch"]
    if sandbox is None:
        return
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS | also)
    linux.set_host_name(sandbox["hostname"])
    kept: list[tuple[str, int]] = []
    try:
        # Copied while they can still be written to: a mount keeps its own flags.
        for path in (*sandbox["writable"], scratch):
            kept.append((path, linux.clone_tree(path)))  # noqa: PERF401  to be closed if one fails
        # Private: nothing mounted here from now on may travel back to the machine.
        linux.set_mount("/", linux.MOUNT_ATTR_RDONLY, below=True, private=True)
        make_proc()
        size = f",size={sandbox['tmp_size']}" if sandbox["tmp_size"] else ""
        for path in _PRIVATE:
            _mount_empty(path, f"mode=1777{size}")
        _name_in_hosts(sandbox["hostname"])
        covered = _cover({*sandbox["hidden"], *_find_closed(scratch, plan["uid"])})
        for path, tree in kept:
            os.makedirs(path, exist_ok=True)
            attributes = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
            linux.set_mount(tree, attributes, below=True, private=True)
            linux.attach(tree, path)
        for path in covered:
            linux.set_mount(path, linux.MOUNT_ATTR_RDONLY, below=False)
    finally:
        for _, tree in kept:
            os.close(tree)


def mount_proc() -> None:
    """Mount ``/proc`` of the caller's own pid namespace, which it must be in."""
    linux.mount("proc", "/proc", "proc", PROC_FLAGS)


def _mount_empty(path: str, options: str) -> bool:
    """Cover a folder by an empty one in memory; say whether there is such a folder."""
    try:
        linux.mount("tmpfs", path, "tmpfs", _NO_SPECIAL, options)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _name_in_hosts(hostname: str) -> None:
    """Let the host name resolve: many a program asks for the address of its own name."""
    if not os.path.isfile("/etc/hosts"):
        return
    lines = read_text("/etc/hosts").rstrip()
    draft = "/tmp/.hosts"
    write_text(draft, f"{lines}\n127.0.1.1 {hostname}\n")
    tree = linux.clone_tree(draft)
    linux.set_mount(tree, linux.MOUNT_ATTR_RDONLY, below=False)
    linux.attach(tree, "/etc/hosts")
    os.close(tree)
    os.unlink(draft)


def _find_closed(scratch: str, uid: int) -> list[str]:
    """Find the first folder above ``scratch`` that the user may not pass through.

    A runner whose data lies below /root is usual. Such a folder is covered by an empty one,
    in which only the way to the scratch folder exists.
    """
    if uid < 0:
        return []
    parts = scratch.strip("/").split("/")[:-1]
    above = ("/" + "/".join(parts[:count]) for count in range(1, len(parts) + 1))
    for path in above:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:  # the way begins in a private folder: it will be made
            return []
        if not mode & stat.S_IXOTH:
            return [path]
    return []


def _cover(paths: set[str]) -> list[str]:
    """Cover folders by empty ones; give those that were there to be covered."""
    # The outer first: what is inside it is then gone.
    return [path for path in sorted(paths) if _mount_empty(path, "mode=755")]


def _drop_rights(uid: int) -> None:
    # The guard has set no_new_privs for all that comes after it.
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # takes all capabilities from what was root
    else:
        linux.clear_capabilities()


def run(plan: LaunchPlan, start: Callable[[str], T]) -> T:
    """Find the program as ``execvp`` does and start it; give what ``start`` gives.

    Raises:
        StepFailed: It is not there or cannot be run.
    """
    if not plan["argv"]:
        raise StepFailed("the command is empty")
    name = plan["argv"][0]
    text = f"command not found: {name}"
    for path in _list_places(name, plan["env"].get("PATH", "")):
        try:
            return start(path)
        except (FileNotFoundError, NotADirectoryError):
            if os.path.isfile(path):
                text = f"{name}: the interpreter named in its first line was not found"
        except PermissionError:
            text = f"not allowed to run: {name}"
        except (OSError, ValueError) as error:
            raise StepFailed(
                f"cannot run {name}: {getattr(error, 'strerror', None) or error}"
            ) from error
    raise StepFailed(text)


def _list_places(name: str, path: str) -> Iterator[str]:
    if "/" in name:
        yield name
        return
    for folder in path.split(os.pathsep):
        place = os.path.join(folder, name)
        # Looked up first: a start that fails costs a process.
        if os.path.lexists(place):
            yield place
