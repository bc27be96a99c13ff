"""Bugs, planted on purpose, each as a small change of a real engine or of a shell's order.

Each is one that is easily made: the simulation is worth what it finds of them.

Knows: what each bug does wrong.
Does not know: how it is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

from msgspec.structs import replace

from kohaku_daemon.core.cluster import backlog, intake, recovery
from kohaku_daemon.core.cluster.actions import Answer, ClusterAction, SaveBatch, SendOrder
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import ClusterEvent, RunnerBeat, RunnerRegistered
from kohaku_daemon.core.cluster.fair_order import FairOrder
from kohaku_daemon.core.cluster.fleet import FleetNode
from kohaku_daemon.core.cluster.long_work import LongWork, Work
from kohaku_daemon.core.cluster.moves import Moves
from kohaku_daemon.core.cluster.records import TaskRecord
from kohaku_daemon.core.cluster.state import live_batch
from kohaku_daemon.core.node.actions import NodeAction, SetDeadline, StartLaunch
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.events import LaunchFound
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.placement.gang import Member, Seat, seat_gang
from kohaku_daemon.core.workload import Found, Handle, Launch
from protocol.ids import BatchId, NodeName, TaskId
from protocol.messages.runner import AttemptReport, AttemptState, OrderKill
from protocol.messages.task import SteerResult, Submitted
from protocol.models.node import NodeState
from protocol.models.task import Claim, Exit, TaskState
from tests.simulation.host import Host, Reply
from tests.simulation.runner import Runner
from tests.simulation.world import REAL, Cast

# The host's rules --------------------------------------------------------------------


class AppliesReportsTwice(ClusterEngine):
    """An end that is reported again is written again."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._over: dict[TaskId, TaskRecord] = {}

    def _take_report(self, node: FleetNode, report: AttemptReport) -> None:
        over = self._over.get(report.task)
        if over is not None and report.state is AttemptState.ENDED:
            self._moves.note(over, "ended")
            return
        task = self.state.tasks.get(report.task)
        super()._take_report(node, report)
        if task is not None and task.state.is_final:
            self._over[task.id] = task


class KeepsClaims(ClusterEngine):
    """A claim is not let go of where its task was lost before it ended."""

    def _take_report(self, node: FleetNode, report: AttemptReport) -> None:
        task = self.state.tasks.get(report.task)
        claim = task.claim if task is not None and task.state is TaskState.LOST else None
        super()._take_report(node, report)
        if task is not None and claim is not None and task.state.is_final:
            node.site.books.restore(task.id, claim)


class ReleasesClaimsOfTheLost(ClusterEngine):
    """A lost task's claim is given to others although it may still run."""

    def _lose(self, node: FleetNode) -> None:
        super()._lose(node)
        for task in self.state.tasks_on(node.name).values():
            if task.claim is not None and task.id in node.site.books.claims:
                node.site.books.strike(task.id)
                task.claim = None


class BelievesLateWords(ClusterEngine):
    """A report is believed whoever sends it and of whichever attempt."""

    def _take_report(self, node: FleetNode, report: AttemptReport) -> None:
        task = self.state.tasks.get(report.task)
        if task is not None and task.node in self.state.fleet.nodes:
            node = self.state.fleet.nodes[task.node]
            report = replace(report, attempt=task.attempt)
        super()._take_report(node, report)


class RepeatsNoOrder(ClusterEngine):
    """An order that may have been lost with its link is not given again."""

    def _reconcile(self, node: FleetNode, task: TaskRecord, known: set[tuple[TaskId, int]]) -> None:
        known.add((task.id, task.attempt))
        super()._reconcile(node, task, known)


class RepeatsNoKill(ClusterEngine):
    """An order to end something that may have been lost is not given again."""

    def _register(self, event: RunnerRegistered) -> None:
        super()._register(event)
        self._scribe.out = [one for one in self._scribe.out if not _is_kill(one)]


class BelievesHeartbeats(ClusterEngine):
    """A heartbeat of a lost node is enough: its tasks stay lost, for nobody asks about them."""

    def _beat(self, event: RunnerBeat) -> None:
        node = self.state.fleet.nodes.get(event.node)
        if node is not None and node.state is NodeState.LOST:
            node.state = NodeState.OFFLINE
        super()._beat(event)


class KeepsNothingFree(ClusterEngine):
    """Wide tasks wait until a whole node happens to be free."""

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:
        with patch.object(backlog, "choose_held", lambda *_: None):
            return super().handle(event, now)


class TakesNoTurns(ClusterEngine):
    """Who submitted first is served first, however much that is."""

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:
        with patch.object(FairOrder, "take", lambda *_: None):
            return super().handle(event, now)


class StartsDependentsEarly(ClusterEngine):
    """What a task waits for is not looked at once it has been submitted."""

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:
        with patch.object(intake, "live_batch", lambda record, _=(): live_batch(record)):
            return super().handle(event, now)


