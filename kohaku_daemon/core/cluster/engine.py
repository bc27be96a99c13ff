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
    SendOrder,
)
from kohaku_daemon.core.cluster.copies import refuse_copy
from kohaku_daemon.core.cluster.events import (
    ClusterEvent,
    DrainAsked,
    JoinAsked,
    JoinTokenAsked,
    LabelAsked,
    PlacementDue,
    RemoveAsked,
    RetryAsked,
    RunnerBeat,
    RunnerGone,
    RunnerRegistered,
    RunnerReported,
    SteerAsked,
    StoreFailing,
    StoreWell,
    SubmitAsked,
    Ticked,
    Verb,
)
from kohaku_daemon.core.cluster.fleet import MISSED_HEARTBEATS, FleetNode
from kohaku_daemon.core.cluster.intake import Intake
from kohaku_daemon.core.cluster.moves import Moves
from kohaku_daemon.core.cluster.records import (
    BatchRecord,
    DropDocument,
    JoinTokenRecord,
    NodeRecord,
    PutDocument,
    Remnant,
    TaskRecord,
)
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState, live_batch
from kohaku_daemon.core.task.lifecycle import InvalidTransition, TaskEvent, advance
from kohaku_daemon.core.task.validation import check_labels
from protocol.errors import BadRequest, Conflict, KohakuError
from protocol.ids import NodeName, TaskId, parse_node_name
from protocol.messages.runner import (
    AttemptReport,
    AttemptState,
    OrderKill,
    OrderPause,
    OrderResume,
)
from protocol.messages.task import SteerResult
from protocol.models.node import NodeState
from protocol.models.task import Cause, Exit, TaskState
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


