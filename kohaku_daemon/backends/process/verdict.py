"""From what a keeper recorded to what a task's owner is told."""

from __future__ import annotations

import os
import signal

from kohaku_daemon.backends.process.record import Ending, Keeper
from protocol.models.task import Cause, Exit


def judge(ending: Ending) -> Exit:
    """Say how a launch ended, from the wait status and the kernel's own count of OOM kills."""
    if ending.error:
        return Exit(Cause.START_FAILED, message=ending.error)
    lost = f"{ending.lost} bytes of its output are lost: {ending.why_lost}" if ending.lost else ""
    if not os.WIFSIGNALED(ending.status):
        code = os.WEXITSTATUS(ending.status)
        return Exit(Cause.EXITED, code=code, oom_kills=ending.oom_kills, message=lost)
    number = os.WTERMSIG(ending.status)
    is_oom = number == signal.SIGKILL and ending.oom_kills > 0
    cause = Cause.OOM if is_oom else Cause.SIGNALLED
    return Exit(cause, signal=number, oom_kills=ending.oom_kills, message=lost)


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
            f"something on {node} killed the processes that keep the task (pids {keeper.pid} and "
            f"{keeper.guard}); what was left of the task was killed"
        )
    return Exit(Cause.NODE_FAILED, message=text)
