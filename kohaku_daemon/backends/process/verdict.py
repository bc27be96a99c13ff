"""From what a shim recorded to what a task's owner is told."""

from __future__ import annotations

import os
import signal

from kohaku_daemon.backends.process.record import Ending, Keeper
from protocol.models.task import Cause, Exit


def judge(ending: Ending) -> Exit:
    """Say how a launch ended, from the wait status and the kernel's own count of OOM kills."""
    if ending.error:
        return Exit(Cause.START_FAILED, message=ending.error)
    if not os.WIFSIGNALED(ending.status):
        code = os.WEXITSTATUS(ending.status)
        return Exit(Cause.EXITED, code=code, oom_kills=ending.oom_kills)
    number = os.WTERMSIG(ending.status)
    if number == signal.SIGKILL and ending.oom_kills:
        return Exit(Cause.OOM, signal=number, oom_kills=ending.oom_kills)
    return Exit(Cause.SIGNALLED, signal=number, oom_kills=ending.oom_kills)


def judge_lost(keeper: Keeper | None, boot: str, node: str) -> Exit:
    """Say what is known of a launch whose end nobody recorded.

    Args:
        keeper: Who kept it; None if a restart of the machine took even that.
        boot: Of this boot of the machine.
        node: Name of the node.
    """
    if keeper is None:
        text = f"{node} restarted around the task's start: it may have run for a moment"
    elif keeper.boot != boot:
        text = f"{node} restarted while the task ran"
    else:
        text = (
            f"something on {node} killed the process that keeps the task (pid {keeper.pid}); "
            "what was left of the task was killed"
        )
    return Exit(Cause.NODE_FAILED, message=text)
