"""All the host holds in memory: the fleet, the live tasks, the queue.

Changed by the engine only. Tasks that ended are not here: the store has them.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from kohaku_daemon.core.cluster.backlog import Backlog
from kohaku_daemon.core.cluster.fleet import Fleet
from kohaku_daemon.core.cluster.records import (
    BatchRecord,
    EnvironmentRecord,
    RegistryRecord,
    TaskRecord,
)
from kohaku_daemon.core.placement.request import Request, request_of
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.models.target import Target
from protocol.models.task import Exit, TaskState

#: Ended batches whose request ids are still answered from memory. Older ones are found in
#: the store; only those not committed yet must be here.
_REMEMBERED_BATCHES: Final = 1000
#: Seconds that a task waits at most before it is tried again.
LONGEST_DELAY_S: Final = 60.0


@dataclass(slots=True)
class LiveBatch:
    """A batch with tasks that have not ended, or that ended a moment ago."""

    record: BatchRecord
    #: One shape for all its tasks, or one for each target.
    requests: tuple[Request, ...]
    #: Tasks that have not ended.
    live: int = 0
    #: Tasks that ended without completing since this host started.
    failed: int = 0
    #: Tasks and batches that have to complete before any of its tasks is placed.
    awaits: set[int] = field(default_factory=set)
    #: The end that its tasks get that have not begun; None while they may begin.
    falls: Exit | None = None
    #: How many of its tasks are not made yet: all before the last one from some place on.
    folded: int = 0
    #: Its tasks are being let into the queue.
    is_entering: bool = False

    @property
    def may_begin(self) -> bool:
        """Whether nothing but room is in the way of its tasks."""
        return not self.awaits and self.falls is None

    def request(self, index: int) -> Request:
        """Give the shape of one of its tasks."""
        return self.requests[self.record.position(index) if len(self.requests) > 1 else 0]


def live_batch(record: BatchRecord, awaits: Iterable[int] = ()) -> LiveBatch:
    """Make a batch's live part. ``awaits``: what of its ``after`` has not completed."""
    targets: tuple[Target | None, ...] = record.targets or (None,)
    # Many targets are few shapes: to make and compare each is what a large batch costs.
    shapes = {
        target: request_of(record.spec, target, trusted=record.trusted)
        for target in dict.fromkeys(targets)
    }
    requests = tuple(map(shapes.__getitem__, targets))
    return LiveBatch(record, requests, awaits=set(awaits))


