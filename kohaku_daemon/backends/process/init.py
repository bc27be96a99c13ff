"""The first process of a pid namespace, started without a copy of the keeper.

A fork shares every page of the keeper with the child, and each page that either of them touches
next has to be copied: over 1 ms of CPU for a launch, and megabytes for as long as it runs. The
first process of a namespace needs none of it. ``/proc`` has to be mounted by a process inside,
and then it has to be there: the kernel itself waits for its orphans if it ignores SIGCHLD
(``man 2 waitpid``, Notes).

So it is a program of 200 bytes in memory (``memfd_create``), and it is started as by ``vfork``:
until it runs that program it is in the keeper's own memory, while the keeper stands still, and
does nothing there but system calls. Python cannot run in such a child. So both are lists of
system calls in the machine code of x86-64. On other machines, or where memory may not hold
programs, ``Seed.plant`` gives None, and a fork does the same (``sandbox.be_init``).

Knows: those calls, and how they are encoded (System V ABI, AMD64 supplement, A.2; Intel's
Software Developer's Manual, volume 2). Does not know: launches, their walls. Standard library
only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import signal
import struct
from collections.abc import Callable
from typing import Final

from kohaku_daemon.backends.process import linux

_NAME: Final = b"kohaku-init"
PROC_FLAGS: Final = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC

# asm/unistd_64.h
_CLOSE: Final = 3
_RT_SIGACTION: Final = 13
_PAUSE: Final = 34
_CLONE: Final = 56
_EXECVE: Final = 59
_EXIT: Final = 60
_PRCTL: Final = 157
_MOUNT: Final = 165

#: "Load a constant of 64 bits" into rdi, rsi, rdx, r10, r8, r9, the arguments of a system call.
_LOAD_ARGUMENT: Final = tuple(map(bytes.fromhex, ("48bf", "48be", "48ba", "49ba", "49b8", "49b9")))
#: The same into rax, the number of the call, where its result comes.
_LOAD_NUMBER: Final = bytes.fromhex("48b8")
_SYSCALL: Final = bytes.fromhex("0f05")
#: test rax, rax; je over the next; ret.
_RETURN_TO_PARENT: Final = bytes.fromhex("4885c0 7401 c3")
#: test rax, rax; jns over the next 22 bytes.
_IF_FAILED: Final = bytes.fromhex("4885c0 7916")
#: mov [constant], rax.
_STORE_RESULT: Final = bytes.fromhex("48a3")
#: jmp to 14 bytes before its end: again the call before it, if that takes no arguments.
_REPEAT: Final = bytes.fromhex("ebf2")

#: Where the program is in its own memory: after the headers of its file.
_BASE: Final = 0x400000
_HEADERS: Final = 64 + 56
#: What the trial exits with.
_WELL: Final = 7


class Seed:
    """Starts first processes of pid namespaces."""

    def __init__(self) -> None:
        """Make it ready. See ``plant``.

        Raises:
            OSError: This machine does not allow it.
        """
        if platform.machine() != "x86_64" or struct.calcsize("P") != struct.calcsize("Q"):
            raise OSError(errno.ENOSYS, "it is written for x86-64")
        _try()
        self._file = os.memfd_create(_NAME.decode(), os.MFD_CLOEXEC)
        try:
            os.write(self._file, _make_program())
            path = f"/proc/self/fd/{self._file}"
            self._memory = mmap.mmap(-1, mmap.PAGESIZE)
            #: Where the child leaves an ``errno`` below zero if it fails.
            self._failure = ctypes.c_long()
            self._start = _make_start(self._memory, path, ctypes.addressof(self._failure))
        except BaseException:  # whatever it was, no file is left open
            os.close(self._file)
            raise

    @classmethod
    def plant(cls) -> Seed | None:
        """Make one, by a trial; None if this machine does not allow it.

        Before a pid namespace is made for children: the trial would be its first process.
        """
        with contextlib.suppress(OSError):
            return cls()
        return None

    def start(self) -> int:
        """Start the first process of the pid namespace that the caller has made for children.

        It mounts ``/proc`` of that in the caller's mount namespace. Gives its pid.

        Raises:
            OSError: The kernel refused.
        """
        self._failure.value = 0
        pid = self._start()
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        if self._failure.value:
            os.waitpid(pid, 0)
            number = -self._failure.value
            raise OSError(number, os.strerror(number), "/proc")
        return pid

    def close(self) -> None:
        """Let go of the program; those that run go on."""
        os.close(self._file)


class _Constants:
    """What code names by its address: texts, structures."""

    def __init__(self, address: int) -> None:
        self._address = address
        self.data = b""

    def add(self, data: bytes) -> int:
        """Add some; give its address."""
        place = self._address + len(self.data)
        self.data += data + bytes(-len(data) % 8)
        return place

    def add_text(self, text: bytes) -> int:
        return self.add(text + b"\0")


def _call(number: int, *arguments: int) -> bytes:
    """Encode one system call."""
    loads = zip((_LOAD_NUMBER, *_LOAD_ARGUMENT), (number, *arguments), strict=False)
    return b"".join(load + struct.pack("Q", value) for load, value in loads) + _SYSCALL


def _make_program() -> bytes:
    """Make the file of the program: it names itself and is there."""
    constants = _Constants(_BASE + _HEADERS)
    code = b"".join(
        (
            _call(_PRCTL, linux.PR_SET_NAME, constants.add_text(_NAME)),
            # It is ours: the launch's program must reach nothing through it.
            _call(_PRCTL, linux.PR_SET_DUMPABLE, 0),
            _call(_PAUSE),
            _REPEAT,
        )
    )
    return _make_file(constants.data, code)


def _make_file(data: bytes, code: bytes) -> bytes:
    """Make a file that the kernel runs of data at ``_BASE + _HEADERS`` and code behind it."""
    size = _HEADERS + len(data) + len(code)
    # ELF64: little-endian, executable, x86-64; where it begins; one program header, which
    # loads all of it, to be read and run.
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "HHIQQQIHHHHHH", 2, 62, 1, _BASE + size - len(code), 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    load = struct.pack("IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, mmap.PAGESIZE)
    return header + load + data + code


def _make_start(memory: mmap.mmap, program: str, failure: int) -> Callable[[], int]:
    """Write the code that starts the program into memory, and make it a function.

    It gives the child's pid, or an ``errno`` below zero. One of the child's goes to the address
    ``failure``: it cannot be learned from its exit, which begins before it can be waited for.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    constants = _Constants(address)
    proc, place = constants.add_text(b"proc"), constants.add_text(b"/proc")
    path, name = constants.add_text(program.encode()), constants.add_text(_NAME)
    # struct sigaction of the kernel; argv, whose end is all of the environment too.
    ignore = constants.add(struct.pack("QQQQ", signal.SIG_IGN, 0, 0, 0))
    argv = constants.add(struct.pack("QQ", name, 0))
    end_if_failed = _IF_FAILED + _STORE_RESULT + struct.pack("Q", failure) + _call(_EXIT)
    code = b"".join(
        (
            _call(_CLONE, linux.CLONE_VM | linux.CLONE_VFORK | signal.SIGCHLD, 0, 0, 0, 0),
            _RETURN_TO_PARENT,
            _call(_RT_SIGACTION, signal.SIGCHLD, ignore, 0, 8),
            *(_call(_CLOSE, number) for number in range(3)),  # the others close on exec
            _call(_MOUNT, proc, place, proc, PROC_FLAGS, 0),
            end_if_failed,
            _call(_EXECVE, path, argv, argv + 8),
            end_if_failed,
        )
    )
    memory[: len(constants.data) + len(code)] = constants.data + code
    linux.make_executable(address, len(memory))
    # It keeps the interpreter's lock: a keeper has no threads to give it to.
    return ctypes.PYFUNCTYPE(ctypes.c_long)(address + len(constants.data))


def _try() -> None:
    """Run a program in memory that ends at once, and so is never left behind.

    Raises:
        OSError: This machine does not run such.
    """
    file = os.memfd_create("kohaku-trial", os.MFD_CLOEXEC)
    try:
        os.write(file, _make_file(b"", _call(_EXIT, _WELL)))
        pid = os.posix_spawn(f"/proc/self/fd/{file}", [_NAME], {})
    finally:
        os.close(file)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != _WELL:
        raise OSError(errno.ENOEXEC, "a program in memory does not run")
