"""Tasks come into being: by a submission, or as the retry of others.

Knows: that one request id makes its tasks once, what is refused at the door because no node
could ever hold it, and what a submission may wait for.
Does not know: when and where tasks are placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.access.permissions import may_steer
from kohaku_daemon.core.cluster.actions import Answer, SaveBatch, SaveTask
from kohaku_daemon.core.cluster.events import RetryAsked, SubmitAsked
from kohaku_daemon.core.cluster.moves import Moves
from kohaku_daemon.core.cluster.records import BatchRecord, TaskRecord
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState, LiveBatch, live_batch
from kohaku_daemon.core.placement.gang import fits_ever
from kohaku_daemon.core.placement.place import Site, candidates, could_ever, verdict
from kohaku_daemon.core.task.validation import batch_size, check_request_id, check_submission
from protocol.errors import Conflict, Forbidden, NoFit, NotFound, Unavailable
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.messages.task import Retried, Submitted
from protocol.models.task import Cause, Change, TaskState
from protocol.snowflake import SnowflakeSource

#: Nodes whose reasons a refusal names: an error has to stay small.
_MOST_NAMED: Final = 50
#: Tasks that an answer names.
_MOST_REQUEUED: Final = 1000


class Intake:
    """Makes tasks."""

    def __init__(
        self, state: ClusterState, ids: SnowflakeSource, scribe: Scribe, moves: Moves
    ) -> None:
        self._state = state
        self._ids = ids
        self._scribe = scribe
        self._moves = moves

    def submit(self, event: SubmitAsked) -> None:
        """Make the tasks of a submission, or say which it has made.

        Raises:
            KohakuError: It is refused.
        """
        request = event.request
        check_submission(request)
        owner = event.actor.user
        earlier = self._find_earlier(owner, request.request_id, event.digest, event.earlier)
        if earlier is not None:
            self._scribe.add(Answer(earlier))
            return
        for target in request.targets:
            self._state.fleet.find(target.node)
        awaits = self._find_awaited(event)
        size = batch_size(request)
        batch = BatchRecord(
            id=self._new_batch_id(),
            owner=owner,
            request_id=request.request_id,
            digest=event.digest,
            spec=request.spec,
            targets=request.targets,
            rows=request.rows,
            size=size,
            runs=tuple(self._ids.take(size, self._scribe.now)),
            created_at=self._scribe.now,
            after=tuple(request.after),
            gang=request.gang,
        )
        self._make(live_batch(batch, awaits), event.actor.user, "submitted", ())
        self._scribe.add(Answer(Submitted(batch.id, batch.runs)))

    def retry(self, event: RetryAsked) -> None:
        """Try tasks of one batch again: lost ones as they are, ended ones made anew.

        Raises:
            KohakuError: It is refused.
        """
        source = event.source
        check_request_id(event.request_id)
        if not may_steer(event.actor, source.owner):
            raise Forbidden(f"the tasks of batch {source.id} belong to somebody else")
        earlier = self._find_earlier(source.owner, event.request_id, event.digest, event.earlier)
        if earlier is not None:
            self._scribe.add(Answer(Retried(earlier)))
            return
        again = self._choose_ended(event)
        lost = self._find_lost(event.live)
        submitted = self._make_again(event, again) if again else None
        for task in lost:
            by = event.actor.user
            self._moves.requeue_lost(task, f"{by} asked for another attempt", by)
        if submitted is None and not lost:
            raise Conflict(self._say_nothing_to_retry(event))
        requeued = tuple(task.id for task in lost[:_MOST_REQUEUED])
        self._scribe.add(Answer(Retried(submitted, requeued)))

    def _choose_ended(self, event: RetryAsked) -> list[TaskRecord]:
        """Choose what is made anew: what did not complete, or all of a gang if any of it did not.

        Raises:
            Conflict: That cannot be tried again like this.
        """
        source = event.source
        bad = [task for task in event.ended if task.state is not TaskState.COMPLETED]
        for task in bad:
            if task.exit is not None and task.exit.cause is Cause.DEPENDENCY:
                raise Conflict(
                    f"task {task.id} never began, because what it had to wait for did not complete",
                    hint="try that again, then submit this again with --after the new id",
                )
        if not source.gang or not bad:
            return bad
        if len(event.ended) < source.count:
            raise Conflict(
                f"batch {source.id} is a gang, which is tried again as a whole or not at all",
                hint=f"once all of it has ended: kohaku task retry {source.id}",
            )
        return list(event.ended)

    def _find_earlier(
        self, owner: UserName, request_id: str, digest: bytes, stored: BatchRecord | None
    ) -> Submitted | None:
        held = self._state.by_request.get((owner, request_id))
        earlier = self._state.batches[held].record if held is not None else stored
        if earlier is None:
            return None
        if earlier.digest != digest:
            raise Conflict(
                f"request_id {request_id} was used for something else",
                hint="choose a new request_id for a new submission",
            )
        return Submitted(earlier.id, earlier.runs, repeated=True)

    def _new_batch_id(self) -> BatchId:
        ((batch_id, _),) = self._ids.take(1, self._scribe.now)
        return BatchId(batch_id)

    def _make(
        self, live: LiveBatch, actor: UserName, cause: str, retry_of: Sequence[TaskId]
    ) -> None:
        """Hold and save a new batch with its tasks, and let them wait."""
        batch, now = live.record, self._scribe.now
        _refuse_hopeless(live, self._state.fleet.sites)
        self._state.add_batch(live)
        self._scribe.add(SaveBatch(batch))
        first = (Change(now, TaskState.QUEUED, cause, actor),)
        position = 0
        for start, count in batch.runs:
            for task_id in range(start, start + count):
                task = TaskRecord(
                    id=TaskId(task_id),
                    batch=batch.id,
                    index=batch.places[position] if batch.places else position,
                    owner=batch.owner,
                    created_at=now,
                    history=first,
                    retry_of=retry_of[position] if retry_of else None,
                )
                self._state.add_task(task)
                self._scribe.add(SaveTask(task, batch))
                position += 1
        self._state.enqueue_batch(live, now)

    def _find_awaited(self, event: SubmitAsked) -> set[int]:
        """Give what of ``after`` is still under way.

        Raises:
            NotFound: There is no such task or batch.
            Conflict: It has ended without completing, so it would be waited for in vain.
        """
        awaits: set[int] = set()
        for name in dict.fromkeys(event.request.after):
            if name in self._state.tasks:
                awaits.add(name)
                continue
            batch = self._state.batches.get(BatchId(name))
            state = event.known.get(name)
            if batch is not None and batch.failed:
                state = TaskState.FAILED
            if batch is None and state is not None and not state.is_final:
                raise Unavailable(
                    f"after: task {name} has just ended, and how is not stored yet",
                    hint="try again in a moment",
                )
            if state is None and batch is None:
                raise NotFound(
                    f"after: there is no task or batch {name}", hint="see: kohaku task list"
                )
            if state is not None and state.is_final and state is not TaskState.COMPLETED:
                raise Conflict(
                    f"after: {name} did not complete ({state}), so nothing can wait for that",
                    hint=f"try it again, and wait for the new one: kohaku task retry {name}",
                )
            if batch is not None and batch.live:
                awaits.add(name)
        return awaits

    def _find_lost(self, tasks: Sequence[TaskId]) -> list[TaskRecord]:
        held = (self._state.tasks.get(task) for task in tasks)
        return [task for task in held if task is not None and task.state is TaskState.LOST]

    def _make_again(self, event: RetryAsked, again: list[TaskRecord]) -> Submitted:
        source = event.source
        again.sort(key=lambda task: task.index)
        spots = [source.position(task.index) for task in again]
        targets = tuple(source.targets[spot] for spot in spots) if source.targets else ()
        for target in targets:
            self._state.fleet.find(target.node)
        batch = replace(
            source,
            id=self._new_batch_id(),
            request_id=event.request_id,
            digest=event.digest,
            targets=targets,
            rows=tuple(source.rows[spot] for spot in spots) if source.rows else (),
            runs=tuple(self._ids.take(len(again), self._scribe.now)),
            places=tuple(task.index for task in again),
            created_at=self._scribe.now,
            after=(),
        )
        cause = f"tries tasks of batch {source.id} again"
        self._make(live_batch(batch), event.actor.user, cause, [task.id for task in again])
        return Submitted(batch.id, batch.runs)

    def _say_nothing_to_retry(self, event: RetryAsked) -> str:
        if len(event.live) == 1:
            task = self._state.tasks.get(event.live[0])
            if task is not None:
                return f"task {task.id} is {task.state}; only what is lost or ended is tried again"
        if event.live:
            return f"nothing of batch {event.source.id} is lost or has ended without completing"
        return "nothing to try again: all of it completed"


def _refuse_hopeless(batch: LiveBatch, sites: dict[NodeName, Site]) -> None:
    """Refuse what no known node could ever hold. With no nodes yet, it may wait for some.

    Raises:
        NoFit: With the reasons, node by node.
    """
    for request in dict.fromkeys(batch.requests):
        asked = list(candidates(request, sites))
        # A node that joined and never registered has shown no hardware to judge by.
        hopeful = (not site.books.inventory.cores or could_ever(request, site) for site in asked)
        if not asked or any(hopeful):
            continue
        verdicts = [verdict(request, site) for site in sorted(asked, key=lambda site: site.name)]
        raise NoFit(
            f"no node could ever hold this, even idle ({len(verdicts)} asked)",
            hint="ask for less, or see what there is: kohaku node list",
            details={"reasons": {one.node: list(one.reasons) for one in verdicts[:_MOST_NAMED]}},
        )
    if batch.record.gang:
        _refuse_hopeless_gang(batch, sites)


def _refuse_hopeless_gang(batch: LiveBatch, sites: dict[NodeName, Site]) -> None:
    if not sites or any(not site.books.inventory.cores for site in sites.values()):
        return  # one that never registered may bring what is missing
    places = batch.record.places or range(batch.record.size)
    members = [(TaskId(place), batch.request(place)) for place in places]
    if not fits_ever(members, sites):
        raise NoFit(
            f"the {len(members)} tasks of this gang do not fit together, even on idle nodes",
            hint="ask for less, or leave out --gang to let them begin one by one",
        )
