"""What the task table promises: every pair as a picture, the subtle ones as stories."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_daemon.core.task.lifecycle import (
    TABLE,
    InvalidTransition,
    TaskEvent,
    advance,
    ending,
)
from protocol.models.task import FINAL_STATES, Cause, Exit, TaskState

README = Path(__file__).parents[4] / "kohaku_daemon/core/README.md"

PICTURE = """
           placed   accepted  started paused completed failed killed oom_killed missed requeued
queued     assigned -         -       -      -         failed killed -          -      -
assigned   -        preparing running paused completed failed killed oom_killed lost   queued
preparing  -        -         running paused completed failed killed oom_killed lost   queued
running    -        -         -       paused completed failed killed oom_killed lost   queued
paused     -        -         running -      completed failed killed oom_killed lost   queued
lost       -        preparing running paused completed failed killed oom_killed -      queued
completed  -        -         -       -      -         -      -      -          -      -
failed     -        -         -       -      -         -      -      -          -      -
killed     -        -         -       -      -         -      -      -          -      -
oom_killed -        -         -       -      -         -      -      -          -      -
"""


@pytest.mark.parametrize("state", TaskState)
def test_every_pair(state: TaskState) -> None:
    header, *rows = [line.split() for line in PICTURE.strip().splitlines()]
    assert header == list(TaskEvent)
    wanted = {row[0]: dict(zip(header, row[1:], strict=True)) for row in rows}[state]
    for event in TaskEvent:
        if wanted[event] == "-":
            with pytest.raises(InvalidTransition, match=f"that is {state} cannot take {event}"):
                advance(state, event)
        else:
            assert advance(state, event) == wanted[event]


def test_a_final_state_is_never_left() -> None:
    assert FINAL_STATES.isdisjoint(TABLE)


@given(st.lists(st.sampled_from(TaskEvent), max_size=30))
def test_what_begins_is_placed_once_and_ends_once(events: list[TaskEvent]) -> None:
    state, story = TaskState.QUEUED, list[TaskState]()
    for event in events:
        try:
            state = advance(state, event)
        except InvalidTransition:
            continue
        story.append(state)
    tries = 1 + story.count(TaskState.QUEUED)
    assert story.count(TaskState.ASSIGNED) <= tries
    assert sum(one.is_final for one in story) == state.is_final


@pytest.mark.parametrize(
    ("exit_", "kill_asked", "end"),
    [
        (Exit(Cause.EXITED, code=0), False, TaskEvent.COMPLETED),
        # It returned by itself at the moment somebody asked for its end: the fact wins.
        (Exit(Cause.EXITED, code=0), True, TaskEvent.COMPLETED),
        (Exit(Cause.EXITED, code=3), False, TaskEvent.FAILED),
        (Exit(Cause.EXITED, code=3), True, TaskEvent.KILLED),
        # 137 by itself is a number like any other.
        (Exit(Cause.EXITED, code=137), False, TaskEvent.FAILED),
        (Exit(Cause.SIGNALLED, signal=9), False, TaskEvent.FAILED),
        (Exit(Cause.SIGNALLED, signal=15), True, TaskEvent.KILLED),
        (Exit(Cause.OOM, signal=9), False, TaskEvent.OOM_KILLED),
        (Exit(Cause.OOM, signal=9), True, TaskEvent.OOM_KILLED),
        # Some of its processes were killed for memory and it coped: it completed.
        (Exit(Cause.EXITED, code=0, oom_kills=2), False, TaskEvent.COMPLETED),
        (Exit(Cause.KILLED), False, TaskEvent.KILLED),
        (Exit(Cause.START_FAILED), False, TaskEvent.FAILED),
        (Exit(Cause.NODE_FAILED), False, TaskEvent.FAILED),
        (Exit(Cause.NODE_REMOVED), False, TaskEvent.KILLED),
    ],
)
def test_which_end_an_exit_is(exit_: Exit, kill_asked: bool, end: TaskEvent) -> None:
    assert ending(exit_, kill_asked=kill_asked) is end


def test_the_readme_draws_the_table() -> None:
    """The diagram is the table, arrow by arrow; the four ends are drawn as one box."""
    drawn = [
        line.strip()
        for line in README.read_text().split("```mermaid", 1)[1].split("```", 1)[0].splitlines()
        if "-->" in line
    ]
    assert drawn == diagram()


def diagram() -> list[str]:
    """Write the table as arrows of a Mermaid state diagram."""
    arrows = ["[*] --> queued"]
    for state, row in TABLE.items():
        ends = [str(event) for event, after in row.items() if after.is_final]
        arrows += [
            f"{state} --> {after}: {event}" for event, after in row.items() if not after.is_final
        ]
        arrows.append(f"{state} --> ended: {'|'.join(ends)}")
    return [*arrows, "ended --> [*]"]
