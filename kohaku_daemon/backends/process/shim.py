"""The shim: the small process that keeps one launch, from its start to its recorded end.

It is forked by the launcher, outlives it and the runner, passes on what the program writes
(``output``), and waits for the program itself, so that the exit status is the kernel's own
word. Nothing is wrapped in another program that
might translate it: see ``backend``.

    shim                 takes the launch, waits, records the end, sweeps what is left
      |- init            namespaces only: first process of the pid namespace; it reaps, and
      |                  when it ends the kernel kills all that is in the namespace
      `- the program     in the launch's cgroup, which holds all that it starts

Shim and init are not in the launch's cgroup: a full, frozen or killed group stays watched.
Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import time
from collections.abc import Sequence
from typing import Final

from kohaku_daemon.backends.process import files, linux, record, sandbox, tree
from kohaku_daemon.backends.process.group import Group
from kohaku_daemon.backends.process.output import Output
from kohaku_daemon.backends.process.record import Ending, Keeper, LaunchPlan

#: Answers to the launcher: the program runs; another keeper has the launch; a reason.
STARTED: Final = "started"
TAKEN: Final = "taken"
FAILED: Final = "failed"

#: Characters of a reason; in JSON at most six times as long, and still one atomic write.
_LONGEST: Final = 600
#: How long to go on killing what a launch left behind. What is stuck in the kernel longer
#: (a dead NFS server) would otherwise hold the end back for ever.
SWEEP_S: Final = 10.0
#: Milliseconds after which what a program has left to the shim is reaped once it has ended.
_REAP_MS: Final = 1000


def keep(plan: LaunchPlan, answer: int) -> None:
    """Keep one launch. Called in a fork of the launcher, which must end after it.

    Args:
        plan: The launch.
        answer: Descriptor for the one answer, ``[kind, text]`` in JSON; closed after it.
    """
    os.closerange(3, answer)
    os.closerange(answer + 1, 1 << 20)
    os.setsid()
    files.write_text("/proc/self/comm", "kohaku-shim")
    if _is_bare(plan):
        # What a program leaves behind becomes the shim's child, so that it can be found.
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    me = os.pidfd_open(os.getpid())
    try:
        init = _start_init(plan, me)
    except OSError as error:
        # ENOSPC here is the kernel's word for a limit in /proc/sys/user.
        why = "their number is limited" if error.errno == errno.ENOSPC else error.strerror
        _say(answer, FAILED, f"cannot make namespaces: {why}")
        return
    try:
        keeper = _describe(plan, init)
        taken = record.take(plan["folder"], keeper)
    except FileNotFoundError:
        # The state folder is gone: the launch was given up and removed before this began.
        _say(answer, TAKEN)
        return
    except OSError as error:
        _say(answer, FAILED, f"cannot keep the launch: {error.strerror} ({error.filename})")
        return
    if taken:
        _run(plan, keeper, me, answer)
    else:
        _say(answer, TAKEN)


def _describe(plan: LaunchPlan, init: int) -> Keeper:
    me = tree.read_process(os.getpid())
    return Keeper(
        pid=os.getpid(),
        start=0 if me is None else me.start,
        boot=plan["boot"],
        started_at=_now(),
        init=init,
        uid=plan["uid"],
        group={} if plan["group"] is None else plan["group"]["folders"],
        note=plan["note"],
    )


def _is_bare(plan: LaunchPlan) -> bool:
    """Say whether neither a cgroup nor a namespace holds what the program starts."""
    return plan["group"] is None and plan["sandbox"] is None


def _run(plan: LaunchPlan, keeper: Keeper, me: int, answer: int) -> None:
    group = Group(keeper.group)
    outputs: list[Output] = []
    program, reason = 0, _prepare(plan, group, outputs)
    if not reason:
        program, reason = _start_program(plan, outputs, me)
    try:
        if reason:
            record.write_ending(plan["folder"], Ending(0, _now(), error=reason))
            _say(answer, FAILED, reason)
        else:
            _say(answer, STARTED)
            reap_ms = _REAP_MS if _is_bare(plan) else None
            record.write_ending(plan["folder"], _wait(program, outputs, reap_ms, group))
    finally:
        _sweep(group, keeper.init)
        for output in outputs:
            output.finish()


def _start_init(plan: LaunchPlan, me: int) -> int:
    """Make the pid namespace and its first process; give its pid, or 0 without namespaces.

    Raises:
        OSError: The kernel refused.
    """
    if plan["sandbox"] is None:
        return 0
    if plan["sandbox"]["user"]:
        sandbox.make_user_namespace()
    else:
        linux.unshare(linux.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        try:
            _be_init(me)
        finally:
            os._exit(1)
    return pid


def _be_init(parent: int) -> None:
    files.write_text("/proc/self/comm", "kohaku-init")
    # It still sees the machine's own files; the program must not reach them through it.
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    sandbox.die_with(parent)
    os.closerange(0, 1 << 20)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        signal.sigwait({signal.SIGCHLD})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _prepare(plan: LaunchPlan, group: Group, outputs: list[Output]) -> str:
    """Make all that the program needs, its outputs too; say what failed, if anything."""
    try:
        if plan["group"] is not None:
            group.make(plan["group"])
        if plan["uid"] >= 0:
            os.chown(plan["scratch"], plan["uid"], plan["uid"])
            os.chmod(plan["scratch"], 0o700)
        outputs += [Output(plan[name], plan["uid"]) for name in ("stdout", "stderr")]
    except OSError as error:
        return f"cannot prepare the launch: {error.strerror} ({error.filename})"
    return ""


def _start_program(plan: LaunchPlan, outputs: Sequence[Output], me: int) -> tuple[int, str]:
    """Start the program; give its pid, and why it failed if it did."""
    try:
        read, write = os.pipe()  # both close on exec: its end of file means "it runs"
        pid = os.fork()
    except OSError as error:
        return 0, f"cannot start a process: {error.strerror}"
    if pid == 0:
        try:
            os.close(read)
            sandbox.become(plan, [output.sink for output in outputs], me)
        except sandbox.StepFailed as error:
            os.write(write, str(error).encode("utf-8", "replace"))
        except BaseException as error:
            # A bug of ours. Silence would mean "it runs".
            os.write(write, f"cannot start: {error!r}".encode("utf-8", "replace"))
        finally:
            os._exit(127)
    os.close(write)
    for output in outputs:
        output.leave()
    reason = b""
    while part := os.read(read, 4096):
        reason += part
    os.close(read)
    return pid, reason.decode("utf-8", "replace")


def _wait(program: int, outputs: Sequence[Output], reap_ms: int | None, group: Group) -> Ending:
    """Wait for the program, passing on what it writes and reaping whatever else ends."""
    sources = {output.source: output for output in outputs}
    poll = select.poll()
    for descriptor in (os.pidfd_open(program), *sources):
        poll.register(descriptor, select.POLLIN)
    while (end := _find_end(program)) is None:
        for descriptor, _ in poll.poll(reap_ms):
            if descriptor in sources and not sources[descriptor].pass_on():
                poll.unregister(descriptor)
    status, usage = end
    return Ending(
        status=status,
        ended_at=_now(),
        oom_kills=group.count_oom_kills(),
        user_s=usage.ru_utime,
        system_s=usage.ru_stime,
        peak_memory=usage.ru_maxrss * 1024,
    )


def _find_end(program: int) -> tuple[int, resource.struct_rusage] | None:
    """Reap what has ended, up to the program; give its wait status and usage if it has."""
    while True:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == program:
            return status, usage
        if pid == 0:
            return None


def _sweep(group: Group, init: int) -> None:
    """Kill what the program left running, so that nothing outlives its launch."""
    deadline = time.monotonic() + SWEEP_S
    pause_s = 0.0005
    while time.monotonic() < deadline:
        left = group.kill()
        if init:
            with contextlib.suppress(ProcessLookupError):
                os.kill(init, signal.SIGKILL)
        if _reap() and not left:
            break
        if not init and not left:
            tree.signal_each(_list_below, signal.SIGKILL)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    group.remove()


def _list_below() -> set[int]:
    return tree.select_below(tree.read_all(), os.getpid())


def _reap() -> bool:
    """Wait for every child that has ended; say whether none is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _say(answer: int, kind: str, text: str = "") -> None:
    # Nobody listens if the launcher has ended meanwhile: the folder says it all too.
    with contextlib.suppress(OSError):
        os.write(answer, json.dumps([kind, text[:_LONGEST]]).encode())
        os.close(answer)


def _now() -> float:
    return time.time()  # noqa: TID251  runs without the daemon's packages
