"""Those who use the cluster in a simulation, and what they were told.

As ``kohaku_daemon.host.handlers`` do: what the stores know is looked up before the engine is
asked. People ask again until they are answered; an answer is a promise, checked at once and
at the end.

Knows: what was asked and answered.
Does not know: nodes (``operators``), what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.cluster.ended import EndedTasks
from kohaku_daemon.core.cluster.events import RetryAsked, SteerAsked, SubmitAsked, Verb
from kohaku_daemon.core.cluster.records import BatchRecord
from kohaku_daemon.core.workload import Launch
from protocol.errors import Conflict, KohakuError, NoFit, NotFound, Unavailable
from protocol.ids import BatchId, TaskId, UserName
from protocol.messages.task import Retried, SteerResult, Submitted
from protocol.models.task import TaskState
from tests.simulation.explaining import check_explanations
from tests.simulation.host import Host
from tests.simulation.machine import command_of, words_of
from tests.simulation.plan import AskAgain, Command, Crowd, EndBatch, Flood, Steer, Submit
from tests.simulation.stage import Stage, promise
from tests.simulation.truth import Truth
from tests.support.builders import GIB, OPERATOR, a_spec, a_submission, a_user

_AGAIN_S: Final = 2.0


class People:
    """Everybody who submits and steers."""

    def __init__(self, stage: Stage, host: Host, truth: Truth) -> None:
        self.truth = truth
        truth.on_begin = self._check_awaited
        #: What somebody has begun to ask for, by number.
        self.asked: dict[int, Submit] = {}
        #: What was promised, by number.
        self.answered: dict[int, Submitted] = {}
        #: Tasks whose end somebody asked for, and those of them whose end was promised.
        self.killed: set[TaskId] = set()
        self.kills_answered: set[TaskId] = set()
        #: Those that were refused for good: they wait for what did not complete.
        self.refused: set[int] = set()
        #: Submissions that others stand in the way of.
        self.wide: list[int] = []
        #: Single tasks behind another owner's many.
        self.crowded: dict[int, int] = {}
        self._requests: dict[int, SubmitAsked] = {}
        self._retries = 0
        self._names: dict[TaskId, str] = {}
        self._stage = stage
        self._random = stage.chance()
        self._host = host

    def name(self, task: TaskId) -> str:
        """Call a task by its submission and place, for the story."""
        return self._names.get(task, str(task))

    # Submitting ---------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """Submit until it is answered: an answer that is lost costs a question, not a task."""
        self.asked[submit.number] = submit
        if submit.number not in self.answered and submit.number not in self.refused:
            if all(number in self.answered for number in submit.after if number in self.asked):
                self._send_submission(submit)
            elif any(number in self.refused for number in submit.after):
                self.refused.add(submit.number)
            self._stage.after(_AGAIN_S, lambda: self.submit(submit))

    def flood(self, act: Flood) -> None:
        """Submit a wide task, and small ones until it begins."""
        wide = Command(lasts_s=1.0)
        self.submit(Submit(act.at, act.number, act.owner, wide, cores=act.cores))
        self.wide.append(act.number)
        self._stage.after(0.5, lambda: self._flood_on(act, act.number * 1000))

    def _flood_on(self, act: Flood, number: int) -> None:
        if not self.has_begun(act.number):
            small = Command(lasts_s=2.0 + 2.0 * self._random.random())
            self.submit(Submit(act.at, number, "bob", small))
            self._stage.after(act.every_s, lambda: self._flood_on(act, number + 1))

    def crowd(self, act: Crowd) -> None:
        """Submit many tasks as one owner and, once they are accepted, one as another."""
        many = act.number + 900_000
        self.submit(Submit(act.at, many, "bob", Command(lasts_s=2.0), array=act.size))
        self._behind(act, many)

    def _behind(self, act: Crowd, many: int) -> None:
        if many in self.answered:
            self.submit(Submit(act.at, act.number, "eve", Command(lasts_s=1.0)))
            self.crowded[act.number] = many
        else:
            self._stage.after(0.5, lambda: self._behind(act, many))

    def has_begun(self, number: int) -> bool:
        """Say whether the first task of a submission has been given a place."""
        task = self.find(number, 0)
        return task is not None and self._host.disk.tasks[task].attempt > 0

    def ask_again(self, act: AskAgain) -> None:
        """Send the same request many times at once, or once more with other words."""
        submit = self.asked.get(act.number)
        if submit is None:
            return
        if not act.other_words:
            for _ in range(act.times):
                self._send_submission(submit)
        elif act.number in self.answered:
            other = self._requests[act.number]
            spec = replace(other.request.spec, name="other words")
            self._deliver(
                a_submission(
                    spec,
                    request_id=other.request.request_id,
                    array=submit.array,
                    actor=other.actor,
                ),
                lambda value: self._check_conflict(act.number, value),
            )

    def _check_conflict(self, number: int, value: object) -> None:
        promise(
            isinstance(value, Conflict | Unavailable),
            "a request id is for one request",
            "request {} with other words was answered with {}",
            number,
            value,
        )

    def _send_submission(self, submit: Submit) -> None:
        request = self._requests.setdefault(submit.number, self._request(submit))
        self._later(
            lambda: self._deliver(request, lambda value: self._submitted(submit, request, value))
        )

    def _request(self, submit: Submit) -> SubmitAsked:
        spec = a_spec(
            command=words_of(submit.command),
            cores=submit.cores,
            memory=submit.gib * GIB,
            gpus=submit.gpus,
            labels={"zone": submit.zone} if submit.zone else {},
            priority=submit.priority,
            time_limit_s=submit.time_limit_s,
            retries=submit.retries,
            requeue_on_lost=submit.requeue_on_lost,
        )
        return a_submission(
            spec,
            request_id=f"request-{submit.number}",
            targets=submit.targets,
            array=submit.array,
            actor=a_user(submit.owner),
            after=self._awaited(submit),
            gang=submit.gang,
        )

    def _awaited(self, submit: Submit) -> tuple[TaskId, ...]:
        answers = [self.answered[number] for number in submit.after if number in self.answered]
        names = [next(one.ids()) if submit.after_first else one.batch for one in answers]
        return tuple(map(TaskId, names))

    def _deliver(self, event: SubmitAsked, reply: Callable[[object], None]) -> None:
        engine = self._host.engine
        if engine is None:
            return
        key = (event.actor.user, event.request.request_id)
        earlier = None
        if key not in engine.state.by_request:
            earlier = self._host.disk.by_request.get(key)
        asked = SubmitAsked(event.actor, event.request, event.digest, earlier)
        if event.request.after:
            self._host.settled(lambda: self._host.ask(self._with_known(asked), reply))
        else:
            self._host.ask(asked, reply)

    def _with_known(self, event: SubmitAsked) -> SubmitAsked:
        """Look up how what is to be waited for stands, as far as it is not live."""
        engine = self._host.engine
        assert engine is not None
        known: dict[int, TaskState] = {}
        for name in event.request.after:
            state = None if name in engine.state.tasks else self._host.disk.standing(name)
            if state is not None:
                known[name] = state
        return SubmitAsked(event.actor, event.request, event.digest, event.earlier, known)

    def _submitted(self, submit: Submit, event: SubmitAsked, value: object) -> None:
        """Take an answer, at the moment it leaves the host."""
        number = submit.number
        if isinstance(value, KohakuError):
            self._check_refusal(submit, event, value)
            return
        assert isinstance(value, Submitted), value
        for task in value.ids():
            promise(
                task in self._host.disk.tasks,
                "accepted is durable",
                "{} of request {} was answered and is not stored",
                task,
                number,
            )
        before = self.answered.setdefault(number, value)
        promise(
            value.runs == before.runs,
            "a request id makes its tasks once",
            "request {} became {} and then {}",
            number,
            before.runs,
            value.runs,
        )
        if value is before:
            self._note_promise(submit, value)

    def _note_promise(self, submit: Submit, value: Submitted) -> None:
        for index, task in enumerate(value.ids()):
            self._names[task] = f"{submit.number}.{index}"
            if submit.killed_after_s >= 0:
                self._stage.after(submit.killed_after_s, lambda task=task: self.kill(task))  # type: ignore[misc]
        self._stage.tell("request {} is answered: {} tasks", submit.number, submit.size)

    def _check_refusal(self, submit: Submit, event: SubmitAsked, error: KohakuError) -> None:
        """Check that a refusal is fair: all that is asked here could be had of a whole cluster."""
        assert self._host.engine is not None
        self._stage.tell("request {} is refused: {}", submit.number, error.message)
        nodes = self._host.engine.state.fleet.nodes
        gone = any(target.node not in nodes for target in event.request.targets)
        fair = (
            isinstance(error, Unavailable)
            or (isinstance(error, NotFound) and gone)
            or isinstance(error, NoFit)
            or self._waits_in_vain(event, error)
        )
        if isinstance(error, Conflict):
            self.refused.add(submit.number)
        promise(fair, "fair requests are granted", "request {}: {!r}", submit.number, error)

    def _waits_in_vain(self, event: SubmitAsked, error: KohakuError) -> bool:
        standing = map(self._host.disk.standing, event.request.after)
        return isinstance(error, Conflict) and any(
            state is not None and state.is_final and state is not TaskState.COMPLETED
            for state in standing
        )

    def _check_awaited(self, launch: Launch) -> None:
        """Check that what a launch had to wait for has completed, for good."""
        batch = self._host.disk.batches.get(launch.batch)
        promise(batch is not None, "accepted is durable", "{} begins, unknown", launch.key)
        assert batch is not None
        for name in batch.after:
            tasks = self._host.disk.tasks.get(TaskId(name))
            awaited = (
                self._host.disk.tasks_of(self._host.disk.batches[BatchId(name)])
                if tasks is None
                else [tasks]
            )
            for one in awaited:
                promise(
                    one.state is TaskState.COMPLETED,
                    "nothing begins before what it waits for",
                    "{} begins, {} is {}",
                    launch.key,
                    one.id,
                    one.state,
                )

    # Steering -----------------------------------------------------------------------

    def steer(self, act: Steer) -> None:
        """Ask something of a task, once, but for its end, which is asked for until answered."""
        task = self.find(act.number, act.index)
        if task is None:
            return
        if act.verb == "kill":
            self.kill(task)
        elif act.verb == "retry":
            self._retries += 1
            self._retry(task, f"retry-{self._retries:04}")
        else:
            self._stage.tell("{} is asked to {}", task, act.verb)
            self._ask(Verb(act.verb), task, lambda _: None)

    def kill(self, task: TaskId) -> None:
        """Ask for a task's end until that is answered; from then on it is the host's affair."""
        if task in self.kills_answered:
            return
        if task not in self.killed:
            self._stage.tell("{} is to be killed", task)
            self.killed.add(task)
        self._ask(Verb.KILL, task, lambda result: self._killed(task, result))
        self._stage.after(5.0, lambda: self.kill_again(task))

    def kill_again(self, task: TaskId) -> None:
        """Go on asking while the task has not ended."""
        record = self._host.disk.tasks.get(task)
        if record is None or not record.state.is_final:
            self.kill(task)

    def end_batch(self, act: EndBatch) -> None:
        """Ask for the end of all of a submission that is stored, until that is answered."""
        submit = self.asked.get(act.number)
        batch = None
        if submit is not None:
            key = (UserName(submit.owner), f"request-{act.number}")
            batch = self._host.disk.by_request.get(key)
        if batch is None:
            return
        self._stage.tell("all of request {} is to be killed", act.number)
        answered = False

        def reply(value: object) -> None:
            nonlocal answered
            if isinstance(value, SteerResult):
                answered = True
                self._all_killed(batch, value)

        def deliver() -> None:
            self._host.ask(SteerAsked(OPERATOR, Verb.KILL, batch=batch.id), reply)

        def ask() -> None:
            if not answered:
                self.killed.update(batch.ids())
                self._later(lambda: self._host.settled(deliver))
                self._stage.after(_AGAIN_S, ask)

        ask()

    def _all_killed(self, batch: BatchRecord, value: SteerResult) -> None:
        """Check that an answer is about all of a batch; what has not ended by then is to end."""
        disk = self._host.disk
        made = sum(name in disk.tasks for name in batch.ids())
        promise(
            made == batch.count and not value.refused,
            "a batch is ended as a whole",
            "{} of {} tasks of batch {} are there, {}",
            made,
            batch.count,
            batch.id,
            value,
        )
        for name in batch.ids():
            task = disk.tasks[name]
            if not task.state.is_final:
                promise(
                    bool(task.kill_asked_by),
                    "a batch is ended as a whole",
                    "{} is {} and nobody has asked for its end",
                    name,
                    task.state,
                )
                self.kills_answered.add(name)

    def resume_all(self) -> None:
        """Let what is held go on, as often as it takes."""
        for task in list(self._host.disk.tasks.values()):
            if task.state is TaskState.PAUSED:
                self._ask(Verb.RESUME, task.id, lambda _: None)
        self._stage.after(5.0, self.resume_all)

    def end_all(self) -> None:
        """Ask for the end of all that would never end by itself, as long as there is any."""
        disk = self._host.disk
        for task in list(disk.tasks.values()):
            command = command_of(disk.batches[task.batch].spec.command)
            if not command.lasts_s and not task.state.is_final and task.id not in self.killed:
                self.kill(task.id)
        self._stage.after(5.0, self.end_all)

    def _retry(self, task: TaskId, request_id: str) -> None:
        """Ask for another attempt until that is answered."""
        self._stage.tell("{} is to be tried again", task)
        self.truth.retried.add(task)
        answered = False

        def reply(value: object) -> None:
            nonlocal answered
            answered = not isinstance(value, Unavailable)
            if isinstance(value, Retried):
                self._note_retry(task, value)

        def ask() -> None:
            if not answered:
                self._later(lambda: self._host.settled(deliver))
                self._stage.after(_AGAIN_S, ask)

        def deliver() -> None:
            self._host.ask(self._retry_event(task, request_id), reply)

        ask()

    def _retry_event(self, task: TaskId, request_id: str) -> RetryAsked:
        engine, disk = self._host.engine, self._host.disk
        assert engine is not None
        source = disk.batches[disk.tasks[task].batch]
        ended = EndedTasks(request_id)
        ended.take(disk.ended_records((task,)))
        return RetryAsked(
            OPERATOR,
            request_id,
            request_id.encode(),
            source,
            task,
            ended,
            earlier=disk.by_request.get((source.owner, request_id)),
        )

    def _note_retry(self, task: TaskId, value: Retried) -> None:
        if task in value.requeued:
            # Of two wishes the later one counts.
            self.kills_answered.discard(task)
            self.killed.discard(task)
        for one in value.submitted.ids() if value.submitted is not None else ():
            promise(one in self._host.disk.tasks, "accepted is durable", "{} is not stored", one)
            self._names[one] = f"{self.name(task)}+"

    def _killed(self, task: TaskId, result: SteerResult) -> None:
        if result.asked:
            self.kills_answered.add(task)

    def find(self, number: int, index: int) -> TaskId | None:
        """Give a task by its submission and place, if that was answered."""
        answer = self.answered.get(number)
        tasks = list(answer.ids()) if answer is not None else []
        return tasks[index] if index < len(tasks) else None

    def _ask(self, verb: Verb, task: TaskId, then: Callable[[SteerResult], None]) -> None:
        def reply(value: object) -> None:
            if not isinstance(value, Unavailable):
                assert isinstance(value, SteerResult), value
                self._check_steered(task, value)
                then(value)

        def ask() -> None:
            disk = self._host.disk
            ended = {task: disk.tasks[task].state} if task in disk.tasks else {}
            event = SteerAsked(OPERATOR, verb, (task,), ended)
            self._host.ask(event, reply)

        self._later(lambda: self._host.settled(ask))

    def _check_steered(self, task: TaskId, value: SteerResult) -> None:
        promise(
            value.asked + len(value.refused) == 1 and "no such task" not in str(value.refused),
            "accepted is durable",
            "asked about {}, the host says {}",
            task,
            value,
        )

    # Explaining ---------------------------------------------------------------------

    def explain(self) -> None:
        """Ask why everything is where it is, and check that it is so."""
        self._later(lambda: self._host.look(check_explanations))

    def _later(self, act: Callable[[], None]) -> None:
        self._stage.after(0.001 + 0.03 * self._random.random(), act)
