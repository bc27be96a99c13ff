"""The host as one state machine: ``handle(event, now) -> actions``.

Knows: every rule of the cluster, through the rooms beside it.
Does not know: sockets, files, the clock. The state is changed here and nowhere else, so a
whole cluster of these can be run in a simulation and checked after every event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, assert_never

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
from kohaku_daemon.core.cluster.environments import KEPT_VERSIONS, Environments
from kohaku_daemon.core.cluster.events import (
    ClusterEvent,
    CreateAsked,
    DeleteAsked,
    DrainAsked,
    EnvironmentMade,
    EnvironmentPacked,
    FilesRemoved,
    JoinAsked,
    JoinTokenAsked,
    LabelAsked,
    PackAsked,
    PinAsked,
    PlacementDue,
    PullAsked,
    RegistryRemoveAsked,
    RegistrySetAsked,
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
    WholeAsked,
    WorkDue,
)
from kohaku_daemon.core.cluster.fleet import MISSED_HEARTBEATS, FleetNode
from kohaku_daemon.core.cluster.intake import Intake
from kohaku_daemon.core.cluster.long_work import PIECE, LongWork
from kohaku_daemon.core.cluster.making import Making
from kohaku_daemon.core.cluster.membership import Membership
from kohaku_daemon.core.cluster.moves import Moves
from kohaku_daemon.core.cluster.pinning import Pinning
from kohaku_daemon.core.cluster.records import (
    DropDocument,
    JoinTokenRecord,
    Remnant,
    TaskRecord,
)
from kohaku_daemon.core.cluster.registries import Registries
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState, LiveBatch
from kohaku_daemon.core.cluster.steering import Steering
from kohaku_daemon.core.task.lifecycle import InvalidTransition, TaskEvent, advance
from protocol.errors import KohakuError
from protocol.ids import TaskId
from protocol.messages.runner import (
    AttemptReport,
    AttemptState,
    OrderKill,
)
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
        environment_versions: int = KEPT_VERSIONS,
        piece: int = PIECE,
    ) -> None:
        self.state = state
        self._scribe = Scribe(last_event)
        self._works = LongWork(self._scribe, piece)
        self._moves = Moves(state, self._scribe, self._works)
        self._making = Making(state, self._scribe, self._moves, self._works)
        self._intake = Intake(state, ids, self._scribe, self._moves, self._making, self._works)
        self._steering = Steering(state, self._scribe, self._moves, self._works)
        self._membership = Membership(state, self._scribe, self._moves)
        self._environments = Environments(state, self._scribe, environment_versions)
        self._registries = Registries(state, self._scribe)
        self._pinning = Pinning(state, self._scribe)
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
            # An answer, and no failure: the frames it passed hold what was asked for nobody.
            return [Refuse(error.with_traceback(None))]
        self._moves.follow_up()
        return self._scribe.out

    @property
    def has_work(self) -> bool:
        """Whether something was begun that goes on with ``WorkDue``."""
        return not self._works.is_done

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be worked on, and to be placed, at present."""
        return self._works.is_done and self.state.backlog.is_settled

    def make_further(self, last: TaskRecord) -> None:
        """Have the tasks made that are missing before the last one of its batch."""
        self._works.put(self._making.go_on(self.state.batch_of(last), last))

    def bring_down(self, batch: LiveBatch) -> None:
        """Have the tasks of a batch ended that waits in vain."""
        self._works.put(self._making.fall(batch))

    def _dispatch(self, event: ClusterEvent) -> None:
        match event:
            # The common ones first: of each there are hundreds a second.
            case RunnerReported():
                self._report(event)
            case RunnerBeat():
                self._beat(event)
            case PlacementDue():
                self._moves.place_waiting()
            case WorkDue():
                self._works.go_on()
            case SubmitAsked():
                self._intake.submit(event)
            case RetryAsked():
                self._intake.retry(event)
            case SteerAsked():
                self._steering.steer(event)
            case WholeAsked():
                self._intake.tell_when_whole(event)
            case DrainAsked():
                self._membership.drain(event)
            case LabelAsked():
                self._membership.label(event)
            case RemoveAsked():
                self._membership.remove(event)
            case JoinTokenAsked():
                self._membership.make_join_token(event)
            case JoinAsked():
                self._membership.join(event)
            case RunnerRegistered():
                self._register(event)
            case RunnerGone():
                self._gone(event)
            case CreateAsked():
                self._environments.create(event)
            case PackAsked():
                self._environments.pack(event)
            case DeleteAsked():
                self._environments.delete(event)
            case PullAsked():
                self._environments.pull(event)
            case EnvironmentMade():
                self._environments.take_made(event)
            case EnvironmentPacked():
                self._environments.take_packed(event)
            case FilesRemoved():
                self._environments.take_removed(event)
            case RegistrySetAsked():
                self._registries.set(event)
            case RegistryRemoveAsked():
                self._registries.remove(event)
            case PinAsked():
                self._pinning.pin(event)
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
        said = _SAID[report.state]
        # How far a preparation is, is of the moment: it is the task's reason, and no history.
        is_prepared = after is not TaskState.PREPARING
        task.reason = "" if is_prepared else report.note
        self._moves.move(task, after, report.note or said if is_prepared else said)
        if back:
            self._scribe.tell("task.back", f"task {task.id} is {after} on {node.name}", task=task)

    def _take_remark(self, task: TaskRecord, report: AttemptReport) -> None:
        """Keep what a runner has to say about a task that stays as it is, once."""
        if task.state is TaskState.PREPARING:
            if report.state is AttemptState.ACCEPTED and report.note != task.reason:
                task.reason = report.note
                self._moves.keep(task)
            return
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
            self._membership.give_up(name)
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