#: Seconds that a clock may be corrected by between two ticks without having been set.
_CLOCK_STEP_S: Final = 2.0


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
        self._scribe = Scribe(last_event)
        self._moves = Moves(state, self._scribe)
        self._intake = Intake(state, ids, self._scribe, self._moves)
        self._silent_after_s = heartbeat_s * MISSED_HEARTBEATS
        self._lost_after_s = lost_after_s
        #: Seconds that the clock is ahead of the steady one, as of the last tick that told.
        self._clock_ahead: float | None = None

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:
        """Take one event at ``now`` (UTC seconds) and say what to do.

        Never raises for what an event contains: a request that cannot be granted is
        answered with ``Refuse``, a report that is not believed changes nothing.
        """
        self._scribe.begin(now)
        try:
            self._dispatch(event)
        except KohakuError as error:
            return [Refuse(error)]
        self._moves.clear_fallen()
        return self._scribe.out

    def _dispatch(self, event: ClusterEvent) -> None:
        match event:
            # The common ones first: of each there are hundreds a second.
            case RunnerReported():
                self._report(event)
            case RunnerBeat():
                self._beat(event)
            case PlacementDue():
                self._moves.place_waiting()
            case SubmitAsked():
                self._intake.submit(event)
            case RetryAsked():
                self._intake.retry(event)
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
            case RunnerGone():
                self._gone(event)
            case StoreFailing(reason):
                text = f"the host cannot store anything: {reason}"
                self._scribe.tell("host.failing", text)
            case StoreWell():
                self._scribe.tell("host.well", "the host can store again; what waited was kept")
            case Ticked(steady):
                self._notice_set_clock(steady)
                self._tick()
            case _:
                assert_never(event)

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
        self._scribe.add(Answer(SteerResult(asked, tuple(refused[:100]))))

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
            self._moves.finish(task, TaskEvent.KILLED, exit_, self._scribe.now)
            return ""
        self._moves.ask_end(task, actor)
        return ""

    def _hold(self, task: TaskRecord, wanted: TaskState, order: OrderPause | OrderResume) -> str:
        if task.state is not wanted:
            return f"it is {task.state}, not {wanted}"
        node = self.state.fleet.nodes.get(task.node)
        if node is None or not node.is_online:
            return f"its node {task.node} is away; try again when it is back"
        self._scribe.add(SendOrder(task.node, order))
        return ""

    # Nodes --------------------------------------------------------------------------

    def _drain(self, event: DrainAsked) -> None:
        node = self.state.fleet.find(event.node)
        if node.record.draining != event.draining:
            node.record = replace(node.record, draining=event.draining)
            node.close_or_open()
            self.state.backlog.renew()
            self._scribe.keep_node(node)
            kind = "node.draining" if event.draining else "node.undrained"
            text = "gets nothing new" if event.draining else "takes work again"
            self._scribe.tell(kind, f"{node.name} {text}", node=node.name, actor=event.actor.user)
        self._scribe.add(Answer(node.view()))

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
        self.state.backlog.renew()
        self._scribe.keep_node(node)
        self._scribe.add(Answer(node.view()))

    def _remove(self, event: RemoveAsked) -> None:
        node = self.state.fleet.find(event.node)
        tasks = self.state.tasks_on(node.name)
        if tasks and not event.force:
            raise Conflict(
                f"node {node.name} has {len(tasks)} task{'s' if len(tasks) > 1 else ''} on it",
                hint=f"let them end: kohaku node drain {node.name}; or give them up: --force",
            )
        view = node.view()
        del self.state.fleet.nodes[node.name]
        self._give_up(node.name)
        self.state.backlog.renew()
        self._scribe.add(DropDocument(NodeRecord, node.name))
        self._scribe.add(CloseLink(node.name, "the node was removed from the cluster"))
        self._scribe.add(NodeChanged(node.name))
        text = f"{node.name} left the cluster"
        self._scribe.tell("node.removed", text, node=node.name, actor=event.actor.user)
        self._scribe.add(Answer(view))

    def _give_up(self, node: NodeName) -> None:
        """End the tasks of a node that is removed: nobody will tell their end any more.

        Those that are to be tried again when their node is lost are tried again.
        """
        for task in list(self.state.tasks_on(node).values()):
            if self._moves.spec_of(task).requeue_on_lost and not task.kill_asked_by:
                cause = f"{node} was removed from the cluster; tries again, as asked"
                self._moves.requeue_lost(task, cause)
                continue
            exit_ = Exit(
                Cause.NODE_REMOVED, message="what it left on the machine is not followed up"
            )
            self._moves.finish(task, TaskEvent.KILLED, exit_, self._scribe.now)
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
            expires_at=self._scribe.now + event.lasts_s,
            node=event.node,
            created_by=event.actor.user,
        )
        self.state.fleet.join_tokens[event.digest] = token
        self._scribe.add(PutDocument(token))
        self._scribe.add(Answer(token.expires_at))

    def _join(self, event: JoinAsked) -> None:
        name = parse_node_name(event.node)
        check_labels(event.labels)
        if name not in self.state.fleet.nodes and self.state.tasks_on(name):
            # A crash between both stores left them behind when an earlier node was removed.
            self._give_up(name)
        node, token = self.state.fleet.admit(
            event.token_digest, name, event.credential_digest, dict(event.labels), self._scribe.now
        )
        if token is not None:
            self._scribe.add(PutDocument(token))
            self._scribe.keep_node(node)
            self._scribe.tell("node.joined", f"{name} joined from {event.address}", node=name)
        self._scribe.add(Answer(name))

    # Runners ------------------------------------------------------------------------

    def _register(self, event: RunnerRegistered) -> None:
        node = self.state.fleet.find(event.node)
        refuse_copy(node.name, event.attempts, self.state.tasks, event.begun)
        was = node.state
        self.state.fleet.online(node, event.inventory, self._scribe.now)
        self._scribe.keep_node(node)
        known = {(report.task, report.attempt) for report in event.attempts}
        for remnant in node.record.remnants:
            # Also if the order to start it never arrived: then it is refused from now on.
            self._order_end(node, remnant)
        for report in event.attempts:
            self._take_report(node, report)
            self._end_unwanted(node, report, event.ended)
        for task in list(self.state.tasks_on(node.name).values()):
            self._reconcile(node, task, known)
        self._reopen(node)
        if was is not NodeState.ONLINE:
            text = f"{node.name} is online from {event.address}"
            self._scribe.tell("node.online", text, node=node.name)
        self._scribe.add(Answer(node.name))

    def _end_unwanted(
        self, node: FleetNode, report: AttemptReport, ended: frozenset[TaskId]
    ) -> None:
        """End what runs there although the books say it ended, as after ``node remove --force``.

        What the books never heard of is left alone: a host that lost its store must not
        make its nodes lose their work. An attempt before the present one is fenced off, and
        whoever still runs it is told to end it.
        """
        if report.state is AttemptState.ENDED or node.find_remnant(report) is not None:
            return
        task = self.state.tasks.get(report.task)
        if task is not None and _may_go_on(task, node, report):
            if task.attempt < report.attempt <= task.doubted:
                text = f"{node.name} has attempt {report.attempt} of task {task.id}, made since"
                self._scribe.tell("task.overtaken", f"{text} the backup", node=node.name, task=task)
            return
        if task is not None or report.task in ended:
            node.unwanted.add((report.task, report.attempt))
            order = OrderKill(task=report.task, attempt=report.attempt)
            self._scribe.add(SendOrder(node.name, order))
        else:
            text = f"{node.name} runs task {report.task}, which this host does not know"
            self._scribe.tell("task.unknown", text, node=node.name)

    def _reconcile(self, node: FleetNode, task: TaskRecord, known: set[tuple[TaskId, int]]) -> None:
        """Bring one task of the books in line with what its runner has just said it knows."""
        if task.kill_asked_by:
            # Also if the order to start never arrived: the runner is told to refuse it, and
            # as the old link is gone, nothing can overtake that.
            self._moves.order_kill(task)
        elif (task.id, task.attempt) in known:
            return
        elif not _was_accepted(task):
            # Lost or not, the order never arrived: its first time is still to come.
            self._moves.order_start(task)
        elif task.state is not TaskState.LOST:
            self._moves.miss(task, f"{node.name} no longer knows it")

    def _report(self, event: RunnerReported) -> None:
        node = self.state.fleet.nodes.get(event.node)
        if node is not None:
            for report in event.reports:
                self._take_report(node, report)
        self._scribe.add(Answer(None))

    def _take_report(self, node: FleetNode, report: AttemptReport) -> None:
        remnant = node.find_remnant(report)
        if remnant is not None:
            if report.state is AttemptState.ENDED:
                self._clear_remnant(node, remnant)
            return
        if report.state is AttemptState.ENDED and (report.task, report.attempt) in node.unwanted:
            node.unwanted.remove((report.task, report.attempt))
            self._reopen(node)
        task = self.state.tasks.get(report.task)
        if task is None or task.node != node.name or task.attempt != report.attempt:
            return  # of an attempt that is over, or that was never this node's: fenced off
        if report.state is AttemptState.ENDED:
            exit_ = report.exit or Exit(Cause.NODE_FAILED, message="the runner gave no reason")
            if report.started_at:
                task.started_at = self._plausible(task, report.started_at)
            self._moves.take_end(task, exit_, self._plausible(task, report.at))
            return
        back = task.state is TaskState.LOST
        try:
            after = advance(task.state, _REPORTED[report.state])
        except InvalidTransition:
            # Said twice, or overtaken by what came after: only a remark can be new.
            self._take_remark(task, report)
            return
        if report.started_at and not task.started_at:
            task.started_at = self._plausible(task, report.started_at)
            if self._moves.spec_of(task).time_limit_s:
                # Now its end is known, and what ends before that may go past a hold.
                self.state.backlog.loosen(node.name)
        self._moves.move(task, after, report.note or _SAID[report.state])
        if back:
            self._scribe.tell("task.back", f"task {task.id} is {after} on {node.name}", task=task)

    def _take_remark(self, task: TaskRecord, report: AttemptReport) -> None:
        """Keep what a runner has to say about a task that stays as it is, once."""
        said = any(
            change.attempt == task.attempt and change.cause == report.note
            for change in task.history
        )
        if report.note and not said:
            self._moves.note(task, report.note)

    def _beat(self, event: RunnerBeat) -> None:
        node = self.state.fleet.nodes.get(event.node)
        if node is None:
            return
        if node.state is NodeState.LOST:
            # Its tasks were given up; what became of them is said when a link is opened.
            self._scribe.add(CloseLink(node.name, "it was silent too long: register again"))
            return
        node.seen_at = self._scribe.now
        before = node.troubles
        node.readings = event.readings
        if node.troubles != before:
            self._take_troubles(node, before)
        self._scribe.add(ReadingsChanged(node.name))
        faults = {gpu.uuid: gpu.fault for gpu in event.readings.gpus if gpu.fault}
        if faults != node.site.books.faults:
            for uuid in faults.keys() - node.site.books.faults.keys():
                text = f"{node.name}: GPU {uuid} is out of service: {faults[uuid]}"
                self._scribe.tell("node.gpu_fault", text, node=node.name)
            node.site.books.refit(node.record.inventory, faults)
            self.state.backlog.renew()
            self._scribe.add(NodeChanged(node.name))
        if not node.is_online:
            node.state = NodeState.ONLINE
            node.close_or_open()
            self.state.backlog.renew()
            self._scribe.add(NodeChanged(node.name))
            self._scribe.tell("node.online", f"{node.name} answers again", node=node.name)

    def _take_troubles(self, node: FleetNode, before: tuple[str, ...]) -> None:
        """Give a node in trouble nothing new, and tell of what began or is over."""
        for text in node.troubles:
            if text not in before:
                self._scribe.tell("node.trouble", f"{node.name}: {text}", node=node.name)
        if not node.troubles:
            text = f"{node.name} can take work again"
            self._scribe.tell("node.well", text, node=node.name)
        self._reopen(node)

    def _gone(self, event: RunnerGone) -> None:
        node = self.state.fleet.nodes.get(event.node)
        if node is not None and node.is_online:
            self._take_offline(node, event.reason)

    def _take_offline(self, node: FleetNode, reason: str) -> None:
        self.state.fleet.offline(node, self._scribe.now)
        self.state.backlog.renew()
        self._scribe.add(NodeChanged(node.name))
        self._scribe.tell("node.offline", f"{node.name} is offline: {reason}", node=node.name)

    def _notice_set_clock(self, steady: float | None) -> None:
        """See whether somebody has set the machine's clock, or it slept, since the last tick."""
        if steady is None:
            return
        ahead = self._scribe.now - steady
        before, self._clock_ahead = self._clock_ahead, ahead
        if before is None or abs(ahead - before) < _CLOCK_STEP_S:
            return
        self.state.fleet.set_clock(ahead - before, self._scribe.now)
        way = "ahead" if ahead > before else "back"
        text = f"the host's clock was set {abs(ahead - before):.0f} s {way}"
        self._scribe.tell("host.clock_set", text)

    def _tick(self) -> None:
        self.state.enqueue_due(self._scribe.now)
        for node in self.state.fleet.nodes.values():
            if node.is_online and self._scribe.now - node.seen_at > self._silent_after_s:
                self._take_offline(node, f"silent for {self._scribe.now - node.seen_at:.0f} s")
            elif (
                node.state is NodeState.OFFLINE
                and self._scribe.now - node.offline_since > self._lost_after_s
            ):
                self._lose(node)
        for name in sorted(self.state.on_node.keys() - self.state.fleet.nodes.keys()):
            # A crash between both stores can leave tasks of a node that was removed.
            self._give_up(name)
        for digest in self.state.fleet.drop_old_tokens(self._scribe.now):
            self._scribe.add(DropDocument(JoinTokenRecord, digest))

    def _lose(self, node: FleetNode) -> None:
        node.state = NodeState.LOST
        node.close_or_open()
        self._scribe.add(NodeChanged(node.name))
        self._scribe.tell("node.lost", f"{node.name} has been away too long", node=node.name)
        for task in list(self.state.tasks_on(node.name).values()):
            if task.state is not TaskState.LOST:
                self._moves.miss(task, f"{node.name} has been away too long")

    def _order_end(self, node: FleetNode, remnant: Remnant) -> None:
        order = OrderKill(task=remnant.task, attempt=remnant.attempt, grace_s=remnant.grace_s)
        self._scribe.add(SendOrder(node.name, order))

    def _reopen(self, node: FleetNode) -> None:
        """Let a node take work or not, as it stands now."""
        node.close_or_open()
        self.state.backlog.renew()
        self._scribe.add(NodeChanged(node.name))

    def _clear_remnant(self, node: FleetNode, remnant: Remnant) -> None:
        """An attempt that was given up is known to be dead: others may have what it held."""
        node.site.books.clear_remnant(remnant.task, remnant.attempt)
        self.state.backlog.loosen(node.name)
        left = tuple(one for one in node.record.remnants if one is not remnant)
        self._scribe.keep_remnants(node, left)

    def _plausible(self, task: TaskRecord, at: float) -> float:
        """Take a runner's word for a time unless its clock is off.

        Nothing happens to a task in the future, or before there was one.
        """
        now = self._scribe.now
        return min(max(at, task.created_at), now) if at > 0 else now


