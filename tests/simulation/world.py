"""A whole cluster under seeded faults: one host, some runners, people who ask, and the checks.

The first part of every world is rough: links are cut, messages dawdle and come twice,
daemons die between any two actions and come back with what they had committed. Then it is
quiet, and everything that was ever accepted has to come to its true end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from kohaku_daemon.core.cluster.events import SteerAsked, SubmitAsked, Verb
from protocol.ids import TaskId
from protocol.messages.task import SteerResult, Submitted
from protocol.models.task import Cause, TaskState
from tests.simulation.host import Host
from tests.simulation.link import Link
from tests.simulation.machine import Machine, Program, own_exit
from tests.simulation.runner import Runner
from tests.simulation.stage import Stage
from tests.support.builders import NOW, a_node, a_spec, a_submission, a_user, an_inventory

_ROUGH_S: Final = 90.0
_LONGEST_S: Final = 1500.0
_CORES: Final = 4


class World:
    """One seed's cluster."""

    def __init__(self, seed: int) -> None:
        self.stage = stage = Stage(seed)
        names = ["n1", "n2", "n3"][: stage.random.randint(2, 3)]
        inventory = an_inventory(_CORES, numa=2)
        self.host = Host(stage, [a_node(name, inventory) for name in names])
        self.runners = [
            Runner(stage, Machine(stage, a_node(name).name), inventory, self._dial)
            for name in names
        ]
        self.asked: set[str] = set()
        #: Answered submissions: what was promised, by request id.
        self.promised: dict[str, Submitted] = {}
        self.killed: set[TaskId] = set()
        self._kills_answered: set[TaskId] = set()
        for number in range(stage.random.randint(4, 10)):
            at = stage.random.uniform(0, _ROUGH_S * 0.9)
            event = self._a_submission(number, names)
            stage.after(at, partial(self._submit, event))
        for _ in range(stage.random.randint(0, 6)):
            stage.after(stage.random.uniform(5, _ROUGH_S), self._steer)
        for _ in range(stage.random.randint(0, 6)):
            stage.after(stage.random.uniform(0, _ROUGH_S), self._cut_a_link)

    def play(self) -> None:
        """Play it to its end and check every promise."""
        self.stage.run(NOW + _ROUGH_S)
        self.stage.rough = False
        self.stage.tell("all is quiet now")
        self._resume_for_ever()
        self.stage.run(NOW + _LONGEST_S, done=self._is_over)
        self._check_promises()

    # People -------------------------------------------------------------------------

    def _a_submission(self, number: int, names: list[str]) -> SubmitAsked:
        random = self.stage.random
        spec = a_spec(
            cores=random.choice([0, 1, 1, 2, 3, _CORES]), priority=random.choice([0, 0, 0, 5])
        )
        request_id = f"request-{number}"
        if random.random() < 0.3:
            targets = random.choices(names, k=random.randint(1, 3))
            return a_submission(spec, request_id=request_id, targets=targets)
        return a_submission(spec, request_id=request_id, array=random.randint(1, 4))

    def _submit(self, event: SubmitAsked) -> None:
        """Submit until it is answered: an answer that is lost costs a question, not a task."""
        request_id = event.request.request_id
        self.asked.add(request_id)
        if self.host.engine is not None:
            batches = self.host.kept.batches.values()
            earlier = next((one for one in batches if one.request_id == request_id), None)
            asked = SubmitAsked(event.actor, event.request, event.digest, earlier)
            self.host.ask(asked, lambda value: self._answered(request_id, value))
        if request_id not in self.promised or self.stage.chance(0.5):
            self.stage.after(2.0, lambda: self._submit(event))

    def _answered(self, request_id: str, value: object) -> None:
        assert isinstance(value, Submitted), f"{request_id} was refused: {value!r}"
        before = self.promised.setdefault(request_id, value)
        assert value.runs == before.runs, f"{request_id} became other tasks when repeated"
        for task in value.ids():
            assert task in self.host.kept.tasks, f"{task} was promised and is not kept"
            if value is before and own_exit(task) is None:
                self.stage.after(self.stage.random.uniform(0, 60), partial(self._kill, task))

    def _steer(self) -> None:
        tasks = sorted(self.host.kept.tasks)
        if not tasks:
            return
        task = self.stage.random.choice(tasks)
        if self.stage.random.random() < 0.5:
            self._kill(task)
        else:
            self.stage.tell(f"{task} is to be paused")
            self._ask(Verb.PAUSE, task)

    def _kill(self, task: TaskId) -> None:
        """Ask for a task's end until that is answered; from then on it is the host's affair."""
        if task in self._kills_answered:
            return
        self.stage.tell(f"{task} is to be killed")
        self.killed.add(task)
        self._ask(Verb.KILL, task, lambda _: self._kills_answered.add(task))
        self.stage.after(5.0, lambda: self._kill(task))

    def _resume_for_ever(self) -> None:
        for task in list(self.host.kept.tasks.values()):
            if task.state is TaskState.PAUSED:
                self._ask(Verb.RESUME, task.id)
        self.stage.after(5.0, self._resume_for_ever)

    def _ask(
        self, verb: Verb, task: TaskId, answered: Callable[[object], None] = lambda _: None
    ) -> None:
        def reply(value: object) -> None:
            assert isinstance(value, SteerResult), value
            answered(value)

        self.host.ask(SteerAsked(a_user(), verb, (task,), self.host.kept.ended()), reply)

    # The network --------------------------------------------------------------------

    def _dial(self, runner: Runner) -> Link | None:
        node = runner.machine.node
        link = Link(self.stage, node, self.host.receive, runner.receive)
        link.on_cut = [self.host.lost, runner.lost]
        return link if not self.stage.chance(0.2) and self.host.accept(link) else None

    def _cut_a_link(self) -> None:
        runner = self.stage.random.choice(self.runners)
        if runner.link is not None:
            runner.link.cut("somebody tripped over it")

    # The promises -------------------------------------------------------------------

    def _is_over(self) -> bool:
        return (
            self.host.engine is not None
            and all(request in self.promised for request in self.asked)
            and all(task.state.is_final for task in self.host.kept.tasks.values())
        )

    def _check_promises(self) -> None:
        programs = {
            program.launch.task: program
            for runner in self.runners
            for program in runner.machine.programs.values()
        }
        for task in self.host.kept.tasks.values():
            assert task.state.is_final, f"{task.id} is {task.state} for ever: {task.reason}"
            self._check_end(task.id, task.state, programs.get(task.id))
        engine = self.host.engine
        assert engine is not None
        for node in engine.state.fleet.nodes.values():
            assert not node.site.books.claims, f"{node.name} still holds claims"

    def _check_end(self, task: TaskId, state: TaskState, program: Program | None) -> None:
        """Compare what the books say with what happened."""
        record = self.host.kept.tasks[task]
        assert record.exit is not None
        batch = self.host.kept.batches[record.batch]
        if batch.targets and record.node:
            assert record.node == batch.targets[record.index].node
        if program is None:
            assert state is TaskState.KILLED, f"{task} never ran and is {state}"
            assert task in self.killed, f"{task} never ran and nobody had it killed"
            return
        assert program.exit is not None, f"{task} is {state} and runs"
        assert program.launch.index == record.index
        if program.exit.cause is Cause.EXITED:
            code = program.exit.code
            assert record.exit.code == code, f"{task} returned {code}, not {record.exit}"
        else:
            assert task in self.killed
            assert state is TaskState.KILLED, f"{task} was killed and is {state}"