class ForgetsWhatWasAwaited(Host):
    """What a task waits for is not known any more after a restart."""

    def boot(self) -> None:
        with patch.object(recovery, "live_batch", lambda record, _=(): live_batch(record)):
            super().boot()


class LeavesBatchesUnmade(ClusterEngine):
    """What of a batch was not made when the host died is never made."""

    def make_further(self, last: TaskRecord) -> None:
        pass


class LeavesBatchesHalfFallen(Host):
    """What waits in vain, and had not fallen yet when the host died, begins after all."""

    def boot(self) -> None:
        with patch.object(self.disk, "standing", lambda _: None):
            super().boot()


class AnswersPieces(ClusterEngine):
    """A request is answered when its first piece is done."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._works.__class__ = _WorkAnsweredEarly


class _WorkAnsweredEarly(LongWork):
    def answer(self, work: Work) -> None:
        is_over, value = self._do_piece(work)
        if not is_over:
            held = [*self._state_of_making()]
            value = held[-1] if held else SteerResult(0)
            self.put(work)
        self._scribe.add(Answer(value))

    def _state_of_making(self) -> Iterator[Submitted]:
        for action in self._scribe.out:
            if isinstance(action, SaveBatch):
                yield Submitted(action.batch.id, action.batch.runs)


class EndsWhatIsThere(ClusterEngine):
    """The end of a batch is that of what is made of it so far."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._works.__class__ = _WorkThatWaitsForNone


class _WorkThatWaitsForNone(LongWork):
    def answer_after(self, batch: BatchId, work: Work) -> None:
        self.answer(work)


class StartsGangsOneByOne(ClusterEngine):
    """A gang's members begin where there is room for one."""

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:
        with patch.object(backlog, "seat_gang", _seat_one):
            return super().handle(event, now)


def _seat_one(members: Sequence[Member], *where: Any) -> list[Seat] | None:
    return next((found for one in members if (found := seat_gang([one], *where))), None)


class ReusesAttemptNumbers(ClusterEngine):
    """Another attempt has the number of the one before."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._moves.__class__ = _MovesWithoutNumbers


class _MovesWithoutNumbers(Moves):
    def _assign(self, task: TaskRecord, node: NodeName, claim: Claim) -> TaskRecord:
        task.attempt = 0
        return super()._assign(task, node, claim)


class TriesAgainUnasked(ClusterEngine):
    """A lost task gets another attempt although nobody asked and the old one may still run."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._moves.__class__ = _MovesThatRequeue


class _MovesThatRequeue(Moves):
    def miss(self, task: TaskRecord, reason: str) -> None:
        self.requeue_lost(task, reason)


