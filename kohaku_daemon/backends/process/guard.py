"""The guard: it waits while its keeper works, and goes on in its place if that is killed.

Knows: what a killed keeper leaves, and how to find all of it again.
Does not know: how launches are kept (``keeper``).

Guard and keeper are parent and child with one table of descriptors. So what the keeper had
open, the pipes of its programs above all, is still open when it has been killed; and since the
guard is a subreaper, the keeper's children become its own, with the statuses that the kernel
still keeps for whoever waits. The records say which pipe and which child belong to what. Only
if both are killed, ends and output are lost, and that is told (``verdict.judge_lost``).

Standard library only: it runs as ``python -I -S``.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import time
from typing import Final

from kohaku_daemon.backends.process import keeper, linux, record, sandbox, tree
from kohaku_daemon.backends.process.files import read_text, write_text
from kohaku_daemon.backends.process.group import Group
from kohaku_daemon.backends.process.launching import Launched, now
from kohaku_daemon.backends.process.record import Ending, Keeper, Program, Record

_GUARD: Final = "kohaku-guard"
_KEEPER: Final = "kohaku-keeper"
#: How long a child of the keeper may take to become the program it was started for.
_BIRTH_S: Final = 2.0
#: Seconds by which a process may seem to be older than its record: the time of the boot is known
#: in whole seconds.
_ROUNDING_S: Final = 1.1


def main(descriptor: int, root: str) -> None:
    """Run as a process of its own: start a keeper and guard it.

    The calling process ends at once, so that nobody has to wait for the guard.

    Args:
        descriptor: Of a connected stream socket to the runner.
        root: Folder of the records.
    """
    if os.fork():
        os._exit(0)
    os.setsid()
    linux.name_process(_GUARD)
    _settle()
    guard = tree.read_process(os.getpid())
    assert guard is not None, "it runs"
    watched = os.pidfd_open(guard.pid)
    os.set_inheritable(descriptor, False)  # noqa: FBT003  a name is not allowed
    link = socket.socket(fileno=descriptor)
    child = linux.fork_sharing_files()
    if child == 0:
        linux.name_process(_KEEPER)
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        keeper.run(_name_keeper(guard), link, watched)
    start = tree.read_remains(child)
    if os.waitpid(child, 0)[1] == 0 or start is None:
        return
    print(f"keeper {child} was killed; its guard goes on", file=sys.stderr, flush=True)  # noqa: T201
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)  # the runner turns to another keeper
    take_over(root, child, start.start, guard)


def take_over(root: str, pid: int, start: int, me: tree.Process) -> None:
    """Keep what a killed keeper has left, until nothing of it is left.

    Args:
        root: Folder of the records.
        pid: Of the keeper.
        start: Its start in clock ticks after boot.
        me: The calling process.
    """
    left = {}
    for entry in os.scandir(root):
        found = record.read_record(entry.path) if entry.is_file() else Record()
        if found.keeper is not None and (found.keeper.pid, found.keeper.start) == (pid, start):
            left[entry.path] = found
    _close_all_but({source for one in left.values() for source in _list_sources(one)})
    loop = keeper.KeeperLoop(_name_keeper(me), None)
    known = {pid for one in left.values() if one.program for pid in one.program}
    for path, one in left.items():
        launched = _continue(path, one, known)
        if launched is not None:
            loop.keep(launched)
    _end_inits(known)
    loop.serve()


def _continue(path: str, left: Record, known: set[int]) -> Launched | None:
    """Take up one launch; None if it has ended or never began."""
    assert left.keeper is not None, "it was taken"
    if left.ending is not None:
        Group(left.keeper.group).remove()
        return None
    program = left.program or _find_unrecorded(path, left.keeper, known)
    if program is None:
        Group(left.keeper.group).kill()
        with contextlib.suppress(OSError):
            record.free(path)
        return None
    if left.status is not None:
        return Launched(path, left.keeper, program, left.status)
    if not _is_child(program.pid):
        # It had been waited for, which is done only once its end is recorded: the disk failed.
        error = "the disk did not take how it ended"
        with contextlib.suppress(OSError):
            record.write_ending(path, Ending(0, now(), error=error))
        return None
    return Launched(path, left.keeper, program)


def _find_unrecorded(path: str, held: Keeper, known: set[int]) -> Program | None:
    """Find the program of a launch whose keeper was killed before it could record it."""
    marks = frozenset(f"{name}={value}" for name, value in record.find_marks(path).items())
    deadline = time.monotonic() + _BIRTH_S
    while True:
        unknown = tree.list_children() - known
        inits = {pid for pid in unknown if _is_init(pid)}
        chosen = tree.select_marked(unknown - inits, marks)
        chosen |= {pid for pid in unknown - inits - chosen if _is_remains(pid, held)}
        is_coming = any(_read_name(pid) == _KEEPER for pid in unknown - inits - chosen)
        if chosen or not is_coming or time.monotonic() > deadline:
            break
        time.sleep(0.002)
    if not chosen:
        return None
    program = Program(max(chosen), max(inits, default=0))
    known.update(program)
    with contextlib.suppress(OSError):
        record.write_program(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), program)
    return program


def _is_remains(pid: int, held: Keeper) -> bool:
    """Say whether a child that is over, and so has no variables, may have been the program."""
    process = tree.read_remains(pid)
    if process is None or not process.is_over or process.session != pid:
        return False
    return (held.uid < 0 or tree.read_owner(pid) == held.uid) and (
        tree.read_boot_time() + process.start_s >= held.started_at - _ROUNDING_S
    )


def _is_init(pid: int) -> bool:
    """Say whether it is the first process of a pid namespace other than ours."""
    lines = _read(f"/proc/{pid}/status").splitlines()
    numbers = next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
    return len(numbers) > 1 and numbers[-1] == "1"


def _end_inits(known: set[int]) -> None:
    """End the namespaces that a killed keeper had made and not yet started a program in."""
    for pid in tree.list_children() - known:
        if _is_init(pid):
            os.kill(pid, signal.SIGKILL)


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _read_name(pid: int) -> str:
    return _read(f"/proc/{pid}/comm").strip()


def _read(path: str) -> str:
    try:
        return read_text(path)
    except OSError:  # it is over
        return ""


def _list_sources(left: Record) -> list[int]:
    if left.keeper is None or left.ending is not None:
        return []
    return [source for _, source in left.keeper.outputs]


def _close_all_but(kept: set[int]) -> None:
    """Close what the keeper had open: its ends of the programs' pipes would keep those open."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _name_keeper(guard: tree.Process) -> Keeper:
    me = tree.read_process(os.getpid())
    assert me is not None, "it runs"
    return Keeper(me.pid, me.start, guard.pid, guard.start, "", 0.0, -1, {}, "", [])


def _settle() -> None:
    """Become what programs may inherit from, and what need not be done for each of them."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        # What our parent ignored, such as SIGHUP under nohup, the tasks need not.
        signal.signal(number, signal.SIG_DFL)
    for number in sandbox.IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if read_text("/proc/self/oom_score_adj").startswith("-"):
        # A daemon may be spared when memory runs out; its tasks must not be.
        write_text("/proc/self/oom_score_adj", "0")
    os.umask(0o022)
    os.chdir("/")
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    # None of us runs a set-uid program.
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.bound_capabilities()
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):  # root of a user namespace may not
            os.setgroups([])
    else:
        linux.clear_capabilities()
    # What is there stays: looking through it again would copy pages that forks share.
    gc.freeze()
