"""What is really so, whatever anybody believes: every program that ever began, and the promises
about them that no book is needed for.

Knows: promises 2 (at most once per attempt) and 4 (nothing is used twice), seen from the machines.
Does not know: how the cluster came to start something.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kohaku_daemon.core.workload import Launch
from protocol.ids import NodeName, TaskId
from tests.simulation.stage import promise

if TYPE_CHECKING:
    from tests.simulation.machine import Program


class Truth:
    """All that ever ran."""

    def __init__(self) -> None:
        self.launches: dict[TaskId, list[Program]] = {}
        #: Attempts that a backend could not start.
        self.failed_starts: set[tuple[TaskId, int]] = set()
        #: Attempts whose end a runner was ordered and has committed to, by its node.
        self.ends_taken: set[tuple[NodeName, TaskId, int]] = set()
        #: Attempts that a runner has stored as ended without having begun.
        self.never: set[tuple[TaskId, int]] = set()
        #: Tasks that somebody asked to have tried again though they may still run.
        self.retried: set[TaskId] = set()
        #: Told of each launch before it begins.
        self.on_begin: Callable[[Launch], None] = lambda _: None

    def of(self, task: TaskId, attempt: int) -> Program | None:
        """Give the program of an attempt, if it began."""
        for program in self.launches.get(task, ()):
            if program.launch.attempt == attempt:
                return program
        return None

    def runs(self, task: TaskId, attempt: int) -> bool:
        """Say whether the program of an attempt has begun and not ended."""
        program = self.of(task, attempt)
        return program is not None and program.runs

    def begins(self, program: Program, beside: list[Program]) -> None:
        """Note that a program begins, beside those that run on its machine."""
        self.on_begin(program.launch)
        promise(
            (program.launch.task, program.launch.attempt) not in self.never,
            "what ended without having begun never begins",
            "{} begins on {}",
            program.launch.key,
            program.node,
        )
        earlier = self.launches.setdefault(program.launch.task, [])
        for one in earlier:
            self._check_again(program, one)
        for other in beside:
            _check_apart(program, other)
        earlier.append(program)

    def _check_again(self, program: Program, earlier: Program) -> None:
        """Check one attempt against an earlier one: each once, and another only if asked for."""
        launch, spec = program.launch, program.launch.spec
        promise(
            earlier.launch.attempt != launch.attempt,
            "at most once",
            "{} began on {} and again on {}",
            launch.key,
            earlier.node,
            program.node,
        )
        if spec.requeue_on_lost or launch.task in self.retried:
            return
        promise(
            not earlier.runs,
            "one attempt at a time",
            "{} begins on {} while {} runs on {}",
            launch.key,
            program.node,
            earlier.launch.key,
            earlier.node,
        )
        promise(
            launch.attempt <= 1 + spec.retries,
            "another attempt only if asked for",
            "{} begins on {}",
            launch.key,
            program.node,
        )


def _check_apart(program: Program, other: Program) -> None:
    mine, theirs = program.launch.claim, other.launch.claim
    promise(
        not set(mine.cores) & set(theirs.cores) and not set(mine.gpus) & set(theirs.gpus),
        "nothing is claimed twice",
        "{} and {} run on {} with {} and {}",
        program.launch.key,
        other.launch.key,
        program.node,
        mine,
        theirs,
    )
