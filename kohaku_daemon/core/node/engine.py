"""The runner as one state machine: ``handle(event, now) -> actions``.

Knows: that an attempt is launched at most once, what a restart finds, when a report may be
forgotten, when a launch has run long enough. The backend's own facts are asked again after a
restart, so only what they cannot tell is kept in the vault: that the order came, that its end
was asked for, that the host knows the end.
Does not know: processes, containers, sockets, files, the clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, assert_never

from msgspec.structs import replace

from kohaku_daemon.core.node.actions import (
    AdoptLaunch,
    Forget,
    KillLaunch,
    LetGo,
    NodeAction,
    PauseLaunch,
    Remember,
    RemoveLaunch,
    ResumeLaunch,
    SendReport,
    SetDeadline,
    StartLaunch,
    WatchLaunch,
)
from kohaku_daemon.core.node.events import (
    DeadlinePassed,
    KillOrdered,
    LaunchBrokeOff,
    LaunchExited,
    LaunchFailed,
    LaunchFound,
    LaunchHeld,
    LaunchLetGo,
    LaunchProgressed,
    LaunchRefused,
    LaunchStarted,
    NodeEvent,
    PauseOrdered,
    ReportsTaken,
    ResumeOrdered,
    StartOrdered,
)
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Found, Handle, Launch
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.models.task import Cause, Exit, TaskSpec

#: Settled launches that are still refused if ordered again. The link keeps orders in
#: sequence and a new link ends the old one, so only the newest could ever be repeated, or
#: what a host orders anew that was brought back from a backup.
_FENCED_LAUNCHES: Final = 10_000

_ALIVE: Final = frozenset({AttemptState.RUNNING, AttemptState.PAUSED})
#: How a launch may end that was ended for its time limit. Of others the kernel knows better.
_BY_ITSELF: Final = frozenset({Cause.EXITED, Cause.SIGNALLED})
#: Seconds by which the time of an end may be cut off, at most a clock tick of the kernel's.
_CLOCK_GRAIN_S: Final = 0.01
_NO_SPEC: Final = TaskSpec(command=())


class NodeEngine:
    """The runner's decisions."""

    def __init__(self) -> None:
        self._records: dict[str, LaunchRecord] = {}
        #: The end of each settled launch, the oldest first: all that is said if it is ordered
        #: again.
        self._settled: OrderedDict[str, AttemptReport] = OrderedDict()
        #: Launches whose fate is being asked of their backends: of an earlier run, or such as
        #: were lost sight of while they were started.
        self._unknown: set[str] = set()
        #: Launches that an earlier run was about to start; None once the host has taken this
        #: run in, and they have been.
        self._afresh: list[str] | None = []
        self._out: list[NodeAction] = []
        self._now = 0.0

    @property
    def is_recovered(self) -> bool:
        """Whether the fate of every launch of an earlier run is known."""
        return not self._unknown

    @property
    def is_taken_in(self) -> bool:
        """Whether the host has taken this run in, and so this is no copy of its node."""
        return self._afresh is None

    def attempts(self) -> tuple[AttemptReport, ...]:
        """Give what a new link is told: every launch the host may not know the end of."""
        return tuple(record.report() for record in self._records.values())

    def live(self) -> list[LaunchRecord]:
        """Give the launches that run or are held."""
        return [record for record in self._records.values() if self._is_alive(record)]

    def handles(self) -> list[Handle]:
        """Give the handle of each launch whose end the host may not know."""
        return [one.handle for one in self._records.values() if one.handle is not None]

    def record(self, key: str) -> LaunchRecord | None:
        """Give one launch whose end the host may not know."""
        return self._records.get(key)

    def report(self, key: str) -> AttemptReport | None:
        """Say where a launch stands; None if it was never here, or settled long ago."""
        record = self._records.get(key)
        return self._settled.get(key) if record is None else record.report()

    def forget(self, key: str) -> None:
        """Let go of an order that nothing came of and that the host gives again if it wants it."""
        self._records.pop(key, None)

    def recover(self, records: Iterable[LaunchRecord], now: float) -> list[NodeAction]:
        """Take what the vault kept of an earlier run. Called once, first."""
        self._begin(now)
        for record in sorted(records, key=lambda record: record.at):
            if record.settled:
                self._settled[record.key] = record.report()
                continue
            self._records[record.key] = record
            if record.state is not AttemptState.ENDED and record.handle is not None:
                self._unknown.add(record.key)
                self._out.append(AdoptLaunch(record.launch, record.handle))
        return self._out

    def handle(self, event: NodeEvent, now: float) -> list[NodeAction]:
        """Take one event at ``now`` (UTC seconds) and say what to do."""
        self._begin(now)
        match event:
            case StartOrdered():
                self._start(event)
            case KillOrdered():
                self._kill(event)
            case PauseOrdered():
                self._hold(event.task, event.attempt, paused=True)
            case ResumeOrdered():
                self._hold(event.task, event.attempt, paused=False)
            case LaunchStarted():
                self._started(event)
            case LaunchFailed():
                exit_ = Exit(Cause.START_FAILED, message=event.message)
                self._end(event.key, exit_, now, later=False)
            case LaunchBrokeOff():
                self._break_off(event)
            case LaunchLetGo():
                self._end_unbegun(event.key)
            case LaunchProgressed():
                self._progressed(event)
            case LaunchExited():
                self._exited(event)
            case LaunchHeld():
                self._held(event)
            case LaunchRefused():
                self._refused(event)
            case LaunchFound():
                self._found(event)
            case DeadlinePassed():
                self._time_out(event.key)
            case ReportsTaken():
                self._settle(event.reports)
                self._start_waiting()
            case _:
                assert_never(event)
        return self._out

    def _begin(self, now: float) -> None:
        self._out = []
        self._now = now

    def _start(self, event: StartOrdered) -> None:
        known = self.report(event.launch.key)
        if known is not None:
            # At most once: an order that is repeated is answered with what became of it.
            self._out.append(SendReport(known))
            return
        record = LaunchRecord(launch=event.launch, handle=event.handle, at=self._now)
        self._records[record.key] = record
        if event.handle is None:
            exit_ = Exit(Cause.START_FAILED, message=event.problem)
            self._end(record.key, exit_, self._now, later=False)
            return
        self._remember(record)
        self._report(record)
        self._out.append(StartLaunch(event.launch, event.handle))

    def _kill(self, event: KillOrdered) -> None:
        key = f"{event.task}-{event.attempt}"
        record = self._records.get(key)
        if (settled := self._settled.get(key)) is not None:
            self._out.append(SendReport(settled))
        elif record is None:
            # It never came. Remembered as ended, so that it is refused if it still comes.
            launch = Launch(
                task=event.task,
                attempt=event.attempt,
                batch=BatchId(0),
                spec=TaskSpec(command=("never-ordered",)),
            )
            record = LaunchRecord(launch=launch, kill_asked=True, at=self._now)
            self._records[key] = record
            self._end_unbegun(key)
        elif record.state is AttemptState.ENDED:
            self._report(record)
        elif self._afresh and key in self._afresh:
            self._end_unbegun(key)
        else:
            if not record.kill_asked:
                record.kill_asked = True
                record.grace_s = event.grace_s
                self._remember(record, later=True)
            if record.state is AttemptState.ACCEPTED and key not in self._unknown:
                # What it needs may take minutes to come. If its start has been tried already,
                # nothing comes of this and it is killed once it is known to run.
                self._out.append(LetGo(key))
            self._kill_if_alive(record)

    def _kill_if_alive(self, record: LaunchRecord) -> None:
        """Pass an asked-for end on. One that is starting or being found is ended once it has."""
        if record.kill_asked and self._is_alive(record) and record.handle is not None:
            self._out.append(KillLaunch(record.key, record.handle, record.grace_s))

    def _is_alive(self, record: LaunchRecord) -> bool:
        """Whether it is there to be acted on: an earlier run's word is not enough."""
        return record.state in _ALIVE and record.key not in self._unknown

    def _hold(self, task: TaskId, attempt: int, *, paused: bool) -> None:
        record = self._records.get(f"{task}-{attempt}")
        if record is None or not self._is_alive(record) or record.handle is None:
            return
        wanted = PauseLaunch if paused else ResumeLaunch
        self._out.append(wanted(record.key, record.handle))

    def _started(self, event: LaunchStarted) -> None:
        record = self._records.get(event.key)
        if record is None or record.state is not AttemptState.ACCEPTED or record.handle is None:
            return
        record.state = AttemptState.RUNNING
        record.started_at = event.started.started_at
        record.at = event.started.started_at
        record.note = event.started.note
        self._out.append(WatchLaunch(record.key, record.handle))
        self._report(record)
        self._limit(record)
        self._kill_if_alive(record)

    def _exited(self, event: LaunchExited) -> None:
        record = self._records.get(event.key)
        if record is not None and event.started_at:
            record.started_at = event.started_at
        self._end(event.key, event.exit, event.ended_at or self._now, later=True)

    def _end(self, key: str, exit_: Exit, at: float, *, later: bool) -> None:
        """Take an end. ``later``: its backend tells it again until it has been removed there."""
        record = self._records.get(key)
        if record is None or record.state is AttemptState.ENDED:
            return
        self._unknown.discard(key)
        _say_no_progress(record)
        record.state = AttemptState.ENDED
        record.exit = _name_limit(record, exit_, at)
        record.at = at
        self._remember(record, later=later)
        self._report(record)
        if record.launch.spec.time_limit_s:
            self._out.append(SetDeadline(key, None))

    def _end_unbegun(self, key: str) -> None:
        """End what never began. Only the vault will know that it never may."""
        exit_ = Exit(Cause.KILLED, message="it never began")
        self._end(key, exit_, self._now, later=False)

    def _break_off(self, event: LaunchBrokeOff) -> None:
        """Have found out whether a launch runs: started again under its handle, it could twice."""
        record = self._records.get(event.key)
        if record is None or record.handle is None or event.key in self._unknown:
            return
        if record.state is not AttemptState.ACCEPTED:
            return
        record.note = event.note
        self._report(record)
        self._unknown.add(record.key)
        self._out.append(AdoptLaunch(record.launch, record.handle))

    def _progressed(self, event: LaunchProgressed) -> None:
        """Pass on how far a launch is. Not worth a commit: after a crash it is said anew."""
        record = self._records.get(event.key)
        if record is not None and record.state is AttemptState.ACCEPTED:
            record.note = event.note
            self._report(record)

    def _held(self, event: LaunchHeld) -> None:
        record = self._records.get(event.key)
        if record is None or record.state not in _ALIVE:
            return
        record.state = AttemptState.PAUSED if event.paused else AttemptState.RUNNING
        record.at = self._now
        record.note = ""
        self._report(record)

    def _refused(self, event: LaunchRefused) -> None:
        record = self._records.get(event.key)
        if record is not None and record.state in _ALIVE:
            record.note = event.message
            self._report(record)

    def _found(self, event: LaunchFound) -> None:
        record = self._records.get(event.key)
        if record is None or event.key not in self._unknown or record.handle is None:
            return
        self._unknown.discard(event.key)
        _say_no_progress(record)
        finding = event.finding
        match finding.found:
            case Found.NEVER_STARTED:
                self._start_afresh(record, event.fresh)
            case Found.RUNNING | Found.PAUSED:
                paused = finding.found is Found.PAUSED
                record.state = AttemptState.PAUSED if paused else AttemptState.RUNNING
                record.started_at = finding.started_at
                record.at = finding.started_at
                self._out.append(WatchLaunch(record.key, record.handle))
                self._report(record)
                self._limit(record)
                self._kill_if_alive(record)
            case Found.ENDED:
                record.started_at = finding.started_at
                exit_ = finding.exit or Exit(Cause.NODE_FAILED, message="its end was not recorded")
                self._end(record.key, exit_, finding.ended_at or self._now, later=True)
            case _:
                assert_never(finding.found)

    def _start_afresh(self, record: LaunchRecord, fresh: Handle | None) -> None:
        """Start what was about to be started. It never ran, so this is its first time.

        Not before the host has taken this run in. If our data folder is a copy, its original
        may be about to start the same, and the host lets only one of the two be the node.
        """
        if record.kill_asked:
            self._end_unbegun(record.key)
        elif fresh is None:
            message = "its backend is no longer on this node"
            exit_ = Exit(Cause.START_FAILED, message=message)
            self._end(record.key, exit_, self._now, later=False)
        else:
            record.handle = fresh
            self._remember(record)
            self._report(record)
            if self._afresh is None:
                self._out.append(StartLaunch(record.launch, fresh))
            else:
                self._afresh.append(record.key)

    def _start_waiting(self) -> None:
        """Start what waited for the host to take this run in."""
        waiting, self._afresh = self._afresh, None
        for key in waiting or ():
            record = self._records.get(key)
            if record is not None and record.state is AttemptState.ACCEPTED and record.handle:
                self._out.append(StartLaunch(record.launch, record.handle))

    # Time limits --------------------------------------------------------------------

    def _limit(self, record: LaunchRecord) -> None:
        """Have told when a launch has run long enough. Time it is paused counts.

        From its start on, so that a restart of the runner gives it no more time.
        """
        limit_s = record.launch.spec.time_limit_s
        if limit_s:
            left_s = (record.started_at or record.at) + limit_s - self._now
            self._out.append(SetDeadline(record.key, max(0.0, left_s)))

    def _time_out(self, key: str) -> None:
        """End a launch that has run long enough, like a kill, with the grace of its spec."""
        record = self._records.get(key)
        if record is None or not self._is_alive(record) or record.handle is None:
            return
        if not record.kill_asked and not record.timed_out:
            record.timed_out = True
            self._remember(record, later=True)
        self._out.append(KillLaunch(key, record.handle, record.launch.spec.grace_s))

    # What the host knows ------------------------------------------------------------

    def _settle(self, reports: Iterable[AttemptReport]) -> None:
        for report in reports:
            key = f"{report.task}-{report.attempt}"
            record = self._records.get(key)
            if report.state is not AttemptState.ENDED or record is None:
                continue
            if record.handle is not None:
                self._out.append(RemoveLaunch(record.launch, record.handle))
            # What stays is a fence, and needs no more than its end.
            del self._records[key]
            self._unknown.discard(key)  # of an earlier run: the host knows more than we do
            self._settled[key] = record.report()
            record.settled = True
            record.launch = replace(record.launch, spec=_NO_SPEC)
            self._remember(record, later=True)
        while len(self._settled) > _FENCED_LAUNCHES:
            key, _ = self._settled.popitem(last=False)
            self._out.append(Forget(key))

    def _remember(self, record: LaunchRecord, *, later: bool = False) -> None:
        self._out.append(Remember(record, later))

    def _report(self, record: LaunchRecord) -> None:
        self._out.append(SendReport(record.report()))


def _say_no_progress(record: LaunchRecord) -> None:
    """Take back what was said of a launch that had not begun: it does, ends, or is begun anew."""
    if record.state is AttemptState.ACCEPTED:
        record.note = ""


def _name_limit(record: LaunchRecord, exit_: Exit, at: float) -> Exit:
    """Say of a launch that was ended for its time limit that this is why.

    The cause says it all: which limit is in the spec, and what the backend had to say stays.
    """
    if not record.timed_out or exit_.cause not in _BY_ITSELF:
        return exit_
    # By its backend's clock alone: ours may be another one, or have been set meanwhile.
    ran_s = at - record.started_at
    if 0 <= ran_s < record.launch.spec.time_limit_s - _CLOCK_GRAIN_S:
        return exit_  # it had ended in time, and its backend was away and could not say so
    return replace(exit_, cause=Cause.TIME_LIMIT)
