"""The promises that need books and truth side by side: in the quiet, and at the end.

Knows: what was answered (``people``), what is stored (``disk``), what really ran (``truth``).
Does not know: how any of it came about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.records import BatchRecord, TaskRecord
from protocol.ids import TaskId
from protocol.models.target import Target
from protocol.models.task import Cause, TaskState
from tests.simulation.machine import Program
from tests.simulation.plan import ClockJump
from tests.simulation.stage import promise

if TYPE_CHECKING:
    from tests.simulation.world import World

#: Seconds that a launch may be over its limit: its grace, a runner that was down, a reboot.
_LIMIT_SLACK_S: Final = 45.0
#: Tasks of somebody else that may go past one that fits, in each run of the host.
_TURNS_PASSED: Final = 10
_LIVE_STATES: Final = {True: TaskState.PAUSED, False: TaskState.RUNNING}


class Promises:
    """Checks one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        #: What did not agree when it was compared first: news may have been on their way.
        self._odd: dict[TaskId, str] = {}

    # In the quiet -------------------------------------------------------------------

    def begin_comparing(self) -> None:
        """Compare all that lives with the truth. What disagrees has some seconds to be told."""
        self._odd = self._disagreements()
        self._world.people.explain()

    def end_comparing(self) -> None:
        """Compare once more: what disagrees in the same way would do so for ever.

        Raises:
            BrokenPromise: Something does.
        """
        self.check_limits()
        still = self._disagreements()
        for task, what in self._odd.items():
            promise(still.get(task) != what, "books tell the truth", "{}: {}", task, what)

    def check_limits(self) -> None:
        """Check that nothing goes on that has run longer than it may. Restarts and cuts took time.

        Raises:
            BrokenPromise: Something does.
        """
        world = self._world
        if any(isinstance(act, ClockJump) for act in world.plan.acts):
            return  # a runner that restarts goes by the wall clock: it has no other memory
        for programs in world.truth.launches.values():
            for program in programs:
                limit_s = program.launch.spec.time_limit_s
                over_s = world.stage.now - program.began_at - limit_s
                promise(
                    not limit_s or not program.runs or over_s < _LIMIT_SLACK_S,
                    "time limits are kept to",
                    "{} runs on {}, {} s over its limit of {} s",
                    program.launch.key,
                    program.node,
                    over_s,
                    limit_s,
                )

    def check_begun(self) -> None:
        """Check that what others stand in the way of has begun: all that was there has ended.

        Raises:
            BrokenPromise: It has not.
        """
        for number in self._world.people.wide:
            begun = self._world.people.has_begun(number)
            promise(begun, "nothing starves", "request {} waits, others go past it", number)

    def _disagreements(self) -> dict[TaskId, str]:
        engine = self._engine()
        odd = {
            task.id: what for task in engine.state.tasks.values() if (what := self._odd_of(task))
        }
        for node in engine.state.fleet.nodes.values():
            if not node.is_online:
                odd[TaskId(-1)] = f"{node.name} is {node.state}, and everything is well"
        return odd

    def _odd_of(self, task: TaskRecord) -> str:
        if task.state is TaskState.QUEUED:
            return ""
        program = self._world.truth.of(task.id, task.attempt)
        if program is None:
            # By attempt: of a task that is tried again the next one may be as far as this one.
            return f"attempt {task.attempt} is {task.state} on {task.node} and never began"
        if program.exit is not None:
            return f"it is {task.state} and ended: {program.exit}"
        if task.state is not _LIVE_STATES[program.paused]:
            return f"it is {task.state} and {_LIVE_STATES[program.paused]}"
        return ""

    def _engine(self) -> ClusterEngine:
        engine = self._world.host.engine
        promise(engine is not None, "the host comes back", "it is down in the quiet")
        assert engine is not None
        return engine

    # The end ------------------------------------------------------------------------

    def all_is_over(self) -> bool:
        """Say whether nothing is left to wait for."""
        world = self._world
        engine = world.host.engine
        return (
            engine is not None
            and not engine.state.tasks
            and all(node.is_online for node in engine.state.fleet.nodes.values())
            and world.people.asked.keys() == world.people.answered.keys() | world.people.refused
            and all(task.state.is_final for task in world.host.disk.tasks.values())
            and all(runner.engine is not None for runner in world.runners.values())
            and not any(
                runner.engine.attempts()
                for runner in world.runners.values()
                if runner.engine is not None
            )
        )

    def check_end(self) -> None:
        """Check what every task came to.

        Raises:
            BrokenPromise: It is not what it truly came to, or it is not over.
        """
        world = self._world
        for number in world.people.asked:
            known = number in world.people.answered or number in world.people.refused
            promise(known, "nothing starves", "request {} is not answered", number)
        for answer in world.people.answered.values():
            for task in answer.ids():
                known = task in world.host.disk.tasks
                promise(known, "accepted is durable", "{} is gone", task)
        for one, many in world.people.crowded.items():
            self._check_fair(one, many)
        for record in world.host.disk.tasks.values():
            promise(
                record.state.is_final,
                "everything ends",
                "{} is {} for ever: {}",
                world.people.name(record.id),
                record.state,
                record.reason,
            )
            self._check_end_of(record)
        for node in self._engine().state.fleet.nodes.values():
            held = node.site.books.claims
            promise(not held, "claims are let go", "{} holds {}", node.name, held)
        for name, runner in world.runners.items():
            assert runner.engine is not None
            left = runner.engine.attempts()
            promise(not left, "ends are told", "{} has not got rid of {}", name, left)

    def _check_fair(self, one: int, many: int) -> None:
        """Check that a single task did not wait for another owner's many.

        Turns are dealt anew by each run of the host, and a pass may fill every core at once.
        """
        world, disk = self._world, self._world.host.disk
        (single,) = world.people.answered[one].ids()
        placed = disk.placed.get(single)
        if placed is None:
            return
        passed = sum(
            disk.accepted[single] <= disk.placed.get(task, -1) < placed
            for task in world.people.answered[many].ids()
        )
        cores = sum(machine.cores for machine in world.plan.machines)
        fair = _TURNS_PASSED * world.host.life + cores
        promise(passed <= fair, "owners take turns", "{} went past {}", passed, single)

    def _check_end_of(self, record: TaskRecord) -> None:
        world = self._world
        assert record.exit is not None
        batch = world.host.disk.batches[record.batch]
        programs = world.truth.launches.get(record.id, [])
        for program in programs:
            promise(
                program.exit is not None,
                "everything ends",
                "{} is {} and runs on {}",
                record.id,
                record.state,
                program.node,
            )
        promise(
            record.attempt <= 1 + record.retried
            or batch.spec.requeue_on_lost
            or record.id in world.truth.retried,
            "another attempt only if asked for",
            "{} had {} attempts",
            record.id,
            record.attempt,
        )
        promise(
            record.retried <= batch.spec.retries,
            "another attempt only if asked for",
            "{}: {}",
            record.id,
            record,
        )
        if record.exit.cause is Cause.NODE_REMOVED:
            return
        last = world.truth.of(record.id, record.attempt)
        if record.history[-2].state is TaskState.QUEUED:
            self._check_end_of_waiting(record)
        elif last is None:
            self._check_never_ran(record)
        else:
            self._check_true_end(record, last)

    def _check_end_of_waiting(self, record: TaskRecord) -> None:
        """Check why a task ended that was not on any node at the time."""
        assert record.exit is not None
        world = self._world
        batch = world.host.disk.batches[record.batch]
        match record.exit.cause:
            case Cause.KILLED:
                fair = record.id in world.people.killed and record.state is TaskState.KILLED
            case Cause.DEPENDENCY:
                standing = map(world.host.disk.standing, batch.after)
                fair = any(one is not TaskState.COMPLETED for one in standing)
            case Cause.GANG:
                fair = self._is_broken_gang(batch)
            case _:
                fair = False
        promise(fair, "ends are true", "{} waited and is {}", record.id, record)

    def _is_broken_gang(self, batch: BatchRecord) -> bool:
        """Say whether a member of a gang did not begin, so that the others were not to go on."""
        tasks = self._world.host.disk.tasks_of(batch)
        return batch.gang and any(not task.started_at for task in tasks)

    def _check_never_ran(self, record: TaskRecord) -> None:
        assert record.exit is not None
        world = self._world
        if record.exit.cause is Cause.START_FAILED:
            known = (record.id, record.attempt) in world.truth.failed_starts
        else:
            asked = record.id in world.people.killed or self._is_broken_gang(
                world.host.disk.batches[record.batch]
            )
            known = record.state is TaskState.KILLED and asked
        promise(known, "ends are true", "{} never ran and is {}", record.id, record)

    def _check_true_end(self, record: TaskRecord, program: Program) -> None:
        """Compare what the books say with what happened."""
        exit_, told = program.exit, record.exit
        assert exit_ is not None
        assert told is not None
        expected = self._expected_state(record, program)
        promise(
            record.state is expected,
            "ends are true",
            "{} is {} and was {}: {}",
            record.id,
            record.state,
            expected,
            exit_,
        )
        promise(
            (told.code, told.signal, told.oom_kills) == (exit_.code, exit_.signal, exit_.oom_kills),
            "ends are true",
            "{} ended with {} and was told as {}",
            record.id,
            exit_,
            told,
        )
        promise(
            record.node == program.node and record.claim == program.launch.claim,
            "claims are what is used",
            "{} was on {} with {}: {}",
            record.id,
            program.node,
            program.launch.claim,
            record,
        )
        batch = self._world.host.disk.batches[record.batch]
        if told.cause is Cause.TIME_LIMIT:
            self._check_time_limit(record, program)
        elif record.state in {TaskState.FAILED, TaskState.OOM_KILLED} and not record.kill_asked_by:
            left = batch.spec.retries - record.retried
            promise(not left, "retries are made", "{} has {} left: {}", record.id, left, record)
        if batch.targets:
            self._check_target(record, batch.targets[batch.position(record.index)], program)

    def _check_time_limit(self, record: TaskRecord, program: Program) -> None:
        limit_s = program.launch.spec.time_limit_s
        ran_s = program.ended_at - program.started_at
        jumps = any(isinstance(act, ClockJump) for act in self._world.plan.acts)
        promise(
            limit_s and (ran_s >= limit_s - 0.02 or jumps),
            "time limits are kept to",
            "{} ran {} of {} s: {}",
            record.id,
            ran_s,
            limit_s,
            record,
        )

    def _expected_state(self, record: TaskRecord, program: Program) -> TaskState:
        exit_, told = program.exit, record.exit
        assert exit_ is not None
        assert told is not None
        if exit_.cause is Cause.OOM:
            return TaskState.OOM_KILLED
        if exit_.code == 0 and told.cause is not Cause.TIME_LIMIT:
            return TaskState.COMPLETED
        people = self._world.people
        batch = self._world.host.disk.batches[record.batch]
        if record.id in people.kills_answered:
            return TaskState.KILLED
        if record.state is TaskState.KILLED and (
            record.id in people.killed or self._is_broken_gang(batch)
        ):
            return TaskState.KILLED
        return TaskState.FAILED

    def _check_target(self, record: TaskRecord, target: Target, program: Program) -> None:
        claim = program.launch.claim
        machine = self._world.runners[program.node].machine
        pinned = {
            core
            for numa in machine.inventory().numa
            if numa.number == target.numa
            for core in numa.cores
        }
        promise(
            program.node == target.node
            and (target.numa is None or pinned.issuperset(claim.cores))
            and len(claim.gpus) == (len(target.gpus) or len(claim.gpus)),
            "targets are kept to",
            "{} wanted {} and had {} of {}",
            record.id,
            target,
            claim,
            program.node,
        )
