"""Going on after a restart with what the stores hold.

Whatever was under way when the host ended, only what was committed counts. What is left of long
work is seen from it: a batch whose last task says that some before it are missing is made
further; one that awaits what has not completed falls, as far as it has not fallen yet.

Knows: what of the store is still to be done, and what of it is out of date.
Does not know: files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache

from msgspec.structs import replace

from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.fleet import FleetNode
from kohaku_daemon.core.cluster.records import BatchRecord, TaskRecord
from kohaku_daemon.core.cluster.state import LiveBatch, live_batch
from protocol.ids import TaskId
from protocol.models.task import Cause, Exit, TaskState

#: Gives how a task or a batch stands in the store (``TaskStore.standing``).
Standing = Callable[[int], TaskState | None]


def restore_engine(
    engine: ClusterEngine,
    batches: Iterable[BatchRecord],
    tasks: Iterable[TaskRecord],
    standing: Standing,
    now: float,
) -> None:
    """Give a new engine the live tasks of the store, whose nodes it knows already.

    Args:
        engine: As new.
        batches: Those of the tasks.
        tasks: All that have not ended.
        standing: How what they wait for stands.
        now: UTC seconds.
    """
    state, live = engine.state, {task.id: task for task in tasks}
    held = {batch.id: batch for batch in batches}
    under_way: set[int] = {*live, *(task.batch for task in live.values())}
    look = cache(standing)
    for batch in held.values():
        state.add_batch(_revive(batch, live, under_way, look))
    for node in state.fleet.nodes.values():
        _drop_stale_remnants(node, live)
    for task in live.values():
        state.add_task(task)
        if task.folded:
            state.batches[task.batch].folded = task.folded
            engine.make_further(task)
    for name in held:
        revived = state.batches[name]
        if revived.may_begin:
            state.enqueue_batch(revived, now)
        elif revived.falls is not None and not revived.folded:
            engine.bring_down(revived)


def _revive(
    batch: BatchRecord, live: Collection[int], under_way: Collection[int], standing: Standing
) -> LiveBatch:
    """Make a batch's live part. It awaits what is under way, unless some of that went wrong."""
    falls = None
    for name in batch.after:
        state = None if name in live else standing(name)
        if state is not None and state.is_final and state is not TaskState.COMPLETED:
            why = f"{name}, which it had to wait for, did not complete ({state})"
            falls = Exit(Cause.DEPENDENCY, message=why)
    awaits = [] if falls is not None else [name for name in batch.after if name in under_way]
    revived = live_batch(batch, awaits)
    revived.falls = falls
    return revived


def _drop_stale_remnants(node: FleetNode, live: Mapping[TaskId, TaskRecord]) -> None:
    """Forget remnants of attempts that the task store has not given up.

    Nodes are written before tasks: a crash in between leaves the remnant of an attempt that,
    as far as the tasks know, goes on.
    """
    kept = []
    for remnant in node.record.remnants:
        task = live.get(remnant.task)
        if task is not None and (task.node, task.attempt) == (node.name, remnant.attempt):
            node.site.books.clear_remnant(remnant.task, remnant.attempt)
        else:
            kept.append(remnant)
    node.record = replace(node.record, remnants=tuple(kept))
