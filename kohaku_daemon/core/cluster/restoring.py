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

#: The next attempt is numbered so far above the one in the books. More attempts than these
#: nobody makes between a backup and its restore: they begin at least seconds apart.
ATTEMPTS_APART: Final = 100_000

#: Who did it, in history.
RESTORER: Final = "kohakud restore"


def doubt_task(task: TaskRecord, backup: str, now: float) -> TaskRecord:
    """Give a live task as it may be believed; ``backup`` says which one it comes from."""
    match task.state:
        case TaskState.QUEUED:
            words = f"restored from {backup}; it may have run since"
            attempt = task.attempt + ATTEMPTS_APART
            return _note(replace(task, attempt=attempt), words, now)
        case TaskState.ASSIGNED:
            words = f"restored from {backup}; its node may have started it since"
            return _note(replace(task, state=TaskState.PREPARING), words, now)
        case _:
            return _note(task, f"restored from {backup}", now)


def doubt_node(node: NodeRecord) -> NodeRecord:
    """Give a node as it may be used: nothing new until somebody undrains it."""
    return replace(node, draining=True)


def _note(task: TaskRecord, words: str, now: float) -> TaskRecord:
    change = Change(now, task.state, words, RESTORER, task.attempt, task.node)
    return replace(task, history=(*task.history, change))
