"""What books from a backup may still be believed, once time has gone on without them.

Knows: which of their words may have been overtaken, and how to say so in the words that the
engine understands already.
Does not know: files, how a backup is made, how long ago that was.

Since the backup, what waited may have been launched, and an order that was on its way may have
been followed. Both are made so that nothing is launched by itself: a task that may have been
ordered counts as accepted, so that its node is asked and not ordered again; nodes drain until
somebody has looked; and attempts get numbers that were not given before.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.cluster.records import NodeRecord, TaskRecord
from protocol.models.task import Change, TaskState

#: The next attempt is numbered so far above the one in the books. No task has had more attempts
#: between a backup and its restore: retries end somewhere, and losing a node takes minutes.
ATTEMPTS_APART: Final = 1000

#: Who did it, in history.
RESTORER: Final = "kohakud restore"


def doubt_task(task: TaskRecord, backup: str, now: float) -> TaskRecord:
    """Give a live task as it may be believed; ``backup`` says which one it comes from."""
    words = f"restored from {backup}"
    match task.state:
        case TaskState.QUEUED:
            words += "; it may have run since"
        case TaskState.ASSIGNED:
            words += "; its node may have started it since"
            task = replace(task, state=TaskState.PREPARING)
        case _:
            pass
    change = Change(now, task.state, words, RESTORER, task.attempt, task.node)
    return replace(task, doubted=task.attempt + ATTEMPTS_APART, history=(*task.history, change))


def doubt_node(node: NodeRecord) -> NodeRecord:
    """Give a node as it may be used: nothing new until somebody undrains it."""
    return replace(node, draining=True)
