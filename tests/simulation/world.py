"""A whole cluster under a plan: one host, its runners, people, and what goes wrong.

The first part of every world is rough. Then all that was broken is whole again, books are
compared with the truth, and everything that was ever accepted has to come to its true end.

Knows: how the parts are put together, and what each happening of a plan does to them.
Does not know: what is promised (``promises``, ``truth``, ``disk``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final, assert_never

from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.records import NodeRecord, PutDocument
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.workload import Launch
from protocol.models.task import Exit
from tests.simulation.disk import Disk
from tests.simulation.door import Door
from tests.simulation.host import Host
from tests.simulation.link import Link, Receive, Weather
from tests.simulation.machine import Machine
from tests.simulation.operators import Operators
from tests.simulation.people import People
from tests.simulation.plan import (
    Act,
    AskAgain,
    Away,
    ClockJump,
    Crowd,
    Cut,
    DiskFull,
    Drain,
    EndBatch,
    Explain,
    Flood,
    GpuFault,
    HolderDies,
    HostDies,
    Mute,
    Plan,
    Relabel,
    Remove,
    Repeat,
    RunnerDies,
    Slow,
    StartTrouble,
    Steer,
    Submit,
)
from tests.simulation.promises import Promises
from tests.simulation.runner import Runner
from tests.simulation.stage import Clock, Stage
from tests.simulation.truth import Truth
from tests.simulation.uplink import Uplink
from tests.support.builders import a_node

#: Seconds of quiet until books and truth are compared, how long news may be on
#: their way then, or something be made ready, until nothing may stand in the way of
#: anything any more, and until all must be over.
_SETTLED_AFTER_S: Final = 32.0
_AGREE_WITHIN_S: Final = 13.0
_BEGUN_AFTER_S: Final = 180.0
_OVER_AFTER_S: Final = 900.0
#: How often it is looked whether all is over.
_LOOK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Cast:
    """Who plays: the real engines, or ones with a bug planted on purpose."""

    cluster: type[ClusterEngine] = ClusterEngine
    node: type[NodeEngine] = NodeEngine
    host: type[Host] = Host
    runner: type[Runner] = Runner


REAL: Final = Cast()


class World:
    """One plan, played."""

    def __init__(self, plan: Plan, cast: Cast = REAL) -> None:
        self.plan = plan
        self.stage = stage = Stage(plan.seed)
        self.truth = Truth()
        self.host = cast.host(
            stage, Disk(self.truth), Clock(stage, plan.host_clock_off_s), cast.cluster
        )
        self.host.disk.piece = plan.piece
        self.door = Door(stage, self.host)
        self.runners: dict[str, Runner] = {}
        self.weather: dict[str, Weather] = {}
        for machine_plan in plan.machines:
            machine = Machine(stage, machine_plan, self.truth)
            runner = cast.runner(stage, machine, self.truth, cast.node)
            record = self._first_record(machine)
            runner.uplink = Uplink(stage, runner, record.credential, self._dial)
            self.host.disk.write_documents([PutDocument(record)])
            self.runners[machine_plan.name] = runner
            self.weather[machine_plan.name] = Weather(stage.chance())
        self.uplinks = {name: _uplink(runner) for name, runner in self.runners.items()}
        self.people = People(stage, self.host, self.truth)
        self.operators = Operators(stage, self.host, self.uplinks)
        self.promises = Promises(self)
        self._is_over = False

    def play(self) -> None:
        """Play it to its end.

        Raises:
            BrokenPromise: Something is not as promised.
        """
        stage, plan = self.stage, self.plan
        self.host.boot()
        for runner in self.runners.values():
            runner.boot()
        for act in plan.acts:
            stage.at(act.at, partial(self._do, act))
        stage.at(plan.rough_s, self._heal)
        stage.at(plan.rough_s + _LOOK_S, self._look)
        stage.at(plan.rough_s + _SETTLED_AFTER_S, self.promises.begin_comparing)
        stage.at(plan.rough_s + _SETTLED_AFTER_S + _AGREE_WITHIN_S, self._wind_up)
        stage.at(plan.rough_s + _BEGUN_AFTER_S, self.promises.check_begun)
        stage.run(plan.rough_s + _OVER_AFTER_S, done=lambda: self._is_over)
        self.promises.check_end()

    def story(self) -> list[str]:
        """Tell what happened, with tasks called by their submission and place: 3.0 is the first
        of request 3, 3.0/1 its first attempt."""
        return self.stage.story(self._render)

    def named(self, text: str) -> str:
        """Give a text with tasks called as in the story."""
        for task in self.host.disk.tasks:
            text = text.replace(str(task), self.people.name(task))
        return text

    def _render(self, fact: object) -> str:
        match fact:
            case Launch():
                return f"{self.people.name(fact.task)}/{fact.attempt}"
            case Exit():
                how = fact.code if fact.code is not None else f"signal {fact.signal}"
                return f"{fact.cause} {how}"
            case int() if fact > 1_000_000_000_000:
                return self.people.name(fact)  # type: ignore[arg-type]
            case _:
                return str(fact)

    # Putting together ---------------------------------------------------------------

    def _first_record(self, machine: Machine) -> NodeRecord:
        return a_node(machine.node, machine.inventory(), labels={"zone": machine.plan_.zone})

    def _dial(self, uplink: Uplink) -> Link | None:
        weather = self.weather[uplink.node]
        if weather.apart or self.host.engine is None:
            return None
        node = None
        if uplink.has_joined:
            node = self.door.hello(uplink.credential)
            if node is None:
                uplink.become_stranger()
                return None
        ends: dict[str, Receive] = {"host": self.door.receive, "runner": uplink.receive}
        link = Link(self.stage, uplink.node, weather, ends)
        self.door.accept(link, uplink.credential, node)
        return link

    # What happens -------------------------------------------------------------------

    def _do(self, act: Act) -> None:
        match act:
            case Submit():
                self.people.submit(act)
            case Flood():
                self.people.flood(act)
            case Crowd():
                self.people.crowd(act)
            case AskAgain():
                self.people.ask_again(act)
            case Steer():
                self.people.steer(act)
            case EndBatch():
                self.people.end_batch(act)
            case Explain():
                self.people.explain()
            case Drain():
                self.operators.drain(act)
            case Relabel():
                self.operators.relabel(act)
            case Remove():
                self.operators.remove(act)
            case _:
                self._go_wrong(act)

    def _go_wrong(self, act: Act) -> None:
        match act:
            case HostDies(_, step, down_s):
                self.host.doom(step, down_s)
            case RunnerDies(_, node, step, down_s, reboot):
                self.runners[node].doom(step, down_s, reboot=reboot)
            case HolderDies():
                self._kill_holder(act)
            case Cut():
                self._cut(act)
            case Slow(_, node, to, delay_s, for_s):
                slow_s = self.weather[node].slow_s
                slow_s[to] = delay_s
                self.stage.after(for_s, partial(slow_s.__setitem__, to, 0.0))
            case Repeat(_, node, for_s):
                self._for_a_while(
                    f"words of {node} come twice", self.weather[node], "repeats", for_s
                )
            case Mute(_, node, for_s):
                self._for_a_while(f"{node} is silent", self.uplinks[node], "is_mute", for_s)
            case ClockJump(_, machine, by_s):
                self._clock(machine).off_s += by_s
                self.stage.tell("the clock of {} jumps by {} s", machine, by_s)
            case GpuFault():
                self._break_gpu(act)
            case DiskFull(_, machine, for_s):
                holder = self.host.disk if machine == "host" else self.runners[machine]
                self._for_a_while(f"the disk of {machine} is full", holder, "is_full", for_s)
            case StartTrouble(_, node, how, for_s):
                hurt = self.runners[node].machine
                hurt.trouble = how
                self.stage.after(for_s, partial(setattr, hurt, "trouble", ""))
            case Away(_, node, for_s):
                left = self.runners[node].machine
                left.is_away = True
                self.stage.tell("the backend of {} is away for {} s", node, for_s)
                self.stage.after(for_s, left.come_back)
            case _:
                assert_never(act)  # type: ignore[arg-type]

    def _for_a_while(self, words: str, what: object, flag: str, for_s: float) -> None:
        setattr(what, flag, True)
        self.stage.tell("{} for {} s", words, for_s)
        self.stage.after(for_s, partial(setattr, what, flag, False))

    def _clock(self, machine: str) -> Clock:
        return self.host.clock if machine == "host" else self.runners[machine].machine.clock

    def _kill_holder(self, act: HolderDies) -> None:
        task = self.people.find(act.number, act.index)
        node = self.host.disk.tasks[task].node if task is not None else ""
        if node:
            self.runners[node].doom(act.step, 0.1, reboot=False)
            if act.apart_s:
                self._cut(Cut(act.at, node, 0.1, 0.1, loses=True, apart_s=act.apart_s))

    def _cut(self, act: Cut) -> None:
        link = self.uplinks[act.node].link
        if link is not None:
            notices_s = {"host": act.host_notices_s, "runner": act.runner_notices_s}
            link.cut("somebody tripped over it", notices_s, loses=act.loses)
        if act.apart_s:
            weather = self.weather[act.node]
            self._for_a_while(f"{act.node} reaches nobody", weather, "apart", act.apart_s)

    def _break_gpu(self, act: GpuFault) -> None:
        runner = self.runners[act.node]
        broken = runner.machine.gone if act.gone else runner.machine.faulty
        broken.append(act.index)
        self.stage.tell("GPU {} of {} breaks", act.index, act.node)
        self.stage.after(act.for_s, lambda: broken.remove(act.index))
        if act.gone:
            runner.die(1.0, reboot=True)
            self.stage.after(act.for_s + 0.1, lambda: runner.die(1.0, reboot=True))

    # Quiet --------------------------------------------------------------------------

    def _heal(self) -> None:
        """Make everything whole. What operators undo they undo in their own time."""
        self.stage.tell("all is quiet now")
        self.host.spare()
        self.host.disk.is_full = False
        self.host.boot()
        for name, runner in self.runners.items():
            runner.spare()
            runner.is_full = False
            runner.machine.trouble = ""
            runner.machine.come_back()
            runner.boot()
            self.uplinks[name].is_mute = False
            self.weather[name].apart = self.weather[name].repeats = False
            self.weather[name].slow_s.update(host=0.0, runner=0.0)

    def _wind_up(self) -> None:
        """Let held tasks go on, end what never ends, and look for the end of it all."""
        self.promises.end_comparing()
        self.people.resume_all()
        self.people.end_all()

    def _look(self) -> None:
        self._is_over = self.promises.all_is_over()
        self.stage.after(_LOOK_S, self._look)


def _uplink(runner: Runner) -> Uplink:
    assert runner.uplink is not None
    return runner.uplink
