"""The system calls that Python 3.11 has no name for, through libc.

Knows: numbers and argument layouts. Does not know: why anybody calls them. Standard library
only: guards and keepers run it without site-packages.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

# linux/sched.h
CLONE_VM: Final = 0x00000100
CLONE_FILES: Final = 0x00000400
CLONE_VFORK: Final = 0x00004000
CLONE_PARENT: Final = 0x00008000
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000

# sys/mount.h
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18

# asm-generic/mman-common.h
_PROT_READ_EXEC: Final = 1 | 4

# linux/mount.h
MOUNT_ATTR_RDONLY: Final = 1
MOUNT_ATTR_NOSUID: Final = 2
MOUNT_ATTR_NODEV: Final = 4

# linux/prctl.h
PR_SET_DUMPABLE: Final = 4
PR_SET_NAME: Final = 15
PR_CAPBSET_DROP: Final = 24
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

# Calls added after Linux 5.0 have one number on every architecture but Alpha.
_OPEN_TREE: Final = 428
_MOVE_MOUNT: Final = 429
_CLONE3: Final = 435
#: Number of the older ``clone``, where its first argument is the flags.
_CLONE: Final = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "loongarch64": 220, "ppc64le": 120}
_MOUNT_SETATTR: Final = 442

_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_CAPABILITY_VERSION_3: Final = 0x20080522


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _check(result: int, path: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path or None)
    return result


def prctl(option: int, argument: int) -> None:
    """Change something of the calling process (``man 2 prctl``).

    Raises:
        OSError: The kernel refused.
    """
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero))


def name_process(name: str) -> None:
    """Name the calling process, in at most 15 bytes, whatever ``/proc`` it sees."""
    _check(_libc.prctl(PR_SET_NAME, name.encode(), *[ctypes.c_ulong(0)] * 3))


def bound_capabilities() -> None:
    """Give up gaining any capability by running a program, for good and for all children.

    Raises:
        OSError: The kernel refused.
    """
    for number in range(64):
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            # EINVAL: past the kernel's last capability. EPERM: an ordinary user may not, and
            # gains nothing anyway once no_new_privs is set.
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            break
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


def clear_capabilities() -> None:
    """Give up every capability the calling process holds.

    Raises:
        OSError: The kernel refused.
    """
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()))


def make_executable(address: int, size: int) -> None:
    """Let memory hold a program, which can then not be written to (``man 2 mprotect``).

    Raises:
        OSError: The machine does not allow it.
    """
    _check(_libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), _PROT_READ_EXEC))


def fork_sharing_files() -> int:
    """Fork, but let parent and child have one table of descriptors (``man 2 clone3``).

    Each sees at once what the other opens and closes, and what one that was killed had open
    stays open in the other. Gives what ``os.fork`` gives. Not for a process with threads.

    Raises:
        OSError: The kernel refused.
    """
    return _fork(CLONE_FILES)


def fork_sibling() -> int:
    """Fork, but let the child be a child of the caller's parent (``man 2 clone3``).

    Raises:
        OSError: The kernel refused.
    """
    return _fork(CLONE_PARENT)


def _fork(flags: int) -> int:
    arguments = (ctypes.c_uint64 * 11)()  # struct clone_args, Linux 5.5
    arguments[0] = flags
    # Of a sibling it is the caller's own (man 2 clone, CLONE_PARENT).
    arguments[4] = 0 if flags & CLONE_PARENT else signal.SIGCHLD
    size = ctypes.c_size_t(ctypes.sizeof(arguments))
    pid = _libc.syscall(_CLONE3, ctypes.byref(arguments), size)
    older = _CLONE.get(os.uname().machine)
    if pid < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM) and older is not None:
        # Containers forbid clone3, whose flags a filter cannot see, and allow the older call.
        zero = ctypes.c_ulong(0)
        pid = _libc.syscall(older, ctypes.c_ulong(flags | signal.SIGCHLD), zero, zero, zero, zero)
    return _check(int(pid))


def enter_namespace(descriptor: int, kind: int) -> None:
    """Move into the namespace that a descriptor of /proc/PID/ns names (``man 2 setns``).

    Raises:
        OSError: The kernel refused.
    """
    _check(_libc.setns(descriptor, kind))


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (``man 2 unshare``).

    Raises:
        OSError: The kernel refused.
    """
    _check(_libc.unshare(flags))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system (``man 2 mount``).

    Raises:
        OSError: The kernel refused; its file name is ``target``.
    """
    _check(
        _libc.mount(
            os.fsencode(source), os.fsencode(target), kind.encode(),
            ctypes.c_ulong(flags), options.encode(),
        ),
        target,
    )  # fmt: skip


def set_host_name(name: str) -> None:
    """Name the machine as this UTS namespace sees it.

    Raises:
        OSError: The kernel refused.
    """
    data = name.encode()
    _check(_libc.sethostname(data, ctypes.c_size_t(len(data))))


def clone_tree(path: str) -> int:
    """Take a private copy of the mount at ``path`` (``man 2 open_tree``, Linux 5.2).

    Returns a descriptor of a mount that is nowhere yet; ``attach`` puts it somewhere.

    Raises:
        OSError: The kernel refused.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    return _check(_libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags), path)


def attach(tree: int, target: str) -> None:
    """Put a mount of ``clone_tree`` at ``target`` (``man 2 move_mount``, Linux 5.2).

    Raises:
        OSError: The kernel refused.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH
    _check(_libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), flags), target)


def set_mount(target: str | int, attributes: int, *, below: bool, private: bool = False) -> None:
    """Add ``MOUNT_ATTR_*`` to a mount, and to all ``below`` it (Linux 5.12).

    Args:
        target: A path, or a descriptor of ``clone_tree``.
        attributes: What to set.
        below: Whether to change the mounts below it as well, in one step.
        private: Whether nothing mounted there shall travel to or from elsewhere.

    Raises:
        OSError: The kernel refused, or is too old (ENOSYS).
    """
    attr = _MountAttr(attr_set=attributes, propagation=MS_PRIVATE if private else 0)
    place, path, flags = (
        (target, b"", _AT_EMPTY_PATH)
        if isinstance(target, int)
        else (_AT_FDCWD, os.fsencode(target), 0)
    )
    flags |= _AT_RECURSIVE if below else 0
    size = ctypes.c_size_t(ctypes.sizeof(attr))
    _check(
        _libc.syscall(_MOUNT_SETATTR, place, path, flags, ctypes.byref(attr), size),
        target if isinstance(target, str) else "",
    )
