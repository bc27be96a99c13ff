"""What the child of a shim does to itself between ``fork`` and ``exec``.

Knows: the order in which walls must be put up, each needing a right that a later one takes
away. Does not know: how it is decided which ones (``backend``). Every step that fails ends
the launch: a task never gets less than was said. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from kohaku_daemon.backends.process import linux
from kohaku_daemon.backends.process.files import read_text, write_text
from kohaku_daemon.backends.process.group import Group
from kohaku_daemon.backends.process.record import LaunchPlan, SandboxPlan

#: Replaced by empty folders of the launch's own, in memory.
_PRIVATE: Final = ("/tmp", "/var/tmp", "/dev/shm")
_NO_SPECIAL: Final = linux.MS_NOSUID | linux.MS_NODEV


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


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, or end now if that is past.

    Args:
        parent: A pidfd of the parent: getppid() is 0 across a pid namespace.
    """
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([parent], [], [], 0)[0]:
        os._exit(1)


def become(plan: LaunchPlan, sinks: Sequence[int], parent: int) -> None:
    """Turn the calling process into the task: does not return if it works.

    Args:
        plan: What to become.
        sinks: Its standard output and standard error.
        parent: A pidfd of the shim.

    Raises:
        StepFailed: A step failed. The process is half-way and must end.
    """
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, sink in enumerate(sinks, start=1):
        os.dup2(sink, number)
    if plan["group"] is not None:
        with _step("join its cgroup"):
            Group(plan["group"]["folders"]).join()
    if plan["cores"]:
        with _step("stay on its cores"):
            os.sched_setaffinity(0, plan["cores"])
    if plan["sandbox"] is not None:
        with _step("make its namespaces"):
            _build(plan["sandbox"], plan["scratch"], plan["uid"])
    with _step("give up its rights"):
        _drop_rights(plan["uid"])
    if plan["sandbox"] is None and plan["group"] is None:
        # Else the namespace or the cgroup tells what to end when the shim is killed. Here,
        # because a change of user forgets it (man 2 prctl).
        die_with(parent)
    if plan["address_space"]:
        limit = plan["address_space"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with _step(f"enter its working directory {plan['workdir']}", named=False):
        os.chdir(plan["workdir"])
    _execute(plan["argv"], plan["env"])


@contextlib.contextmanager
def _step(what: str, *, named: bool = True) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if named and error.filename else ""
        raise StepFailed(f"cannot {what}: {error.strerror}{where}") from error


def _build(sandbox: SandboxPlan, scratch: str, uid: int) -> None:
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    linux.set_host_name(sandbox["hostname"])
    # Nothing mounted here may travel back to the machine.
    linux.mount("", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    # Copied while they can still be written to: a mount keeps its own flags.
    kept = [(path, linux.clone_tree(path)) for path in (*sandbox["writable"], scratch)]
    linux.set_mount("/", linux.MOUNT_ATTR_RDONLY, below=True)
    linux.mount("proc", "/proc", "proc", _NO_SPECIAL | linux.MS_NOEXEC)
    size = f",size={sandbox['tmp_size']}" if sandbox["tmp_size"] else ""
    for path in filter(os.path.isdir, _PRIVATE):
        linux.mount("tmpfs", path, "tmpfs", _NO_SPECIAL, f"mode=1777{size}")
    _name_in_hosts(sandbox["hostname"])
    covered = _cover({*sandbox["hidden"], *_find_closed(scratch, uid)})
    for path, tree in kept:
        os.makedirs(path, exist_ok=True)
        linux.set_mount(tree, linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV, below=True)
        linux.attach(tree, path)
    for path in covered:
        linux.set_mount(path, linux.MOUNT_ATTR_RDONLY, below=False)


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
        if not os.path.isdir(path):  # the way begins in a private folder: it will be made
            return []
        if not os.stat(path).st_mode & stat.S_IXOTH:
            return [path]
    return []


def _cover(paths: set[str]) -> list[str]:
    """Cover folders by empty ones; give those that were there to be covered."""
    covered = []
    for path in sorted(paths):  # the outer first: what is inside it is then gone
        if os.path.isdir(path):
            linux.mount("tmpfs", path, "tmpfs", _NO_SPECIAL, "mode=755")
            covered.append(path)
    return covered


def _drop_rights(uid: int) -> None:
    # The launcher has set no_new_privs for all that comes after it.
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # takes all capabilities from what was root
    else:
        linux.clear_capabilities()


def _execute(argv: list[str], env: Mapping[str, str]) -> None:
    if not argv:
        raise StepFailed("the command is empty")
    name = argv[0]
    try:
        os.execvpe(name, argv, env)
    except FileNotFoundError:
        if os.path.isfile(name):
            text = f"{name}: the interpreter named in its first line was not found"
        else:
            text = f"command not found: {name}"
    except PermissionError:
        text = f"not allowed to run: {name}"
    except (OSError, ValueError) as error:
        text = f"cannot run {name}: {getattr(error, 'strerror', None) or error}"
    raise StepFailed(text)