class ForgetsRemnants(ClusterEngine):
    """What an attempt that was given up may still hold is given to others."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._moves.__class__ = _MovesWithoutRemnants

    def _end_unwanted(
        self, node: FleetNode, report: AttemptReport, ended: frozenset[TaskId]
    ) -> None:
        super()._end_unwanted(node, report, ended)
        node.unwanted.clear()


class _MovesWithoutRemnants(Moves):
    def requeue_lost(self, task: TaskRecord, cause: str, actor: str = "") -> None:
        node = self._state.fleet.nodes.get(task.node)
        super().requeue_lost(task, cause, actor)
        for one in node.record.remnants if node is not None else ():
            assert node is not None
            node.site.books.clear_remnant(one.task, one.attempt)
            self._scribe.keep_remnants(node, ())


# The runner's rules ------------------------------------------------------------------


class ForgetsItsKills(NodeEngine):
    """What was to be ended is not known any more after a restart."""

    def recover(self, records: Iterable[LaunchRecord], now: float) -> list[NodeAction]:
        records = list(records)
        for record in records:
            record.kill_asked = False
        return super().recover(records, now)


class TellsEndsOnce(NodeEngine):
    """An end counts as known to the host once it was sent."""

    def _end(self, key: str, exit_: Exit, at: float, *, later: bool) -> None:
        super()._end(key, exit_, at, later=later)
        record = self.record(key)
        if record is not None:
            self._settle((record.report(),))


class ForgetsDeadlines(NodeEngine):
    """What was adopted after a restart may run for ever."""

    def _found(self, event: LaunchFound) -> None:
        super()._found(event)
        self._out = [one for one in self._out if not isinstance(one, SetDeadline)]


class StartsWhatRuns(NodeEngine):
    """What is found running after a restart is taken for what never began."""

    def _found(self, event: LaunchFound) -> None:
        record = self.record(event.key)
        if record is not None and event.finding.found is Found.RUNNING:
            assert record.handle is not None
            self._out.append(StartLaunch(record.launch, record.handle))
        super()._found(event)


# The order of things in the shells ----------------------------------------------------


class AnswersEarly(Host):
    """An answer leaves before what it promises is committed."""

    def gather(self, action: ClusterAction, reply: Reply | None) -> None:
        if isinstance(action, Answer) and reply is not None:
            reply(action.value)
        else:
            super().gather(action, reply)


class OrdersEarly(Host):
    """An order leaves before the placement it rests on is committed."""

    def gather(self, action: ClusterAction, reply: Reply | None) -> None:
        if isinstance(action, SendOrder):
            self.on_order(action)
        else:
            super().gather(action, reply)


class ForgetsKillsOverRestarts(Host):
    """That somebody asked for an end is not stored."""

    def boot(self) -> None:
        super().boot()
        assert self.engine is not None
        for task in self.engine.state.tasks.values():
            task.kill_asked_by = ""


class StartsEarly(Runner):
    """A start is tried before its handle is in the vault."""

    def take(self, actions: Sequence[NodeAction]) -> list[NodeAction]:
        starts: list[NodeAction] = [one for one in actions if isinstance(one, StartLaunch)]
        return super().take([one for one in actions if one not in starts]) + starts


class StartsWhatWasLetGo(Runner):
    """A launch that was killed while it was prepared is started when that is done."""

    def may_start(self, key: str) -> bool:
        return True


class StartsAgainBlindly(Runner):
    """What broke off because its backend went away is started again, and nobody asked first."""

    def tell_lost(self, life: int, launch: Launch, handle: Handle) -> None:
        self._stage.after(1.0, lambda: self._start(life, launch, handle))


class LosesKills(Runner):
    """A kill that its backend could not be told of is not repeated."""

    def kill(self, handle: Handle, grace_s: float) -> None:
        if not self.machine.is_away:
            super().kill(handle, grace_s)


class BeginsWhatWasKilledUnseen(NodeEngine):
    """What broke off is begun anew although its end was asked for meanwhile."""

    def _start_afresh(self, record: LaunchRecord, fresh: Handle | None) -> None:
        record.kill_asked = False
        super()._start_afresh(record, fresh)


def _is_kill(action: ClusterAction) -> bool:
    return isinstance(action, SendOrder) and isinstance(action.order, OrderKill)


@dataclass(frozen=True, slots=True)
class Plant:
    """One bug, and how many seeds may pass until one finds it."""

    cast: Cast
    within: int

    def __str__(self) -> str:
        parts = (self.cast.cluster, self.cast.node, self.cast.host, self.cast.runner)
        whole = (REAL.cluster, REAL.node, REAL.host, REAL.runner)
        return next(
            mine.__name__ for mine, one in zip(parts, whole, strict=True) if mine is not one
        )


PLANTS: Final = (
    Plant(Cast(cluster=AppliesReportsTwice), 200),
    Plant(Cast(cluster=KeepsClaims), 200),
    Plant(Cast(cluster=ReleasesClaimsOfTheLost), 200),
    Plant(Cast(cluster=BelievesLateWords), 200),
    Plant(Cast(cluster=RepeatsNoOrder), 200),
    Plant(Cast(cluster=RepeatsNoKill), 200),
    Plant(Cast(cluster=BelievesHeartbeats), 400),
    Plant(Cast(cluster=KeepsNothingFree), 400),
    Plant(Cast(cluster=TakesNoTurns), 300),
    Plant(Cast(cluster=StartsDependentsEarly), 200),
    Plant(Cast(cluster=StartsGangsOneByOne), 200),
    Plant(Cast(cluster=ReusesAttemptNumbers), 200),
    Plant(Cast(cluster=TriesAgainUnasked), 200),
    Plant(Cast(cluster=ForgetsRemnants), 200),
    Plant(Cast(node=ForgetsItsKills), 1000),
    Plant(Cast(node=ForgetsDeadlines), 600),
    Plant(Cast(node=TellsEndsOnce), 200),
    Plant(Cast(node=StartsWhatRuns), 200),
    Plant(Cast(host=AnswersEarly), 200),
    Plant(Cast(host=OrdersEarly), 300),
    Plant(Cast(host=ForgetsKillsOverRestarts), 200),
    Plant(Cast(host=ForgetsWhatWasAwaited), 300),
    Plant(Cast(cluster=LeavesBatchesUnmade), 600),
    Plant(Cast(host=LeavesBatchesHalfFallen), 1500),
    Plant(Cast(cluster=AnswersPieces), 200),
    Plant(Cast(cluster=EndsWhatIsThere), 200),
    Plant(Cast(runner=StartsEarly), 200),
    Plant(Cast(runner=StartsWhatWasLetGo), 200),
    Plant(Cast(runner=StartsAgainBlindly), 600),
    Plant(Cast(runner=LosesKills), 1000),
    Plant(Cast(node=BeginsWhatWasKilledUnseen), 1000),
)
