"""All the host holds in memory: the fleet, the live tasks, the queue.

Changed by the engine only. Tasks that ended are not here: the store has them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from kohaku_daemon.core.cluster.backlog import Backlog
from kohaku_daemon.core.cluster.fleet import Fleet
from kohaku_daemon.core.cluster.records import BatchRecord, TaskRecord
from kohaku_daemon.core.placement.request import Request, request_of
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.models.target import Target
from protocol.models.task import TaskState

#: Ended batches whose request ids are still answered from memory. Older ones are found in
#: the store; only those not committed yet must be here.
_REMEMBERED_BATCHES: Final = 1000


@dataclass(slots=True)
class LiveBatch:
    """A batch with tasks that have not ended, or that ended a moment ago."""

    record: BatchRecord
    #: One shape for all its tasks, or one for each target.
    requests: tuple[Request, ...]
    #: Tasks that have not ended.
    live: int = 0

    def request(self, index: int) -> Request:
        """Give the shape of one of its tasks."""
        return self.requests[index if len(self.requests) > 1 else 0]

    def target(self, index: int) -> Target | None:
        """Give where one of its tasks was sent, if anywhere."""
        return self.record.targets[index] if self.record.targets else None


def live_batch(record: BatchRecord) -> LiveBatch:
    """Make a batch's live part."""
    targets: tuple[Target | None, ...] = record.targets or (None,)
    return LiveBatch(record, tuple(request_of(record.spec, target) for target in targets))


@dataclass(slots=True)
class ClusterState:
    """The host's memory."""

    cluster: str
    fleet: Fleet = field(default_factory=Fleet)
    #: Every task that has not ended, lost ones included.
    tasks: dict[TaskId, TaskRecord] = field(default_factory=dict)
    batches: dict[BatchId, LiveBatch] = field(default_factory=dict)
    by_request: dict[tuple[UserName, str], BatchId] = field(default_factory=dict)
    #: Live tasks by the node they are on.
    on_node: dict[NodeName, dict[TaskId, TaskRecord]] = field(default_factory=dict)
    backlog: Backlog = field(default_factory=Backlog)
    #: Batches all of whose tasks have ended, the longest ago first.
    _ended: OrderedDict[BatchId, None] = field(default_factory=OrderedDict)

    def batch_of(self, task: TaskRecord) -> LiveBatch:
        """Give the batch of a live task."""
        return self.batches[task.batch]

    def tasks_on(self, node: NodeName) -> dict[TaskId, TaskRecord]:
        """Give the live tasks on a node."""
        return self.on_node.setdefault(node, {})

    def add_batch(self, batch: LiveBatch) -> None:
        """Hold a batch."""
        self.batches[batch.record.id] = batch
        self.by_request[(batch.record.owner, batch.record.request_id)] = batch.record.id

    def add_task(self, task: TaskRecord) -> None:
        """Hold a live task of a batch that is held."""
        self.tasks[task.id] = task
        batch = self.batch_of(task)
        batch.live += 1
        if task.state is TaskState.QUEUED:
            self.backlog.add(task.id, batch.request(task.index), batch.record.spec.priority)
        else:
            self.tasks_on(task.node)[task.id] = task
            node = self.fleet.nodes.get(task.node)
            if node is not None and task.claim is not None:
                node.site.books.restore(task.id, task.claim)

    def drop_task(self, task: TaskRecord) -> None:
        """Let go of a task that ended."""
        del self.tasks[task.id]
        self.backlog.discard(task.id)
        if task.node:
            self.tasks_on(task.node).pop(task.id, None)
        batch = self.batch_of(task)
        batch.live -= 1
        if batch.live == 0:
            self._ended[task.batch] = None
            self._forget_old_batches()

    def check_invariants(self) -> None:
        """Assert what must hold between any two events: for tests and the simulation."""
        for node in self.fleet.nodes.values():
            node.site.books.check()
            holders = {task.id for task in self.tasks_on(node.name).values() if task.claim}
            assert set(node.site.books.claims) == holders, f"claims of {node.name} have no tasks"
        for task in self.tasks.values():
            waiting = task.state is TaskState.QUEUED
            assert (task.id in self.backlog) == waiting, f"task {task.id} is {task.state}"
            assert waiting == (not task.node), f"task {task.id} is {task.state} on {task.node!r}"
            assert not task.state.is_final, f"task {task.id} has ended and is still held"
        assert len(self.backlog) == sum(t.state is TaskState.QUEUED for t in self.tasks.values())

    def _forget_old_batches(self) -> None:
        while len(self._ended) > _REMEMBERED_BATCHES:
            oldest, _ = self._ended.popitem(last=False)
            record = self.batches.pop(oldest).record
            del self.by_request[(record.owner, record.request_id)]
