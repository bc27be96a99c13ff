"""Telling a runner from an old copy of it, by what it has said before.

A data folder that was copied between an order and its start says that the order is still to be
followed. If the books know that this attempt has begun, whoever speaks does not know what its
own node did, and would do it again.

Knows: which words of a registration contradict the books.
Does not know: links, credentials; a copy that comes while the original is connected is noticed
by those.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from kohaku_daemon.core.cluster.records import TaskRecord
from protocol.errors import Conflict
from protocol.ids import NodeName, TaskId
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.models.task import TaskState

_BEGUN = frozenset({TaskState.RUNNING, TaskState.PAUSED})


def refuse_copy(
    node: NodeName,
    attempts: Iterable[AttemptReport],
    tasks: Mapping[TaskId, TaskRecord],
    begun: Collection[TaskId],
) -> None:
    """Refuse a registration that knows less than its node has told.

    Args:
        node: Whose runner speaks.
        attempts: What it says.
        tasks: The live tasks.
        begun: Those that ended after the attempt it tells of had begun.

    Raises:
        Conflict: It would start what has run already.
    """
    for report in attempts:
        if report.state is not AttemptState.ACCEPTED:
            continue
        task = tasks.get(report.task)
        if report.task in begun or (task is not None and _has_begun(task, node, report.attempt)):
            raise Conflict(
                f"the runner of {node} is about to start attempt {report.attempt} of task"
                f" {report.task}, which has run there already: its data is an old copy",
                hint="start the runner with the data folder it had last; if that is gone: "
                f"kohaku node remove {node}, and let it join anew with an empty one",
            )


def _has_begun(task: TaskRecord, node: NodeName, attempt: int) -> bool:
    return any(
        change.state in _BEGUN and (change.attempt, change.node) == (attempt, node)
        for change in task.history
    )
