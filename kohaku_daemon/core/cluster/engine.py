"""The host as one state machine: ``handle(event, now) -> actions``.

Knows: every rule of the cluster, through the rooms beside it.
Does not know: sockets, files, the clock. The state is changed here and nowhere else, so a
whole cluster of these can be run in a simulation and checked after every event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, assert_never

from msgspec.structs import replace

from kohaku_daemon.core.access.permissions import may_steer
from kohaku_daemon.core.cluster.actions import (
    Answer,
    CloseLink,
    ClusterAction,
    NodeChanged,
    ReadingsChanged,
    Refuse,
    SaveBatch,
    SaveEvent,
    SaveTask,
    SendOrder,
)
from kohaku_daemon.core.cluster.events import (
    ClusterEvent,
    DrainAsked,
    JoinAsked,
    JoinTokenAsked,
    LabelAsked,
    PlacementDue,
    RemoveAsked,
    RunnerBeat,
    RunnerGone,
    RunnerRegistered,
    RunnerReported,
    SteerAsked,
    SubmitAsked,
    Ticked,
    Verb,
)
from kohaku_daemon.core.cluster.fleet import MISSED_HEARTBEATS, FleetNode
from kohaku_daemon.core.cluster.records import (
    BatchRecord,
    DropDocument,
    EventRecord,
    JoinTokenRecord,
    NodeRecord,
    PutDocument,
    TaskRecord,
)
from kohaku_daemon.core.cluster.state import ClusterState, LiveBatch, live_batch
from kohaku_daemon.core.cluster.views import describe_exit
from kohaku_daemon.core.placement.place import candidates, verdict
from kohaku_daemon.core.task.lifecycle import InvalidTransition, TaskEvent, advance, ending
from kohaku_daemon.core.task.validation import batch_size, check_labels, check_submission
from protocol.errors import BadRequest, Conflict, KohakuError, NoFit
from protocol.ids import BatchId, NodeName, TaskId, parse_node_name
from protocol.messages.runner import (
    AttemptReport,
    AttemptState,
    OrderKill,
    OrderPause,
    OrderResume,
    OrderStart,
)
from protocol.messages.task import SteerResult, Submitted
from protocol.models.node import NodeState
from protocol.models.task import Cause, Change, Claim, Exit, TaskState
from protocol.snowflake import SnowflakeSource

_REPORTED: Final[Mapping[AttemptState, TaskEvent]] = {
    AttemptState.ACCEPTED: TaskEvent.ACCEPTED,
    AttemptState.RUNNING: TaskEvent.STARTED,
    AttemptState.PAUSED: TaskEvent.PAUSED,
}
#: What history says of a step that the runner has nothing to add to.
_SAID: Final[Mapping[AttemptState, str]] = {
    AttemptState.ACCEPTED: "the runner has the order",
    AttemptState.RUNNING: "runs",
    AttemptState.PAUSED: "held still",
}
#: Nodes whose reasons a refusal names: an error has to stay small.
_MOST_NAMED: Final = 50
#: Labels of one node: a row of it has to fit into a frame beside others.
_MOST_LABELS: Final = 64
_LONGEST_JOIN_TOKEN_S: Final = 30 * 86400.0


class ClusterEngine:
    """The host's decisions."""

    def __init__(
        self,
        state: ClusterState,
        ids: SnowflakeSource,
        *,
        last_event: int = 0,
        heartbeat_s: float = 2.0,
        lost_after_s: float = 120.0,
    ) -> None:
        self.state = state
        self._ids = ids
        self._last_event = last_event
        self._silent_after_s = heartbeat_s * MISSED_HEARTBEATS
        self._lost_after_s = lost_after_s
        self._out: list[ClusterAction] = []
        self._now = 0.0

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:
        """Take one event at ``now`` (UTC seconds) and say what to do.

        Never raises for what an event contains: a request that cannot be granted is
        answered with ``Refuse``, a report that is not believed changes nothing.
        """
        self._out = []
        self._now = now
        try:
            self._dispatch(event)
        except KohakuError as error:
            self._out = [Refuse(error)]
        return self._out

    def _dispatch(self, event: ClusterEvent) -> None:
        match event:
            case SubmitAsked():
                self._submit(event)
            case SteerAsked():
                self._steer(event)
            case DrainAsked():
                self._drain(event)
            case LabelAsked():
                self._label(event)
            case RemoveAsked():
                self._remove(event)
            case JoinTokenAsked():
                self._make_join_token(event)
            case JoinAsked():
                self._join(event)
            case RunnerRegistered():
                self._register(event)
            case RunnerReported():
                self._report(event)
            case RunnerBeat():
                self._beat(event)
            case RunnerGone():
                self._gone(event)
            case Ticked():
                self._tick()
            case PlacementDue():
                self._place()
            case _:
                assert_never(event)

    # Submitting ---------------------------------------------------------------------

    def _submit(self, event: SubmitAsked) -> None:
        request = event.request
        check_submission(request)
        earlier = self._earlier(event)
        if earlier is not None:
            if earlier.digest != event.digest:
                raise Conflict(
                    f"request_id {request.request_id} was used for something else",
                    hint="choose a new request_id for a new submission",
                )
            self._out.append(Answer(Submitted(earlier.id, earlier.runs, repeated=True)))
            return
        for target in request.targets:
            self.state.fleet.find(target.node)
        batch = self._new_batch(event)
        live = live_batch(batch)
        self._refuse_hopeless(live)
        self.state.add_batch(live)
        self._out.append(SaveBatch(batch))
        first = (Change(self._now, TaskState.QUEUED, "submitted", event.actor.user),)
        index = 0
        for start, count in batch.runs:
            for task_id in range(start, start + count):
                task = TaskRecord(
                    id=TaskId(task_id),
                    batch=batch.id,
                    index=index,
                    owner=batch.owner,
                    created_at=self._now,
                    history=first,
                )
                self.state.add_task(task)
                self._out.append(SaveTask(task, batch))
                index += 1
        self._out.append(Answer(Submitted(batch.id, batch.runs)))

    def _earlier(self, event: SubmitAsked) -> BatchRecord | None:
        held = self.state.by_request.get((event.actor.user, event.request.request_id))
        return self.state.batches[held].record if held is not None else event.earlier

    def _new_batch(self, event: SubmitAsked) -> BatchRecord:
        request = event.request
        size = batch_size(request)
        ((batch_id, _),) = self._ids.take(1, self._now)
        return BatchRecord(
            id=BatchId(batch_id),
            owner=event.actor.user,
            request_id=request.request_id,
            digest=event.digest,
            spec=request.spec,
            targets=request.targets,
            rows=request.rows,
            size=size,
            runs=tuple(self._ids.take(size, self._now)),
            created_at=self._now,
        )

    def _refuse_hopeless(self, batch: LiveBatch) -> None:
        """Refuse what no known node could ever hold. With no nodes yet, it may wait for some."""
        sites = self.state.fleet.sites
        for request in dict.fromkeys(batch.requests):
            asked = sorted(candidates(request, sites), key=lambda site: site.name)
            verdicts = [verdict(request, site) for site in asked]
            # A node that joined and never registered has shown no hardware to judge by.
            unknown = any(not site.books.inventory.cores for site in asked)
            if not asked or unknown or any(one.could_ever for one in verdicts):
                continue
            raise NoFit(
                f"no node could ever hold this, even idle ({len(verdicts)} asked)",
                hint="ask for less, or see what there is: kohaku node list",
                details={
                    "reasons": {one.node: list(one.reasons) for one in verdicts[:_MOST_NAMED]}
                },
            )

    # Steering -----------------------------------------------------------------------

    def _steer(self, event: SteerAsked) -> None:
        asked = 0
        refused: list[tuple[TaskId, str]] = []
        for task_id in dict.fromkeys(event.tasks):
            why = self._steer_one(event, task_id)
            if why:
                refused.append((task_id, why))
            else:
                asked += 1
        self._out.append(Answer(SteerResult(asked, tuple(refused[:100]))))

    def _steer_one(self, event: SteerAsked, task_id: TaskId) -> str:
        task = self.state.tasks.get(task_id)
        if task is None:
            ended = event.ended.get(task_id)
            return f"it is {ended} already" if ended is not None else "there is no such task"
        if not may_steer(event.actor, task.owner):
            return "it belongs to somebody else"
        match event.verb:
            case Verb.KILL:
                return self._kill(task, event.actor.user)
            case Verb.PAUSE:
                return self._hold(
                    task, TaskState.RUNNING, OrderPause(task=task.id, attempt=task.attempt)
                )
            case Verb.RESUME:
                return self._hold(
                    task, TaskState.PAUSED, OrderResume(task=task.id, attempt=task.attempt)
                )
            case _:
                assert_never(event.verb)

    def _kill(self, task: TaskRecord, actor: str) -> str:
        if task.state is TaskState.QUEUED:
            task.kill_asked_by = actor
            exit_ = Exit(Cause.KILLED, message="it was still waiting")
            self._finish(task, TaskEvent.KILLED, exit_, self._now)
            return ""
        if not task.kill_asked_by:
            task.kill_asked_by = actor
            self._note(task, "end asked for", actor)
        self._order_kill(task)
        return ""

    def _hold(self, task: TaskRecord, wanted: TaskState, order: OrderPause | OrderResume) -> str:
        if task.state is not wanted:
            return f"it is {task.state}, not {wanted}"
        node = self.state.fleet.nodes.get(task.node)
        if node is None or not node.is_online:
            return f"its node {task.node} is away; try again when it is back"
        self._out.append(SendOrder(task.node, order))
        return ""

    def _order_kill(self, task: TaskRecord) -> None:
        grace_s = self.state.batch_of(task).record.spec.grace_s
        order = OrderKill(task=task.id, attempt=task.attempt, grace_s=grace_s)
        self._out.append(SendOrder(task.node, order))

    # Nodes --------------------------------------------------------------------------

    def _drain(self, event: DrainAsked) -> None:
        node = self.state.fleet.find(event.node)
        if node.record.draining != event.draining:
            node.record = replace(node.record, draining=event.draining)
            node.close_or_open()
            self.state.backlog.loosen()
            self._keep_node(node)
            kind = "node.draining" if event.draining else "node.undrained"
            text = "gets nothing new" if event.draining else "takes work again"
            self._tell(kind, f"{node.name} {text}", node=node.name, actor=event.actor.user)
        self._out.append(Answer(node.view()))

    def _label(self, event: LabelAsked) -> None:
        node = self.state.fleet.find(event.node)
        check_labels(event.set)
        labels = {**node.record.labels, **event.set}
        for key in event.unset:
            if key not in labels:
                raise BadRequest(f"node {node.name} has no label {key}")
            del labels[key]
        if len(labels) > _MOST_LABELS:
            raise BadRequest(f"a node has at most {_MOST_LABELS} labels")
        node.record = replace(node.record, labels=labels)
        node.site.labels = labels
        self.state.backlog.loosen()
        self._keep_node(node)
        self._out.append(Answer(node.view()))

    def _remove(self, event: RemoveAsked) -> None:
        node = self.state.fleet.find(event.node)
        tasks = self.state.tasks_on(node.name)
        if tasks and not event.force:
            raise Conflict(
                f"node {node.name} has {len(tasks)} task{'s' if len(tasks) > 1 else ''} on it",
                hint=f"let them end: kohaku node drain {node.name}; or give them up: --force",
            )
        self._give_up(node.name)
        view = node.view()
        del self.state.fleet.nodes[node.name]
        self.state.backlog.loosen()
        self._out.append(DropDocument(NodeRecord, node.name))
        self._out.append(CloseLink(node.name, "the node was removed from the cluster"))
        self._out.append(NodeChanged(node.name))
        text = f"{node.name} left the cluster"
        self._tell("node.removed", text, node=node.name, actor=event.actor.user)
        self._out.append(Answer(view))

    def _give_up(self, node: NodeName) -> None:
        """End the tasks of a node that is removed: nobody will tell their end any more."""
        for task in list(self.state.tasks_on(node).values()):
            exit_ = Exit(
                Cause.NODE_REMOVED, message="what it left on the machine is not followed up"
            )
            self._finish(task, TaskEvent.KILLED, exit_, self._now)
        del self.state.on_node[node]

    def _make_join_token(self, event: JoinTokenAsked) -> None:
        if not 1 <= event.uses <= 1000:
            raise BadRequest(f"uses must be 1 to 1000, not {event.uses}")
        if not 0 < event.lasts_s <= _LONGEST_JOIN_TOKEN_S:
            raise BadRequest("a join token lasts more than 0 seconds and at most 30 days")
        if event.node:
            parse_node_name(event.node)
        token = JoinTokenRecord(
            digest=event.digest,
            prefix=event.prefix,
            uses_left=event.uses,
            expires_at=self._now + event.lasts_s,
            node=event.node,
            created_by=event.actor.user,
        )
        self.state.fleet.join_tokens[event.digest] = token
        self._out.append(PutDocument(token))
        self._out.append(Answer(token.expires_at))

    def _join(self, event: JoinAsked) -> None:
        name = parse_node_name(event.node)
        check_labels(event.labels)
        node, token = self.state.fleet.admit(
            event.token_digest, name, event.credential_digest, dict(event.labels), self._now
        )
        if token is not None:
            self._out.append(PutDocument(token))
            self._keep_node(node)
            self._tell("node.joined", f"{name} joined from {event.address}", node=name)
        self._out.append(Answer(name))

    # Runners ------------------------------------------------------------------------

    def _register(self, event: RunnerRegistered) -> None:
        node = self.state.fleet.find(event.node)
        was = node.state
        self.state.fleet.online(node, event.inventory, self._now)
        self._keep_node(node)
        known = {(report.task, report.attempt) for report in event.attempts}
        for report in event.attempts:
            self._take_report(node, report)
            self._end_unwanted(node, report, event.ended)
        for task in list(self.state.tasks_on(node.name).values()):
            self._reconcile(node, task, known)
        self.state.backlog.loosen()
        if was is not NodeState.ONLINE:
            text = f"{node.name} is online from {event.address}"
            self._tell("node.online", text, node=node.name)
        self._out.append(Answer(node.name))

    def _end_unwanted(
        self, node: FleetNode, report: AttemptReport, ended: frozenset[TaskId]
    ) -> None:
        """End what runs there although the books say it ended, as after ``node remove --force``.

        What the books never heard of is left alone: a host that lost its store must not
        make its nodes lose their work.
        """
        if report.state is AttemptState.ENDED or report.task in self.state.tasks:
            return
        if report.task in ended:
            order = OrderKill(task=report.task, attempt=report.attempt)
            self._out.append(SendOrder(node.name, order))
        else:
            text = f"{node.name} runs task {report.task}, which this host does not know"
            self._tell("task.unknown", text, node=node.name)

    def _reconcile(self, node: FleetNode, task: TaskRecord, known: set[tuple[TaskId, int]]) -> None:
        """Bring one task of the books in line with what its runner has just said it knows."""
        if task.kill_asked_by:
            # Also if the order to start never arrived: the runner is told to refuse it, and
            # as the old link is gone, nothing can overtake that.
            self._order_kill(task)
        elif (task.id, task.attempt) in known:
            return
        elif not _was_accepted(task):
            # Lost or not, the order never arrived: its first time is still to come.
            self._order_start(task)
        elif task.state is not TaskState.LOST:
            self._miss(task, f"{node.name} no longer knows it")

    def _report(self, event: RunnerReported) -> None:
        node = self.state.fleet.nodes.get(event.node)
        if node is not None:
            for report in event.reports:
                self._take_report(node, report)
        self._out.append(Answer(None))

    def _take_report(self, node: FleetNode, report: AttemptReport) -> None:
        task = self.state.tasks.get(report.task)
        if task is None or task.node != node.name or task.attempt != report.attempt:
            return  # of an attempt that is over, or that was never this node's: fenced off
        if report.state is AttemptState.ENDED:
            exit_ = report.exit or Exit(Cause.NODE_FAILED, message="the runner gave no reason")
            event = ending(exit_, kill_asked=bool(task.kill_asked_by))
            if report.started_at:
                task.started_at = self._plausible(report.started_at)
            self._finish(task, event, exit_, self._plausible(report.at))
            return
        back = task.state is TaskState.LOST
        try:
            after = advance(task.state, _REPORTED[report.state])
        except InvalidTransition:
            # Said twice, or overtaken by what came after: only a remark can be new.
            self._take_remark(task, report)
            return
        if report.started_at and not task.started_at:
            task.started_at = self._plausible(report.started_at)
        self._move(task, after, report.note or _SAID[report.state])
        if back:
            self._tell("task.back", f"task {task.id} is {after} on {node.name}", task=task)

    def _take_remark(self, task: TaskRecord, report: AttemptReport) -> None:
        """Keep what a runner has to say about a task that stays as it is, once."""
        said = any(
            change.attempt == task.attempt and change.cause == report.note
            for change in task.history
        )
        if report.note and not said:
            self._note(task, report.note)

    def _beat(self, event: RunnerBeat) -> None:
        node = self.state.fleet.nodes.get(event.node)
        if node is None:
            return
        if node.state is NodeState.LOST:
            # Its tasks were given up; what became of them is said when a link is opened.
            self._out.append(CloseLink(node.name, "it was silent too long: register again"))
            return
        node.seen_at = self._now
        node.readings = event.readings
        self._out.append(ReadingsChanged(node.name))
        faults = {gpu.uuid: gpu.fault for gpu in event.readings.gpus if gpu.fault}
        if faults != node.site.books.faults:
            for uuid in faults.keys() - node.site.books.faults.keys():
                text = f"{node.name}: GPU {uuid} is out of service: {faults[uuid]}"
                self._tell("node.gpu_fault", text, node=node.name)
            node.site.books.refit(node.record.inventory, faults)
            self.state.backlog.loosen()
            self._out.append(NodeChanged(node.name))
        if not node.is_online:
            node.state = NodeState.ONLINE
            node.close_or_open()
            self.state.backlog.loosen()
            self._out.append(NodeChanged(node.name))
            self._tell("node.online", f"{node.name} answers again", node=node.name)

    def _gone(self, event: RunnerGone) -> None:
        node = self.state.fleet.nodes.get(event.node)
        if node is not None and node.is_online:
            self._take_offline(node, event.reason)

    def _take_offline(self, node: FleetNode, reason: str) -> None:
        self.state.fleet.offline(node, self._now)
        self.state.backlog.loosen()
        self._out.append(NodeChanged(node.name))
        self._tell("node.offline", f"{node.name} is offline: {reason}", node=node.name)

    def _tick(self) -> None:
        for node in self.state.fleet.nodes.values():
            if node.is_online and self._now - node.seen_at > self._silent_after_s:
                self._take_offline(node, f"silent for {self._now - node.seen_at:.0f} s")
            elif (
                node.state is NodeState.OFFLINE
                and self._now - node.offline_since > self._lost_after_s
            ):
                self._lose(node)
        for name in sorted(self.state.on_node.keys() - self.state.fleet.nodes.keys()):
            # A crash between both stores can leave tasks of a node that was removed.
            self._give_up(name)
        for digest in self.state.fleet.drop_old_tokens(self._now):
            self._out.append(DropDocument(JoinTokenRecord, digest))

    def _lose(self, node: FleetNode) -> None:
        node.state = NodeState.LOST
        node.close_or_open()
        self._out.append(NodeChanged(node.name))
        self._tell("node.lost", f"{node.name} has been away too long", node=node.name)
        for task in list(self.state.tasks_on(node.name).values()):
            if task.state is not TaskState.LOST:
                self._miss(task, f"{node.name} has been away too long")

    # Placement ----------------------------------------------------------------------

    def _place(self) -> None:
        sites = self.state.fleet.sites
        for placement in self.state.backlog.place_waiting(sites):
            self._assign(self.state.tasks[placement.task], placement.node, placement.claim)

    def _assign(self, task: TaskRecord, node: NodeName, claim: Claim) -> None:
        self.state.fleet.nodes[node].site.books.enter(task.id, claim)
        task.node = node
        task.claim = claim
        task.attempt += 1
        self.state.tasks_on(node)[task.id] = task
        self._move(task, advance(task.state, TaskEvent.PLACED), "placed")
        self._out.append(NodeChanged(node))
        self._order_start(task)

    def _order_start(self, task: TaskRecord) -> None:
        batch = self.state.batch_of(task).record
        spec = batch.spec
        if batch.rows:
            spec = replace(spec, env={**spec.env, **batch.rows[task.index]})
        order = OrderStart(
            task=task.id,
            attempt=task.attempt,
            batch=task.batch,
            index=task.index,
            size=batch.size,
            spec=spec,
            claim=task.claim or Claim(),
        )
        self._out.append(SendOrder(task.node, order))

    # Moving one task ----------------------------------------------------------------

    def _move(self, task: TaskRecord, state: TaskState, cause: str, actor: str = "") -> None:
        task.state = state
        self._note(task, cause, actor)

    def _note(self, task: TaskRecord, cause: str, actor: str = "") -> None:
        change = Change(self._now, task.state, cause, actor, task.attempt, task.node)
        task.history = (*task.history, change)
        self._out.append(SaveTask(task, self.state.batch_of(task).record))

    def _miss(self, task: TaskRecord, reason: str) -> None:
        task.reason = reason
        self._move(task, advance(task.state, TaskEvent.MISSED), reason)
        self._tell("task.lost", f"task {task.id} is lost: {reason}", task=task)

    def _finish(self, task: TaskRecord, event: TaskEvent, exit_: Exit, at: float) -> None:
        """End a task: state, exit, claim, queue."""
        state = advance(task.state, event)
        if state is TaskState.KILLED and exit_.cause in {Cause.SIGNALLED, Cause.EXITED}:
            exit_ = replace(exit_, cause=Cause.KILLED)
        spec = self.state.batch_of(task).record.spec
        task.exit = exit_
        task.ended_at = at
        task.reason = describe_exit(exit_, spec, task.kill_asked_by)
        self._move(
            task, state, task.reason, task.kill_asked_by if state is TaskState.KILLED else ""
        )
        if task.node and task.claim is not None and task.node in self.state.fleet.nodes:
            self.state.fleet.nodes[task.node].site.books.strike(task.id)
            self.state.backlog.loosen()
            self._out.append(NodeChanged(task.node))
        self.state.drop_task(task)

    def _plausible(self, at: float) -> float:
        """Take a runner's word for a time unless its clock is off: never in the future."""
        return min(at, self._now) if at > 0 else self._now

    # The diary ----------------------------------------------------------------------

    def _keep_node(self, node: FleetNode) -> None:
        self._out.append(PutDocument(node.record))
        self._out.append(NodeChanged(node.name))

    def _tell(
        self,
        kind: str,
        text: str,
        *,
        node: str = "",
        task: TaskRecord | None = None,
        actor: str = "",
    ) -> None:
        self._last_event += 1
        self._out.append(
            SaveEvent(
                EventRecord(
                    id=self._last_event,
                    at=self._now,
                    kind=kind,
                    text=text,
                    node=node or (task.node if task is not None else ""),
                    task=task.id if task is not None else None,
                    actor=actor,
                )
            )
        )


def _was_accepted(task: TaskRecord) -> bool:
    """Say whether a runner ever had the order to launch this attempt."""
    return any(
        change.attempt == task.attempt
        and change.state not in {TaskState.QUEUED, TaskState.ASSIGNED, TaskState.LOST}
        for change in task.history
    )


def restore_engine(
    engine: ClusterEngine, batches: Iterable[BatchRecord], tasks: Iterable[TaskRecord]
) -> None:
    """Give a new engine the live tasks of the store, whose nodes it knows already."""
    for batch in batches:
        engine.state.add_batch(live_batch(batch))
    for task in tasks:
        engine.state.add_task(task)