def _may_go_on(task: TaskRecord, node: FleetNode, report: AttemptReport) -> bool:
    """Say whether an attempt that runs on a node is the task's present one, or a later one.

    A task that waits again still has the number of the attempt that was given up.
    """
    present = report.attempt == task.attempt and task.node == node.name
    return present or report.attempt > task.attempt


def _was_accepted(task: TaskRecord) -> bool:
    """Say whether a runner ever had the order to launch this attempt."""
    return any(
        change.attempt == task.attempt
        and change.state not in {TaskState.QUEUED, TaskState.ASSIGNED, TaskState.LOST}
        for change in task.history
    )


def restore_engine(
    engine: ClusterEngine, batches: Iterable[BatchRecord], tasks: Iterable[TaskRecord], now: float
) -> None:
    """Give a new engine the live tasks of the store, whose nodes it knows already."""
    state, live = engine.state, {task.id: task for task in tasks}
    held = {batch.id: batch for batch in batches}
    under_way: set[int] = {*live, *(task.batch for task in live.values())}
    for batch in held.values():
        awaits = [name for name in batch.after if name in under_way]
        state.add_batch(live_batch(batch, awaits))
    for node in state.fleet.nodes.values():
        _drop_stale_remnants(node, live)
    for task in live.values():
        state.add_task(task)
    for batch in held.values():
        state.enqueue_batch(state.batches[batch.id], now)


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
