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
    NodeAction,
    PauseLaunch,
    Remember,
    RemoveLaunch,
    ResumeLaunch,
    SendReport,
    StartLaunch,
    WatchLaunch,
)
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.events import (
    KillOrdered,
    LaunchExited,
    LaunchFailed,
    LaunchFound,
    LaunchHeld,
    LaunchRefused,
    LaunchStarted,
    NodeEvent,
    PauseOrdered,
    ReportsTaken,
    ResumeOrdered,
    StartOrdered,
)
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
        case Remember(record):
            return f"remember {record.key} {record.state}"
        case Forget(key):
            return f"forget {key}"
        case StartLaunch(launch, handle):
            return f"start {launch.key} as {handle.data['name']}"
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
        case SendReport(report):
            cause = f" {report.exit.cause}" if report.exit is not None else ""
            return f"report {report.state}{cause}"


def a_launch(task: TaskId = TASK, attempt: int = 1) -> Launch:
    spec = TaskSpec(command=("sleep", "9"), env={"SECRET": "x"})
    return Launch(task=task, attempt=attempt, batch=BatchId(1), spec=spec)


def a_handle(name: str = "h1") -> Handle:
    return Handle(backend="process", data={"name": name})


def start(attempt: int = 1) -> StartOrdered:
    return StartOrdered(a_launch(attempt=attempt), a_handle())


def kill(attempt: int = 1, grace_s: float = 3.0) -> KillOrdered:
    return KillOrdered(TASK, attempt, grace_s)


def started(note: str = "") -> LaunchStarted:
    return LaunchStarted("7-1", Started(started_at=50.0, note=note))


def exited(exit_: Exit = DONE) -> LaunchExited:
    return LaunchExited("7-1", exit_, 50.0, 60.0)


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
    assert runner.tell(exited()) == ["remember 7-1 ended", "report ended exited"]
    assert (runner.reports[-1].started_at, runner.reports[-1].at) == (50.0, 60.0)
    assert runner.settle() == ["remove 7-1", "remember 7-1 ended"]
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
    assert runner.settle() == ["remember 7-1 ended"]


def test_a_start_that_failed_is_an_end(runner: Runner) -> None:
    runner.tell(start())
    assert runner.tell(LaunchFailed("7-1", "no such file")) == [
        "remember 7-1 ended",
        "report ended start_failed",
    ]


@pytest.mark.parametrize("straggler", [started(), exited(), LaunchFailed("7-1", "late")])
def test_an_end_is_final_whatever_comes_late(runner: Runner, straggler: NodeEvent) -> None:
    runner.tell(start())
    runner.tell(started())
    runner.tell(exited())
    assert runner.tell(straggler) == []
    runner.settle()
    assert runner.tell(straggler) == []


@pytest.mark.parametrize(
    "event",
    [started(), exited(), LaunchHeld("7-1", True), LaunchRefused("7-1", ""), PauseOrdered(TASK, 1)],
)
def test_what_was_never_ordered_is_nothing(runner: Runner, event: NodeEvent) -> None:
    assert runner.tell(event) == []


# Killing ------------------------------------------------------------------------------------


def test_a_running_launch_is_killed(runner: Runner) -> None:
    runner.tell(start())
    runner.tell(started())
    assert runner.tell(kill()) == ["remember 7-1 running", "kill 7-1 in 3 s"]
    assert runner.tell(kill()) == ["kill 7-1 in 3 s"]
    runner.tell(exited(Exit(Cause.SIGNALLED, signal=15)))
    assert runner.tell(kill()) == ["report ended signalled"]


def test_a_launch_that_is_starting_is_killed_once_it_has(runner: Runner) -> None:
    runner.tell(start())
    assert runner.tell(kill()) == ["remember 7-1 accepted"]
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


# Pausing ------------------------------------------------------------------------------------


def test_pause_and_resume(runner: Runner) -> None:
    runner.tell(start())
    assert runner.tell(PauseOrdered(TASK, 1)) == []  # not while it is starting
    runner.tell(started())
    assert runner.tell(PauseOrdered(TASK, 1)) == ["pause 7-1"]
    assert runner.tell(LaunchHeld("7-1", paused=True)) == ["report paused"]
    assert runner.tell(kill()) == ["remember 7-1 paused", "kill 7-1 in 3 s"]
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
        (found(Found.ENDED, exit_=DONE), ["remember 7-1 ended", "report ended exited"]),
        (found(Found.ENDED), ["remember 7-1 ended", "report ended node_failed"]),
        (
            found(Found.NEVER_STARTED, a_handle("h2")),
            ["remember 7-1 accepted", "report accepted", "start 7-1 as h2"],
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

    ``world`` is what truly happened to each handle: absent if no start reached it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.engine = NodeEngine()
        self.vault: dict[str, bytes] = {}
        self.now = 0.0
        self.handles = 0
        self.world: dict[str, str] = {}
        self.never: set[str] = set()
        self.begun: dict[str, list[str]] = {}
        self.doing: list[NodeAction] = []
        self.reported: list[AttemptReport] = []
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
        for action in actions:
            if isinstance(action, Remember):
                self.vault[action.record.key] = msgspec.msgpack.encode(action.record)
            elif isinstance(action, Forget):
                del self.vault[action.key]
        rest = [action for action in actions if not isinstance(action, Remember | Forget)]
        self.doing += rest if crash_after is None else rest[: crash_after - 1]
        if crash_after is not None:
            self.restart()

    def restart(self) -> None:
        # What a dead runner asked of its backend may still happen.
        self.stragglers += [action for action in self.doing if isinstance(action, StartLaunch)]
        self.doing = []
        self.engine = NodeEngine()
        records = [msgspec.msgpack.decode(data, type=LaunchRecord) for data in self.vault.values()]
        self.commit_and_queue(self.engine.recover(records, self.now))

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
            case AdoptLaunch(launch, handle):
                self.feed(LaunchFound(launch.key, self.find(handle), self.fresh()), crash)
            case KillLaunch(_, handle, _):
                self.world[str(handle.data["name"])] = "ended"
            case WatchLaunch(key, handle) if self.world[str(handle.data["name"])] == "ended":
                self.feed(LaunchExited(key, DONE, 1.0, self.now), crash)
            case WatchLaunch():
                self.doing.append(action)
            case SendReport(report):
                self.reported.append(report)
            case _:
                pass

    def begin(self, action: StartLaunch) -> bool:
        name = str(action.handle.data["name"])
        if name in self.never or name in self.world:
            return False
        self.world[name] = "running"
        self.begun.setdefault(action.launch.key, []).append(name)
        return True

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
                assert all(self.world[name] == "ended" for name in self.begun.get(key, []))

    def teardown(self) -> None:
        """Left in peace, every launch that was ordered ends, and its runner says so."""
        for _ in range(200):
            if not self.doing:
                break
            self.world = dict.fromkeys(self.world, "ended")
            self.do(self.doing.pop(0))
        assert self.engine.is_recovered
        assert {report.state for report in self.engine.attempts()} <= {AttemptState.ENDED}


TestAtMostOnce = AtMostOnce.TestCase
TestAtMostOnce.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