@dataclass(slots=True)
class ClusterState:
    """The host's memory."""

    cluster: str
    fleet: Fleet = field(default_factory=Fleet)
    #: By name, those that are deleted and not yet gone too.
    environments: dict[str, EnvironmentRecord] = field(default_factory=dict)
    #: By host name and port.
    registries: dict[str, RegistryRecord] = field(default_factory=dict)
    #: Every task that has not ended, lost ones included.
    tasks: dict[TaskId, TaskRecord] = field(default_factory=dict)
    batches: dict[BatchId, LiveBatch] = field(default_factory=dict)
    by_request: dict[tuple[UserName, str], BatchId] = field(default_factory=dict)
    #: Live tasks by the node they are on.
    on_node: dict[NodeName, dict[TaskId, TaskRecord]] = field(default_factory=dict)
    backlog: Backlog = field(default_factory=Backlog)
    #: Live batches by the tasks and batches they wait for.
    dependents: dict[int, dict[BatchId, None]] = field(default_factory=dict)
    #: Tasks to be tried again later: (UTC seconds, task); those that ended meanwhile too.
    delayed: list[tuple[float, TaskId]] = field(default_factory=list)
    #: Lost tasks that retries gave another attempt, by owner and request id.
    requeued: OrderedDict[tuple[UserName, str], dict[TaskId, None]] = field(
        default_factory=OrderedDict
    )
    #: Batches all of whose tasks have ended, the longest ago first.
    _ended: OrderedDict[BatchId, None] = field(default_factory=OrderedDict)

    def batch_of(self, task: TaskRecord) -> LiveBatch:
        """Give the batch of a live task."""
        return self.batches[task.batch]

    def tasks_on(self, node: NodeName) -> dict[TaskId, TaskRecord]:
        """Give the live tasks on a node."""
        return self.on_node.setdefault(node, {})

    def add_batch(self, batch: LiveBatch) -> None:
        """Hold a batch, with what it ``awaits``."""
        self.batches[batch.record.id] = batch
        for name in batch.awaits:
            self.dependents.setdefault(name, {})[batch.record.id] = None
        self.by_request[(batch.record.owner, batch.record.request_id)] = batch.record.id

    def add_task(self, task: TaskRecord) -> None:
        """Hold a live task of a batch that is held. One that waits is not in the queue yet."""
        self.tasks[task.id] = task
        self.batch_of(task).live += 1
        for request_id in task.retries_asked:
            self.note_retry(task, request_id)
        if task.state is not TaskState.QUEUED:
            self.tasks_on(task.node)[task.id] = task
            node = self.fleet.nodes.get(task.node)
            if node is not None and task.claim is not None:
                node.site.books.restore(task.id, task.claim)

    def note_retry(self, task: TaskRecord, request_id: str) -> None:
        """Remember which request gave a lost task another attempt."""
        self.requeued.setdefault((task.owner, request_id), {})[task.id] = None
        while len(self.requeued) > _REMEMBERED_BATCHES:
            self.requeued.popitem(last=False)

    def enqueue_batch(self, batch: LiveBatch, now: float) -> None:
        """Let the waiting tasks of a batch into the queue, none of which is there."""
        if batch.record.gang:
            self._enqueue_gang(batch)
        else:
            for task in self._waiting(batch):
                self.enqueue(task, now)

    def entering(self, batch: LiveBatch, now: float) -> Iterator[None]:
        """Let the tasks of a batch that awaits nothing more into the queue, one in each step.

        Meanwhile others of it are made, and find their way in by themselves.
        """
        if batch.record.gang:
            self._enqueue_gang(batch)
            return
        batch.is_entering = True
        for task in self._waiting(batch):
            # One that has an attempt was there, and is waiting for its next one.
            if not task.attempt and task.id not in self.backlog:
                self.enqueue(task, now)
            yield
        batch.is_entering = False

    def _waiting(self, batch: LiveBatch) -> Iterator[TaskRecord]:
        """Give the waiting tasks of a batch as they stand when each is looked at."""
        for name in batch.record.ids():
            task = self.tasks.get(name)
            # That of a batch that is being made comes when all the others are there.
            if task is not None and task.state is TaskState.QUEUED and not task.folded:
                yield task

    def _enqueue_gang(self, batch: LiveBatch) -> None:
        members = [(task.id, batch.request(task.index)) for task in self._waiting(batch)]
        if members:
            spec = batch.record.spec
            self.backlog.add_gang(batch.record.id, members, batch.record.owner, spec.priority)

    def enqueue(self, task: TaskRecord, now: float) -> None:
        """Let one waiting task into the queue, at once or when its time has come."""
        if now < task.not_before <= now + LONGEST_DELAY_S:
            heapq.heappush(self.delayed, (task.not_before, task.id))
            return
        batch = self.batch_of(task)
        request = batch.request(task.index)
        self.backlog.add(task.id, request, batch.record.owner, batch.record.spec.priority)

    def enqueue_due(self, now: float) -> None:
        """Let those into the queue whose time has come."""
        # Nothing is due later than that, unless the clock was set back meanwhile.
        while self.delayed and not now < self.delayed[0][0] <= now + LONGEST_DELAY_S:
            at, task_id = heapq.heappop(self.delayed)
            task = self.tasks.get(task_id)
            if task is not None and task.state is TaskState.QUEUED and task.not_before == at:
                self.enqueue(task, now)

    def next_dependent(self, name: int) -> LiveBatch | None:
        """Give a batch that awaits a task or batch, if there is one."""
        others = self.dependents.get(name)
        return self.batches[next(iter(others))] if others else None

    def await_no_more(self, batch: LiveBatch, name: int) -> None:
        """Note that a batch need not wait for something any more."""
        batch.awaits.discard(name)
        self._forget_dependent(batch, name)

    def await_nothing(self, batch: LiveBatch) -> None:
        """Note that a batch waits in vain, or for nothing."""
        for name in batch.awaits:
            self._forget_dependent(batch, name)
        batch.awaits.clear()

    def _forget_dependent(self, batch: LiveBatch, name: int) -> None:
        others = self.dependents[name]
        del others[batch.record.id]
        if not others:
            del self.dependents[name]

    def drop_task(self, task: TaskRecord) -> LiveBatch:
        """Let go of a task that ended; give its batch."""
        del self.tasks[task.id]
        self.backlog.discard(task.id)
        if task.node:
            self.tasks_on(task.node).pop(task.id, None)
        batch = self.batch_of(task)
        batch.live -= 1
        if batch.live == 0:
            self.await_nothing(batch)
            self._ended[task.batch] = None
            self._forget_old_batches()
        return batch

    def check_invariants(self) -> None:
        """Assert what must hold between any two events: for tests and the simulation."""
        for node in self.fleet.nodes.values():
            node.site.books.check()
            holders = {task.id for task in self.tasks_on(node.name).values() if task.claim}
            assert set(node.site.books.claims) == holders, f"claims of {node.name} have no tasks"
            remnants = {(one.task, one.attempt) for one in node.record.remnants}
            assert set(node.site.books.remnants) == remnants, f"remnants of {node.name} differ"
        later = {task for _, task in self.delayed}
        for task in self.tasks.values():
            waiting = task.state is TaskState.QUEUED
            held_back = self._is_held_back(task) or (
                task.id in later and task.id not in self.backlog
            )
            assert (task.id in self.backlog) == (waiting and not held_back), (
                f"task {task.id} is {task.state}"
            )
            assert waiting == (not task.node), f"task {task.id} is {task.state} on {task.node!r}"
            assert not task.state.is_final, f"task {task.id} has ended and is still held"
        assert sum(task in self.backlog for task in self.tasks) == len(self.backlog)
        for name, waiting_for_it in self.dependents.items():
            for batch in waiting_for_it:
                assert name in self.batches[batch].awaits, f"batch {batch} awaits no {name}"

    def _is_held_back(self, task: TaskRecord) -> bool:
        """Say whether a waiting task of a batch is not let into the queue at present."""
        batch = self.batch_of(task)
        if not batch.may_begin or task.folded:
            return True
        return batch.is_entering and not task.attempt and task.id not in self.backlog

    def _forget_old_batches(self) -> None:
        while len(self._ended) > _REMEMBERED_BATCHES:
            oldest, _ = self._ended.popitem(last=False)
            record = self.batches.pop(oldest).record
            del self.by_request[(record.owner, record.request_id)]
