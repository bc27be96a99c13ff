"""A runner's decisions: at most once, nothing forgotten, and the truth after every restart."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kohaku_daemon.core.node import engine as engine_module
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
from kohaku_daemon.core.node.engine import NodeEngine
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
from kohaku_daemon.core.node.ledger import Ledger
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch, Started
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import AttemptReport, AttemptState
from protocol.models.task import Cause, Exit, TaskSpec

TASK = TaskId(7)
DONE = Exit(Cause.EXITED, code=0)


@dataclass
class Runner:
    """A runner to talk to. Its vault keeps bytes; a restart leaves nothing else."""

    engine: NodeEngine = field(default_factory=NodeEngine)
    vault: dict[str, bytes] = field(default_factory=dict)
    now: float = 100.0
    reports: list[AttemptReport] = field(default_factory=list)

    def tell(self, event: NodeEvent) -> list[str]:
        self.now += 1
        return self.carry_out(self.engine.handle(event, self.now))

    def restart(self) -> list[str]:
        self.engine = NodeEngine()
        records = [msgspec.msgpack.decode(data, type=LaunchRecord) for data in self.vault.values()]
        return self.carry_out(self.engine.recover(records, self.now))

    def carry_out(self, actions: list[NodeAction]) -> list[str]:
        for action in actions:
            match action:
                case Remember(record):
                    self.vault[record.key] = msgspec.msgpack.encode(record)
                case Forget(key):
                    del self.vault[key]
                case SendReport(report):
                    self.reports.append(report)
                case _:
                    pass
        return [line(action) for action in actions]

    def settle(self) -> list[str]:
        """Let the host take all it was told."""
        reports, self.reports = tuple(self.reports), []
        return self.tell(ReportsTaken(reports))


def line(action: NodeAction) -> str:
    match action:
        case Remember(record, later):
            return f"remember {record.key} {record.state}{' later' if later else ''}"
        case Forget(key):
            return f"forget {key}"
        case StartLaunch(launch, handle):
            return f"start {launch.key} as {handle.data['name']}"
        case LetGo(key):
            return f"let go of {key}"
        case AdoptLaunch(launch, handle):
            return f"adopt {launch.key} as {handle.data['name']}"
        case RemoveLaunch(launch, _):
            return f"remove {launch.key}"
        case KillLaunch(key, _, grace_s):
            return f"kill {key} in {grace_s:g} s"
        case WatchLaunch(key, _):
            return f"watch {key}"
        case PauseLaunch(key, _):
            return f"pause {key}"
        case ResumeLaunch(key, _):
            return f"resume {key}"
        case SetDeadline(key, None):
            return f"no deadline for {key}"
        case SetDeadline(key, in_s):
            return f"deadline for {key} in {in_s:g} s"
        case SendReport(report):
            cause = f" {report.exit.cause}" if report.exit is not None else ""
            return f"report {report.state}{cause}"


def a_launch(task: TaskId = TASK, attempt: int = 1, limit_s: float = 0.0) -> Launch:
    spec = TaskSpec(command=("sleep", "9"), env={"SECRET": "x"}, grace_s=4.0, time_limit_s=limit_s)
    return Launch(task=task, attempt=attempt, batch=BatchId(1), spec=spec)


def a_handle(name: str = "h1") -> Handle:
    return Handle(backend="process", data={"name": name})


def start(attempt: int = 1) -> StartOrdered:
    return StartOrdered(a_launch(attempt=attempt), a_handle())


def kill(attempt: int = 1, grace_s: float = 3.0) -> KillOrdered:
    return KillOrdered(TASK, attempt, grace_s)


def started(note: str = "") -> LaunchStarted:
    return LaunchStarted("7-1", Started(started_at=50.0, note=note))


def exited(exit_: Exit = DONE, at: float = 60.0) -> LaunchExited:
    return LaunchExited("7-1", exit_, 50.0, at)


def found(what: Found, fresh: Handle | None = None, exit_: Exit | None = None) -> LaunchFound:
    return LaunchFound("7-1", Finding(found=what, exit=exit_, started_at=50.0), fresh)


@pytest.fixture
def runner() -> Runner:
    return Runner()


def test_an_order_is_remembered_before_it_is_carried_out(runner: Runner) -> None:
    assert runner.tell(start()) == [
        "remember 7-1 accepted",
        "report accepted",
        "start 7-1 as h1",
    ]
    assert runner.tell(started("namespaces")) == ["watch 7-1", "report running"]
    assert runner.reports[-1].note == "namespaces"
    assert runner.tell(exited()) == ["remember 7-1 ended later", "report ended exited"]
    assert (runner.reports[-1].started_at, runner.reports[-1].at) == (50.0, 60.0)
    assert runner.settle() == ["remove 7-1", "remember 7-1 ended later"]
    assert runner.engine.attempts() == ()


def test_an_order_that_is_repeated_is_answered_with_what_became_of_it(runner: Runner) -> None:
    runner.tell(start())
    assert runner.tell(start()) == ["report accepted"]
    runner.tell(started())
    assert runner.tell(start()) == ["report running"]
    runner.tell(exited())
    assert runner.tell(start()) == ["report ended exited"]
    runner.settle()
    assert runner.tell(start()) == ["report ended exited"]
    runner.restart()
    assert runner.tell(start()) == ["report ended exited"]


def test_another_attempt_is_another_launch(runner: Runner) -> None:
    runner.tell(start())
    assert "start 7-2 as h1" in runner.tell(start(attempt=2))


def test_an_order_for_a_backend_that_is_not_here_ends_at_once(runner: Runner) -> None:
    event = StartOrdered(a_launch(), None, "backend docker is not on this node")
    assert runner.tell(event) == ["remember 7-1 ended", "report ended start_failed"]
    exit_ = Exit(Cause.START_FAILED, message="backend docker is not on this node")
    assert runner.reports[-1].exit == exit_
    assert runner.settle() == ["remember 7-1 ended later"]


def test_a_start_that_failed_is_an_end(runner: Runner) -> None:
    runner.tell(start())
    assert runner.tell(LaunchFailed("7-1", "no such file")) == [
        "remember 7-1 ended",
        "report ended start_failed",
    ]


@pytest.mark.parametrize(
    "straggler",
    [
        started(),
        exited(),
        LaunchFailed("7-1", "late"),
        LaunchBrokeOff("7-1", "late"),
        LaunchLetGo("7-1"),
        LaunchProgressed("7-1", "late"),
    ],
)
def test_an_end_is_final_whatever_comes_late(runner: Runner, straggler: NodeEvent) -> None:
    runner.tell(start())
    runner.tell(started())
    runner.tell(exited())
    assert runner.tell(straggler) == []
    runner.settle()
    assert runner.tell(straggler) == []


@pytest.mark.parametrize(
    "event",
    [
        started(),
        exited(),
        LaunchHeld("7-1", True),
        LaunchRefused("7-1", ""),
        LaunchBrokeOff("7-1", ""),
        LaunchLetGo("7-1"),
        LaunchProgressed("7-1", ""),
        PauseOrdered(TASK, 1),
    ],
)
def test_what_was_never_ordered_is_nothing(runner: Runner, event: NodeEvent) -> None:
    assert runner.tell(event) == []


# Killing ------------------------------------------------------------------------------------


def test_a_running_launch_is_killed(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(started())
    assert runner.tell(kill()) == ["remember 7-1 running later", "kill 7-1 in 3 s"]
    assert runner.tell(kill()) == ["kill 7-1 in 3 s"]
    runner.tell(exited(Exit(Cause.SIGNALLED, signal=15)))
    assert runner.tell(kill()) == ["report ended signalled"]


def test_a_launch_whose_start_was_not_tried_is_let_go_of_and_never_begins(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(LaunchProgressed("7-1", "preparing 43 %"))
    assert runner.tell(kill()) == ["remember 7-1 accepted later", "let go of 7-1"]
    assert runner.tell(LaunchLetGo("7-1")) == ["remember 7-1 ended", "report ended killed"]
    exit_ = Exit(Cause.KILLED, message="it never began")
    assert (runner.reports[-1].exit, runner.reports[-1].note) == (exit_, "")
    assert runner.tell(started()) == []
    runner.restart()
    assert runner.tell(start()) == ["report ended killed"]


def test_a_launch_that_is_starting_is_killed_once_it_has(runner: Runner) -> None:
    runner.tell(start())
    # The start was tried just before, so that nothing comes of the second.
    assert runner.tell(kill()) == ["remember 7-1 accepted later", "let go of 7-1"]
    assert runner.tell(started()) == ["watch 7-1", "report running", "kill 7-1 in 3 s"]


def test_what_was_killed_before_it_was_ordered_is_refused_for_ever(runner: Runner) -> None:
    assert runner.tell(kill()) == ["remember 7-1 ended", "report ended killed"]
    assert runner.tell(start()) == ["report ended killed"]
    runner.settle()
    runner.restart()
    assert runner.tell(start()) == ["report ended killed"]


def test_a_kill_is_carried_out_after_a_restart(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(started())
    runner.tell(kill())
    runner.restart()
    assert runner.tell(found(Found.RUNNING)) == ["watch 7-1", "report running", "kill 7-1 in 3 s"]


@pytest.mark.parametrize("order", [kill(), PauseOrdered(TASK, 1), ResumeOrdered(TASK, 1)])
def test_no_backend_is_asked_to_act_on_what_it_has_not_found_again(
    runner: Runner, order: NodeEvent
) -> None:
    runner.tell(start())
    runner.tell(started())
    runner.tell(kill())  # so that the vault has it as running
    runner.restart()
    assert runner.tell(order) == []
    assert runner.engine.live() == []
    assert runner.tell(found(Found.RUNNING))[-1] == "kill 7-1 in 3 s"
    assert [record.key for record in runner.engine.live()] == ["7-1"]


def test_a_kill_that_could_not_be_is_said(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(started("namespaces"))
    runner.tell(kill())
    assert runner.tell(LaunchRefused("7-1", "not permitted")) == ["report running"]
    assert runner.reports[-1].note == "not permitted"


# Preparing ----------------------------------------------------------------------------------


def test_how_far_it_is_is_told_and_never_written(runner: Runner) -> None:
    runner.tell(start())
    vault = dict(runner.vault)
    for text in ("preparing 3 %", "preparing 99 %"):
        assert runner.tell(LaunchProgressed("7-1", text)) == ["report accepted"]
        assert runner.reports[-1].note == text
    assert runner.vault == vault
    runner.tell(started())
    assert runner.reports[-1].note == ""
    assert runner.tell(LaunchProgressed("7-1", "late")) == []


def test_a_failure_does_not_say_how_far_it_was(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(LaunchProgressed("7-1", "preparing 3 %"))
    runner.tell(LaunchFailed("7-1", "no such image"))
    assert runner.reports[-1].note == ""
    assert runner.reports[-1].exit == Exit(Cause.START_FAILED, message="no such image")


# A backend that is away ---------------------------------------------------------------------


def taken_in(runner: Runner) -> None:
    runner.tell(ReportsTaken(()))


def test_a_start_that_broke_off_is_tried_again_under_another_handle(runner: Runner) -> None:
    taken_in(runner)
    runner.tell(start())
    broke_off = LaunchBrokeOff("7-1", "waiting for docker: it is down")
    assert runner.tell(broke_off) == ["report accepted", "adopt 7-1 as h1"]
    assert runner.reports[-1].note == "waiting for docker: it is down"
    assert runner.tell(broke_off) == []
    never = found(Found.NEVER_STARTED, a_handle("h2"))
    assert runner.tell(never) == ["remember 7-1 accepted", "report accepted", "start 7-1 as h2"]
    assert runner.reports[-1].note == ""
    assert runner.tell(never) == []


def test_a_start_that_broke_off_and_began_all_the_same_runs(runner: Runner) -> None:
    taken_in(runner)
    runner.tell(start())
    runner.tell(LaunchBrokeOff("7-1", "waiting for docker: it is down"))
    assert runner.tell(kill()) == ["remember 7-1 accepted later"]
    assert runner.tell(found(Found.RUNNING)) == ["watch 7-1", "report running", "kill 7-1 in 3 s"]
    assert runner.reports[-1].note == ""


def test_a_start_that_broke_off_and_was_killed_meanwhile_is_not_tried_again(
    runner: Runner,
) -> None:
    taken_in(runner)
    runner.tell(start())
    runner.tell(kill())
    assert "adopt 7-1 as h1" in runner.tell(LaunchBrokeOff("7-1", "it is down"))
    assert runner.tell(found(Found.NEVER_STARTED, a_handle("h2"))) == [
        "remember 7-1 ended",
        "report ended killed",
    ]


def test_a_restart_while_nobody_knows_asks_again(runner: Runner) -> None:
    taken_in(runner)
    runner.tell(start())
    runner.tell(LaunchBrokeOff("7-1", "it is down"))
    assert runner.restart() == ["adopt 7-1 as h1"]
    assert not runner.engine.is_taken_in


def test_the_handles_of_all_that_is_not_settled_are_known(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(start(attempt=2))
    runner.tell(StartOrdered(a_launch(attempt=3), None, "no such backend"))
    assert runner.engine.handles() == [a_handle(), a_handle()]
    runner.tell(started())
    runner.tell(exited())
    assert len(runner.engine.handles()) == 2
    runner.settle()
    assert len(runner.engine.handles()) == 1


# Pausing ------------------------------------------------------------------------------------


def test_pause_and_resume(runner: Runner) -> None:
    runner.tell(start())
    assert runner.tell(PauseOrdered(TASK, 1)) == []  # not while it is starting
    runner.tell(started())
    assert runner.tell(PauseOrdered(TASK, 1)) == ["pause 7-1"]
    assert runner.tell(LaunchHeld("7-1", paused=True)) == ["report paused"]
    assert runner.tell(kill()) == ["remember 7-1 paused later", "kill 7-1 in 3 s"]
    assert runner.tell(ResumeOrdered(TASK, 1)) == ["resume 7-1"]
    assert runner.tell(LaunchHeld("7-1", paused=False)) == ["report running"]


def test_what_went_wrong_with_a_pause_is_not_said_of_the_next_one(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(started())
    runner.tell(LaunchRefused("7-1", "no freezer"))
    runner.tell(LaunchHeld("7-1", paused=True))
    assert [report.note for report in runner.reports[-2:]] == ["no freezer", ""]


# Restarts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "lines"),
    [
        (found(Found.RUNNING), ["watch 7-1", "report running"]),
        (found(Found.PAUSED), ["watch 7-1", "report paused"]),
        (found(Found.ENDED, exit_=DONE), ["remember 7-1 ended later", "report ended exited"]),
        (found(Found.ENDED), ["remember 7-1 ended later", "report ended node_failed"]),
        (
            found(Found.NEVER_STARTED, a_handle("h2")),
            ["remember 7-1 accepted", "report accepted"],
        ),
        (found(Found.NEVER_STARTED), ["remember 7-1 ended", "report ended start_failed"]),
    ],
)
def test_after_a_restart_its_backend_says_what_became_of_a_launch(
    runner: Runner, what: LaunchFound, lines: list[str]
) -> None:
    runner.tell(start())
    runner.tell(started())
    assert runner.restart() == ["adopt 7-1 as h1"]
    assert not runner.engine.is_recovered
    assert runner.tell(what) == lines
    assert runner.engine.is_recovered
    assert runner.tell(what) == []  # said twice


def test_a_launch_that_never_was_and_was_to_be_killed_never_will_be(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(kill())
    runner.restart()
    assert runner.tell(found(Found.NEVER_STARTED, a_handle("h2"))) == [
        "remember 7-1 ended",
        "report ended killed",
    ]


def test_what_never_began_is_begun_once_the_host_has_taken_this_run_in(runner: Runner) -> None:
    """A copy of a data folder must not start anything: the host refuses it, or the original."""
    runner.tell(start())
    runner.restart()
    runner.tell(found(Found.NEVER_STARTED, a_handle("h2")))
    (report,) = runner.engine.attempts()
    assert report.state is AttemptState.ACCEPTED
    assert runner.tell(ReportsTaken((report,))) == ["start 7-1 as h2"]
    assert runner.tell(ReportsTaken((report,))) == []
    # From here on nothing waits: what is ordered is ordered by the host.
    assert runner.tell(start(attempt=2))[-1] == "start 7-2 as h1"


def test_what_waits_for_the_host_and_is_killed_never_begins(runner: Runner) -> None:
    runner.tell(start())
    runner.restart()
    runner.tell(found(Found.NEVER_STARTED, a_handle("h2")))
    assert runner.tell(kill()) == ["remember 7-1 ended", "report ended killed"]
    assert runner.tell(ReportsTaken(())) == []


def test_what_runs_is_watched_and_killed_before_the_host_is_reached(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(started())
    runner.restart()
    assert runner.tell(found(Found.RUNNING)) == ["watch 7-1", "report running"]
    assert runner.tell(exited()) == ["remember 7-1 ended later", "report ended exited"]


def test_an_end_the_host_may_not_know_is_told_again(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(started())
    runner.tell(exited())
    (before,) = runner.engine.attempts()
    assert runner.restart() == []
    assert runner.engine.attempts() == (before,)
    runner.settle()
    runner.restart()
    assert runner.engine.attempts() == ()


# Time limits --------------------------------------------------------------------------------


def limited(limit_s: float = 30.0) -> StartOrdered:
    return StartOrdered(a_launch(limit_s=limit_s), a_handle())


def test_a_launch_is_ended_when_its_time_is_up_and_its_end_says_so(runner: Runner) -> None:
    runner.tell(limited(limit_s=90.0))
    # It began at 50, and it is 102 by the time this is handled.
    assert runner.tell(started()) == ["watch 7-1", "report running", "deadline for 7-1 in 38 s"]
    assert runner.tell(DeadlinePassed("7-1")) == ["remember 7-1 running later", "kill 7-1 in 4 s"]
    assert runner.tell(exited(Exit(Cause.SIGNALLED, signal=15), at=140.0)) == [
        "remember 7-1 ended later",
        "report ended time_limit",
        "no deadline for 7-1",
    ]
    # Who shows it knows the limit: a message would only say it twice.
    assert runner.reports[-1].exit == Exit(Cause.TIME_LIMIT, signal=15)


def test_a_launch_that_ends_in_time_ends_as_ever(runner: Runner) -> None:
    runner.tell(limited())
    runner.tell(started())
    assert runner.tell(exited())[1:] == ["report ended exited", "no deadline for 7-1"]
    assert runner.tell(DeadlinePassed("7-1")) == []


def test_a_launch_that_ended_in_time_has_even_if_that_is_learnt_late(runner: Runner) -> None:
    runner.tell(limited())
    runner.tell(started())
    runner.tell(DeadlinePassed("7-1"))
    runner.restart()
    ended = Finding(found=Found.ENDED, exit=DONE, started_at=50.0, ended_at=79.5)
    assert "report ended exited" in runner.tell(LaunchFound("7-1", ended, None))
    assert runner.reports[-1].exit == DONE


def test_time_that_a_launch_is_paused_counts(runner: Runner) -> None:
    runner.tell(limited())
    runner.tell(started())
    assert runner.tell(LaunchHeld("7-1", paused=True)) == ["report paused"]
    assert runner.tell(DeadlinePassed("7-1"))[-1] == "kill 7-1 in 4 s"


def test_after_a_restart_only_what_is_left_of_the_time_may_be_used(runner: Runner) -> None:
    runner.tell(limited(limit_s=90.0))
    runner.tell(started())
    runner.now = 120.0
    runner.restart()
    assert runner.tell(found(Found.RUNNING))[-1] == "deadline for 7-1 in 19 s"
    runner.now = 300.0
    runner.restart()
    assert runner.tell(found(Found.PAUSED))[-1] == "deadline for 7-1 in 0 s"


def test_why_it_was_ended_is_known_after_a_restart(runner: Runner) -> None:
    runner.tell(limited())
    runner.tell(started())
    runner.tell(DeadlinePassed("7-1"))
    runner.restart()
    ended = found(Found.ENDED, exit_=Exit(Cause.EXITED, code=0))
    assert "report ended time_limit" in runner.tell(ended)
    assert runner.reports[-1].exit is not None
    assert runner.reports[-1].exit.code == 0


def test_a_launch_that_is_being_killed_is_hurried_and_stays_killed(runner: Runner) -> None:
    runner.tell(limited())
    runner.tell(started())
    runner.tell(kill(grace_s=3600.0))
    assert runner.tell(DeadlinePassed("7-1")) == ["kill 7-1 in 4 s"]
    assert "report ended signalled" in runner.tell(exited(Exit(Cause.SIGNALLED, signal=15)))


def test_a_launch_the_kernel_killed_for_memory_says_that(runner: Runner) -> None:
    runner.tell(limited())
    runner.tell(started())
    runner.tell(DeadlinePassed("7-1"))
    assert "report ended oom" in runner.tell(exited(Exit(Cause.OOM, signal=9)))


# Forgetting ---------------------------------------------------------------------------------


def test_only_an_end_settles_a_launch(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(started())
    assert runner.settle() == []
    assert len(runner.engine.attempts()) == 1


def test_a_settled_launch_keeps_no_secret_and_the_oldest_are_forgotten(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_FENCED_LAUNCHES", 2)
    for number in range(1, 5):
        runner.tell(StartOrdered(a_launch(TaskId(number)), a_handle()))
        runner.tell(LaunchFailed(f"{number}-1", "no such file"))
        assert f"remove {number}-1" in runner.settle()
        if number == 3:
            runner.restart()
    assert sorted(runner.vault) == ["3-1", "4-1"]
    assert not any(b"SECRET" in data for data in runner.vault.values())
    assert "start 1-1 as h1" in runner.tell(StartOrdered(a_launch(TaskId(1)), a_handle()))


# Anything, in any order, with crashes between any two actions -------------------------------


class AtMostOnce(RuleBasedStateMachine):
    """Orders repeated and reordered, a backend that takes its time, and crashes anywhere.

    ``world`` is what truly happened to each handle: absent if no start reached it, or if it
    was removed, of which nobody knows anything either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.engine = NodeEngine()
        self.ledger = Ledger()
        self.vault: dict[str, bytes] = {}
        self.now = 0.0
        self.handles = 0
        self.world: dict[str, str] = {}
        self.never: set[str] = set()
        self.begun: dict[str, list[str]] = {}
        self.doing: list[NodeAction] = []
        self.reported: list[AttemptReport] = []
        #: Launches the host has as ended.
        self.over: set[str] = set()
        self.stragglers: list[StartLaunch] = []

    def fresh(self) -> Handle:
        self.handles += 1
        return a_handle(f"h{self.handles}")

    def feed(self, event: NodeEvent, crash_after: int | None = None) -> None:
        self.now += 1
        self.commit_and_queue(self.engine.handle(event, self.now), crash_after)

    def commit_and_queue(self, actions: list[NodeAction], crash_after: int | None = None) -> None:
        if crash_after == 0:
            self.restart()  # nothing of it was committed
            return
        rest = self.ledger.take(actions)
        if self.ledger.is_due:
            rest += self.commit()
        self.doing += rest if crash_after is None else rest[: crash_after - 1]
        if crash_after is not None:
            self.restart()

    def commit(self) -> list[NodeAction]:
        bundle = self.ledger.close()
        for key in bundle.drops:
            del self.vault[key]
        for key, record in bundle.puts.items():
            self.vault[key] = msgspec.msgpack.encode(record)
        return self.ledger.finish()

    def restart(self) -> None:
        # What a dead runner asked of its backend may still happen.
        self.stragglers += [action for action in self.doing if isinstance(action, StartLaunch)]
        self.doing = []
        self.engine, self.ledger = NodeEngine(), Ledger()
        records = [msgspec.msgpack.decode(data, type=LaunchRecord) for data in self.vault.values()]
        self.commit_and_queue(self.engine.recover(records, self.now))

    @rule()
    def write_what_was_put_off(self) -> None:
        self.ledger.ripen()
        self.doing += self.commit()

    crashes = st.sampled_from([None, None, None, 0, 1, 2, 3])
    tasks = st.sampled_from([TaskId(1), TaskId(2)])

    @rule(task=tasks, crash=crashes)
    def order(self, task: TaskId, crash: int | None) -> None:
        self.feed(StartOrdered(a_launch(task), self.fresh()), crash)

    @rule(task=tasks, crash=crashes)
    def order_kill(self, task: TaskId, crash: int | None) -> None:
        self.feed(KillOrdered(task, 1, 1.0), crash)

    @rule(task=tasks, pause=st.booleans())
    def hold(self, task: TaskId, pause: bool) -> None:
        self.feed(PauseOrdered(task, 1) if pause else ResumeOrdered(task, 1))

    @precondition(lambda self: self.doing)
    @rule(data=st.data(), crash=crashes)
    def carry_out(self, data: st.DataObject, crash: int | None) -> None:
        self.do(self.doing.pop(data.draw(st.integers(0, len(self.doing) - 1))), crash)

    @precondition(lambda self: self.doing)
    @rule(ends=st.booleans())
    def get_on(self, ends: bool) -> None:
        """Have all done that is to be done, and what follows from it: the usual course."""
        for _ in range(10):
            if not self.doing:
                break
            if ends:
                self.world = dict.fromkeys(self.world, "ended")
            self.do(self.doing.pop(0))

    @precondition(lambda self: self.starts())
    @rule(crash=crashes, seen=st.booleans(), progress=st.booleans())
    def lose_sight(self, crash: int | None, seen: bool, progress: bool) -> None:
        """Have a backend vanish while it starts something: it may have begun, or may yet."""
        action = self.starts()[0]
        if progress:
            self.feed(LaunchProgressed(action.launch.key, "preparing"))
        self.doing.remove(action)
        if seen:
            self.begin(action)
        else:
            self.stragglers.append(action)
        self.feed(LaunchBrokeOff(action.launch.key, "it is away"), crash)

    def starts(self) -> list[StartLaunch]:
        return [action for action in self.doing if isinstance(action, StartLaunch)]

    @precondition(lambda self: self.stragglers)
    @rule()
    def straggle(self) -> None:
        self.begin(self.stragglers.pop(0))

    def do(self, action: NodeAction, crash: int | None = None) -> None:
        match action:
            case StartLaunch(launch, _) if self.begin(action):
                self.feed(LaunchStarted(launch.key, Started(started_at=self.now)), crash)
            case StartLaunch(launch, _):
                self.feed(LaunchFailed(launch.key, "it is too late"), crash)
            case LetGo(key):
                waiting = [one for one in self.starts() if one.launch.key == key]
                if waiting:
                    self.doing.remove(waiting[0])
                    self.feed(LaunchLetGo(key), crash)
            case AdoptLaunch(launch, handle):
                self.feed(LaunchFound(launch.key, self.find(handle), self.fresh()), crash)
            case KillLaunch(_, handle, _):
                self.world[str(handle.data["name"])] = "ended"
            case WatchLaunch(key, handle) if self.world.get(str(handle.data["name"])) == "ended":
                self.feed(LaunchExited(key, DONE, 1.0, self.now), crash)
            case WatchLaunch():
                self.doing.append(action)
            case SendReport(report):
                self.reported.append(report)
            case RemoveLaunch(_, handle):
                assert self.world.pop(str(handle.data["name"]), "ended") == "ended"
            case _:
                pass

    def begin(self, action: StartLaunch) -> bool:
        name = str(action.handle.data["name"])
        if name in self.never or name in self.world or name in self.names_begun():
            return False
        assert action.launch.key not in self.over, f"{action.launch.key} begins after its end"
        self.world[name] = "running"
        self.begun.setdefault(action.launch.key, []).append(name)
        return True

    def names_begun(self) -> set[str]:
        return {name for names in self.begun.values() for name in names}

    def find(self, handle: Handle) -> Finding:
        name = str(handle.data["name"])
        match self.world.get(name):
            case "running":
                return Finding(found=Found.RUNNING, started_at=1.0)
            case "ended":
                return Finding(found=Found.ENDED, exit=DONE)
            case _:
                self.never.add(name)
                return Finding(found=Found.NEVER_STARTED)

    @precondition(lambda self: self.world)
    @rule(data=st.data())
    def end_by_itself(self, data: st.DataObject) -> None:
        self.world[data.draw(st.sampled_from(sorted(self.world)))] = "ended"

    @precondition(lambda self: self.reported)
    @rule(crash=crashes)
    def host_takes_reports(self, crash: int | None) -> None:
        reports, self.reported = tuple(self.reported), []
        ended = [report for report in reports if report.state is AttemptState.ENDED]
        self.over |= {f"{report.task}-{report.attempt}" for report in ended}
        self.feed(ReportsTaken(reports), crash)

    @rule()
    def crash(self) -> None:
        self.restart()

    @invariant()
    def every_attempt_began_at_most_once(self) -> None:
        for key, names in self.begun.items():
            assert len(names) == 1, f"{key} was started as {names}"

    @invariant()
    def what_runs_is_not_reported_as_ended(self) -> None:
        for report in self.reported:
            key = f"{report.task}-{report.attempt}"
            if report.state is AttemptState.ENDED:
                begun = self.begun.get(key, [])
                assert all(self.world.get(name, "ended") == "ended" for name in begun)

    def teardown(self) -> None:
        """Left in peace, every launch that was ordered ends, and its runner says so."""
        for _ in range(200):
            if not self.doing:
                if self.engine.is_recovered:
                    self.feed(ReportsTaken(()))  # the host has taken it in
                if not self.doing:
                    break
            self.world = dict.fromkeys(self.world, "ended")
            self.do(self.doing.pop(0))
        assert self.engine.is_recovered
        assert {report.state for report in self.engine.attempts()} <= {AttemptState.ENDED}


TestAtMostOnce = AtMostOnce.TestCase
TestAtMostOnce.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_what_the_host_knows_the_end_of_is_waited_for_no_longer() -> None:
    engine = NodeEngine()
    record = LaunchRecord(launch=a_launch(TaskId(1)), handle=a_handle("h1"), at=1.0)
    engine.recover([record], 1.0)
    assert not engine.is_recovered
    ended = AttemptReport(task=TaskId(1), attempt=1, state=AttemptState.ENDED, exit=DONE)
    engine.handle(ReportsTaken((ended,)), 2.0)
    assert engine.is_recovered
