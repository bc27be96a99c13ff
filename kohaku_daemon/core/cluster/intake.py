"""Tasks come into being: by a submission, or as the retry of others.

Knows: that one request id makes its tasks once, what is refused at the door because no node
could ever hold it, what a submission may wait for, what it runs in, and what a retry tries
again.
Does not know: how tasks are made (``making``), when and where they are placed.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.access.permissions import check_powers, may_steer
from kohaku_daemon.core.cluster.ended import Places
from kohaku_daemon.core.cluster.environments import choose_image
from kohaku_daemon.core.cluster.events import RetryAsked, SubmitAsked, WholeAsked
from kohaku_daemon.core.cluster.long_work import LongWork, Work
from kohaku_daemon.core.cluster.making import Making
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
from protocol.models.access import Role
from protocol.models.task import TaskState
from protocol.snowflake import SnowflakeSource

#: Nodes whose reasons a refusal names: an error has to stay small.
_MOST_NAMED: Final = 50
#: Tasks that an answer names.
_MOST_REQUEUED: Final = 1000
#: Retries that a task remembers, so that each of them can be asked for again.
_MOST_RETRIES_KEPT: Final = 16


class Intake:
    """Takes submissions and retries."""

    def __init__(
        self,
        state: ClusterState,
        ids: SnowflakeSource,
        scribe: Scribe,
        moves: Moves,
        making: Making,
        works: LongWork,
    ) -> None:
        self._state = state
        self._ids = ids
        self._scribe = scribe
        self._moves = moves
        self._making = making
        self._works = works

    def submit(self, event: SubmitAsked) -> None:
        """Make the tasks of a submission, or say which it has made.

        Raises:
            KohakuError: It is refused.
        """
        request = event.request
        check_submission(request)
        check_powers(event.actor, request.spec)
        owner = event.actor.user
        earlier = self._find_earlier(owner, request.request_id, event.digest, event.earlier)
        if earlier is not None:
            self._answer_again(earlier, _say(earlier))
            return
        for name in dict.fromkeys(target.node for target in request.targets):
            self._state.fleet.find(name)
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
            image=choose_image(self._state, request.spec),
            trusted=event.actor.role.reaches(Role.OPERATOR),
        )
        live = live_batch(batch, awaits)
        _refuse_hopeless(live, self._state.fleet.sites)
        self._works.answer(self._making.make(live))

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
        before = self._state.requeued.get((source.owner, event.request_id), {})
        requeued = [*dict.fromkeys((*event.ended.requeued, *before))]
        lost = self._find_lost(event)
        again = None
        if earlier is None and not requeued:
            again = self._plan_again(event)
            if again is None and not lost:
                raise Conflict(self._say_nothing_to_retry(event))
        work = self._try_again(event, earlier, again, lost, requeued)
        if earlier is None:
            self._works.answer(work)
        else:
            self._answer_again(earlier, work)

    def _try_again(
        self,
        event: RetryAsked,
        submitted: Submitted | None,
        again: LiveBatch | None,
        lost: list[TaskRecord],
        requeued: list[TaskId],
    ) -> Work:
        """Make tasks anew and requeue others. What was done before is in what is given."""
        if again is not None:
            submitted = yield from self._making.make(again)
        by = event.actor.user
        for task in lost:
            if task.state is TaskState.LOST:
                task.retries_asked = (*task.retries_asked, event.request_id)[-_MOST_RETRIES_KEPT:]
                self._state.note_retry(task, event.request_id)
                self._moves.requeue_lost(task, f"{by} asked for another attempt", by)
                requeued.append(task.id)
            yield
        return Retried(submitted, tuple(requeued[:_MOST_REQUEUED]))

    def _choose_ended(self, event: RetryAsked) -> Places:
        """Choose what is made anew: what did not complete, or all of a gang if any of it did not.

        Raises:
            Conflict: That cannot be tried again like this.
        """
        source, ended = event.source, event.ended
        if ended.in_vain is not None:
            raise Conflict(
                f"task {ended.in_vain} never began, because what it had to wait for did not"
                " complete",
                hint="try that again, then submit this again with --after the new id",
            )
        if not source.gang or not ended.bad:
            return ended.bad
        if len(ended.every) < source.count:
            raise Conflict(
                f"batch {source.id} is a gang, which is tried again as a whole or not at all",
                hint=f"once all of it has ended: kohaku task retry {source.id}",
            )
        return ended.every

    def _answer_again(self, earlier: Submitted, work: Work) -> None:
        """Answer a request that comes again, once all that was promised for it is there."""
        batch = self._state.batches.get(earlier.batch)
        if batch is not None and batch.folded:
            self._works.answer_after(earlier.batch, work)
        else:
            self._works.answer(work)

    def tell_when_whole(self, event: WholeAsked) -> None:
        """Answer once all tasks of a batch are made, or at once if it is none that is live."""
        batch = self._state.batches.get(event.batch)
        if batch is not None and batch.folded:
            self._works.answer_after(event.batch, _say(None))
        else:
            self._works.answer(_say(None))

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

    def _find_lost(self, event: RetryAsked) -> list[TaskRecord]:
        """Give the lost ones of those named. What is lost is on some node."""
        if event.task is not None:
            task = self._state.tasks.get(event.task)
            found = [task] if task is not None else []
        else:
            found = [
                task
                for tasks in self._state.on_node.values()
                for task in tasks.values()
                if task.batch == event.source.id
            ]
        return sorted(
            (task for task in found if task.state is TaskState.LOST), key=lambda task: task.id
        )

    def _plan_again(self, event: RetryAsked) -> LiveBatch | None:
        """Give the batch in which tasks that ended are made anew; None if there are none.

        Raises:
            KohakuError: They cannot be tried again.
        """
        source, chosen = event.source, self._choose_ended(event)
        if not chosen:
            return None
        targets, rows = source.targets, source.rows
        if targets or rows:
            spots = [source.position(place) for place in chosen.places]
            targets = tuple(targets[spot] for spot in spots) if targets else ()
            rows = tuple(rows[spot] for spot in spots) if rows else ()
        for name in dict.fromkeys(target.node for target in targets):
            self._state.fleet.find(name)
        batch = live_batch(
            replace(
                source,
                id=self._new_batch_id(),
                request_id=event.request_id,
                digest=event.digest,
                targets=targets,
                rows=rows,
                runs=tuple(self._ids.take(len(chosen), self._scribe.now)),
                places=tuple(chosen.places),
                created_at=self._scribe.now,
                after=(),
                image=choose_image(self._state, source.spec),
                pinned="",
                # Nobody gets more by having somebody else try it again, or after a demotion.
                trusted=source.trusted and event.actor.role.reaches(Role.OPERATOR),
                source=source.id,
                replaces=tuple(chosen.runs),
                by=event.actor.user,
            )
        )
        _refuse_hopeless(batch, self._state.fleet.sites)
        return batch

    def _say_nothing_to_retry(self, event: RetryAsked) -> str:
        if event.task is not None:
            task = self._state.tasks.get(event.task)
            if task is not None:
                return f"task {task.id} is {task.state}; only what is lost or ended is tried again"
        elif len(event.ended.every) < event.source.count:
            return f"nothing of batch {event.source.id} is lost or has ended without completing"
        return "nothing to try again: all of it completed"


def _say(value: object) -> Work:
    """Give an answer for which nothing has to be done."""
    return value
    yield


def _refuse_hopeless(batch: LiveBatch, sites: dict[NodeName, Site]) -> None:
    """Refuse what no known node could ever hold. With no nodes yet, it may wait for some.

    Raises:
        NoFit: With the reasons, node by node.
    """
    # The same shape is mostly the same object, and hashing it takes long.
    shapes = {id(request): request for request in batch.requests}
    for request in dict.fromkeys(shapes.values()):
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
