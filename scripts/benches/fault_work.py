"""What a task of ``scripts/bench faults`` does, and whether it happened as it must have.

Knows: the program of a task, the output and exit code it must have, what each trace of a
launch means. Does not know: daemons, kills, how anything is read from a cluster.

Each task has a file of its own, outside of all that the daemons keep. A launch appends one
line to it as it begins and one before it exits, so a second launch shows whatever the
cluster believes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.models.task import Cause, Task, TaskState

#: ``$22`` of /proc/PID/stat is when the process began (man 5 proc): with its pid it names
#: one process of this boot.
SCRIPT: Final = """
set -- $(cat /proc/$$/stat)
echo "start $KOHAKU_ATTEMPT $KOHAKU_NODE $$ ${22}" >> "$W_FILE"
seq -f "$W_NUMBER out %.0f" 1 "$W_OUT_FIRST"
seq -f "$W_NUMBER err %.0f" 1 "$W_ERR_FIRST" >&2
sleep "$W_SLEEP_FIRST"
seq -f "$W_NUMBER out %.0f" $((W_OUT_FIRST + 1)) "$W_OUT"
seq -f "$W_NUMBER err %.0f" $((W_ERR_FIRST + 1)) "$W_ERR" >&2
sleep "$W_SLEEP_THEN"
echo "end $W_CODE" >> "$W_FILE"
exit "$W_CODE"
"""
#: Seconds a task lasts at most.
_LONGEST_S: Final = 2.0
#: Lines of output at most; a line has some 12 bytes.
_MOST_LINES: Final = 5000


@dataclass(frozen=True, slots=True)
class Work:
    """One task."""

    number: int
    code: int
    #: Lines in each stream, and how many of them come before the first pause.
    out: int
    out_first: int
    err: int
    err_first: int
    #: Seconds of its two pauses.
    sleeps: tuple[float, float]
    trace: Path

    def row(self) -> dict[str, str]:
        """Give the variables of its row of the batch."""
        return {
            "W_NUMBER": str(self.number),
            "W_CODE": str(self.code),
            "W_OUT": str(self.out),
            "W_OUT_FIRST": str(self.out_first),
            "W_ERR": str(self.err),
            "W_ERR_FIRST": str(self.err_first),
            "W_SLEEP_FIRST": f"{self.sleeps[0]:.3f}",
            "W_SLEEP_THEN": f"{self.sleeps[1]:.3f}",
            "W_FILE": str(self.trace),
        }

    def is_running(self) -> bool:
        """Say whether its program has begun and not ended, by its file."""
        return self.trace.read_bytes().count(b"\n") == 1

    def stdout(self) -> bytes:
        """Give what it must have written to stdout."""
        return _lines(self.number, "out", self.out)

    def stderr(self) -> bytes:
        """Give what it must have written to stderr."""
        return _lines(self.number, "err", self.err)


def make_work(count: int, draw: random.Random, folder: Path) -> list[Work]:
    """Draw so many tasks, and make their files in ``folder``, which tasks can write."""
    works = []
    for number in range(count):
        long_s = draw.uniform(0, _LONGEST_S)
        first_s = draw.uniform(0, long_s)
        out, err = (_draw_lines(draw) for _ in range(2))
        trace = folder / str(number)
        trace.touch()
        trace.chmod(0o666)  # each launch has a user of its own under a runner that is root
        works.append(
            Work(
                number=number,
                code=number % 256,
                out=out,
                out_first=draw.randint(0, out),
                err=err,
                err_first=draw.randint(0, err),
                sleeps=(first_s, long_s - first_s),
                trace=trace,
            )
        )
    return works


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is of one task once all is quiet."""

    #: As ``task.show`` gives it; None if the cluster does not know it.
    task: Task | None
    #: Lines of its file.
    trace: Sequence[str]
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    #: Name of the count it belongs to, one of ``KINDS``.
    kind: str
    text: str


LOST, TWICE, RESTARTED, CODE, OUTPUT, CRASH = KINDS = (
    "losses",
    "duplicates",
    "restarts",
    "wrong codes",
    "output mismatches",
    "crashes",
)


def judge(work: Work, seen: Seen) -> list[Violation]:
    """Say what is wrong with one accepted task; nothing if every promise was kept."""
    if seen.task is None:
        return [Violation(LOST, f"work {work.number}: the cluster does not know its task")]
    name = f"work {work.number}, task {seen.task.id}"
    found = [*_judge_trace(work, seen), *_judge_end(work, seen.task)]
    for stream, got, wanted in (
        ("stdout", seen.stdout, work.stdout()),
        ("stderr", seen.stderr, work.stderr()),
    ):
        if got != wanted:
            found.append((OUTPUT, f"{stream} has {len(got)} bytes, {_difference(got, wanted)}"))
    return [Violation(kind, f"{name}: {text}") for kind, text in found]


def _judge_trace(work: Work, seen: Seen) -> Iterable[tuple[str, str]]:
    starts = [line for line in seen.trace if line.startswith("start ")]
    ends = [line for line in seen.trace if line.startswith("end ")]
    if not starts:
        yield LOST, "it was never launched"
    if len(starts) > 1:
        yield TWICE, f"it was launched {len(starts)} times: {'; '.join(starts)}"
    if starts and not ends:
        yield RESTARTED, "its process did not come to its end"
    if len(ends) > 1:
        yield TWICE, f"it ended {len(ends)} times"
    if ends and ends[0] != f"end {work.code}":
        yield CODE, f"it said {ends[0]!r} and was to say 'end {work.code}'"


def _judge_end(work: Work, task: Task) -> Iterable[tuple[str, str]]:
    wanted = TaskState.COMPLETED if work.code == 0 else TaskState.FAILED
    exit_ = task.exit
    if not task.state.is_final:
        yield LOST, f"it is {task.state}: {task.reason}"
    elif task.state is not wanted or exit_ is None or exit_.cause is not Cause.EXITED:
        yield CODE, f"it is {task.state}: {task.reason}; {wanted} was right"
    elif exit_.code != work.code:
        yield CODE, f"it exited with {exit_.code}; {work.code} was right"
    if task.attempt != 1:
        yield RESTARTED, f"its attempt is number {task.attempt}"
    states = Counter(change.state for change in task.history)
    ends = sum(count for state, count in states.items() if state.is_final)
    if ends != 1:
        yield TWICE, f"its history has {ends} ends"


def _draw_lines(draw: random.Random) -> int:
    """Draw how much a task writes: nothing, a little, or more than a pipe holds."""
    return draw.choice((0, draw.randint(1, 20), draw.randint(1, _MOST_LINES)))


def _lines(number: int, stream: str, count: int) -> bytes:
    return b"".join(b"%d %s %d\n" % (number, stream.encode(), at) for at in range(1, count + 1))


def _difference(got: bytes, wanted: bytes) -> str:
    pairs = enumerate(zip(got, wanted, strict=False))
    at = next((at for at, (ours, right) in pairs if ours != right), min(len(got), len(wanted)))
    return f"{len(wanted)} were right; they differ at byte {at}: {got[at : at + 60]!r}"
