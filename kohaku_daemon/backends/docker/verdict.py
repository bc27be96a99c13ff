"""From what ``init`` and the engine say of a container to what the task's owner is told.

Knows: whom to believe. ``init`` tells a code from a signal, the engine knows of memory, and of
what happened to ``init`` itself. Does not know: how either is asked.
"""

from __future__ import annotations

import errno
import os
import signal
from typing import Final

from kohaku_daemon.backends.docker.errors import explain_refusal
from kohaku_daemon.backends.docker.facts import ContainerFacts
from kohaku_daemon.backends.docker.init import REFUSED, Stage, Status
from protocol.models.task import Cause, Exit

#: What Docker adds to the number of a signal, as shells do.
_SIGNALLED: Final = 128
#: What ends a container that somebody wants to end.
_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGKILL})
#: Why a program is not there, whichever of its paths said so.
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


def judge(
    facts: ContainerFacts | None,
    status: Status | None,
    *,
    command: str,
    where: str,
    node: str,
    has_restarted: bool,
    suspicion: str,
) -> Exit:
    """Say how a launch ended whose container has ended, or is gone.

    Args:
        facts: Of the engine; None if it has no such container any more.
        status: Of ``init``; None if it wrote nothing.
        command: The program's name.
        where: What it ran in, such as ``image python:3.12``.
        node: The machine's name.
        has_restarted: The machine has since the launch was planned.
        suspicion: What may have ended it from outside; empty if nothing is known to have.
    """
    kills = int(facts is not None and facts.oom_killed)
    if status is not None and status.errno is not None:
        return Exit(Cause.START_FAILED, message=explain_start(status, command, where))
    if status is not None and status.code is not None:
        return Exit(Cause.EXITED, code=status.code, oom_kills=kills)
    if status is not None and status.signal is not None:
        is_ending = status.signal in _ENDING
        return _judge_signal(status.signal, kills, suspicion if is_ending else "")
    # Init was ended itself, and the kernel ended with it all that ran there.
    if has_restarted:
        return Exit(Cause.NODE_FAILED, message=f"{node} restarted while the task ran")
    if facts is None:
        return Exit(
            Cause.NODE_FAILED, message=f"somebody removed its container from Docker on {node}"
        )
    if status is None and not facts.has_run:
        return Exit(Cause.START_FAILED, message=explain_refusal(facts.error))
    if status is None and facts.exit_code == REFUSED:
        return Exit(Cause.START_FAILED, message="the runner's helper in its container gave up")
    if facts.exit_code > _SIGNALLED:
        return _judge_signal(facts.exit_code - _SIGNALLED, kills, suspicion)
    return Exit(Cause.EXITED, code=facts.exit_code, oom_kills=kills)


def explain_start(status: Status, command: str, where: str) -> str:
    """Say why ``init`` could not start a program, and what to do about it."""
    number = status.errno or 0
    text = os.strerror(number).lower()
    match status.stage:
        case Stage.NO_PROGRAM if number in _MISSING:
            return (
                f"command not found: {command} in {where}; choose an image that has it, or give"
                " its path. Is it a script? Then what its first line names is not there"
            )
        case Stage.NO_PROGRAM if number == errno.EACCES:
            return f"{command} in {where} is not executable, or its user may not reach it"
        case Stage.NO_PROGRAM if number == errno.ENOEXEC:
            return (
                f"{command} in {where} is no program for this machine; is it a script? Then"
                " begin it with #! and the program that reads it"
            )
        case Stage.NO_PROGRAM:
            return f"{command} in {where} cannot be executed: {text}"
        case Stage.NO_PROCESS:
            return f"its container has no process to spare: {text}"
        case _:
            return f"its output cannot be written on this node: {text}"


def _judge_signal(number: int, kills: int, suspicion: str) -> Exit:
    if kills and number == signal.SIGKILL:
        return Exit(Cause.OOM, signal=number, oom_kills=kills)
    return Exit(Cause.SIGNALLED, signal=number, oom_kills=kills, message=suspicion)
