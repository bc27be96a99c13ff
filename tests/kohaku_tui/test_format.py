"""How values of the cluster are said."""

from __future__ import annotations

import pytest

from kohaku_tui.format import (
    age,
    command_text,
    counts_text,
    exit_text,
    moment,
    node_state,
    number_ranges,
    pairs_text,
    run_time,
    share,
    size_share,
    state_style,
    task_state,
)
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.models.node import Node, NodeState
from protocol.models.task import Cause, Exit, Task, TaskSpec, TaskState

TASK = Task(
    id=TaskId(1),
    batch=BatchId(1),
    owner=UserName("ada"),
    state=TaskState.FAILED,
    spec=TaskSpec(command=("x",)),
    exit=Exit(Cause.EXITED, 3),
    started_at=100.0,
    ended_at=190.0,
)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (Exit(Cause.EXITED, 0), "exit code 0"),
        (Exit(Cause.SIGNALLED, signal=11), "ended by SIGSEGV"),
        (Exit(Cause.SIGNALLED, signal=64 + 63), "ended by signal 127"),
        (Exit(Cause.OOM, signal=9, message="64 MiB"), "out of memory: 64 MiB"),
        (Exit(Cause.KILLED, signal=15), "killed with SIGTERM"),
        (Exit(Cause.KILLED, 143), "killed, exit code 143"),
        (Exit(Cause.START_FAILED, message="no such\nfile"), "could not be started: no such file"),
        (Exit(Cause.NODE_FAILED), "its node failed"),
        (Exit(Cause.NODE_REMOVED), "its node was removed"),
    ],
)
def test_ends(end: Exit, said: str) -> None:
    assert exit_text(end) == said


def test_an_end_at_the_time_limit_says_which_limit() -> None:
    end = Exit(Cause.TIME_LIMIT, signal=15)
    assert exit_text(end) == "ended at its time limit"
    assert exit_text(end, 5400.0) == "ended at its time limit of 1h30m"


def test_states_say_more_than_their_name_where_there_is_more() -> None:
    assert task_state(TASK) == "failed (3)"
    asked = Task(**{f: getattr(TASK, f) for f in ("id", "batch", "owner", "spec")},
                 state=TaskState.RUNNING, kill_asked=True)  # fmt: skip
    assert task_state(asked) == "running, to be killed"
    node = Node(name=NodeName("a"), state=NodeState.ONLINE, draining=True)
    assert node_state(node) == "online, draining"


@pytest.mark.parametrize("state", [*TaskState, *NodeState])
def test_every_state_has_a_style(state: str) -> None:
    assert state_style(state)


def test_times() -> None:
    assert age(0.0, 1e9) == "-"
    assert age(1000.0, 1320.0) == "5m20s"
    assert age(1000.0, 999.0) == "0.0s"
    assert run_time(TASK, 1e9) == "1m30s"
    assert moment(0.0) == "-"
    assert moment(1e9).startswith("2001-09-09 ")


def test_things_in_numbers() -> None:
    assert number_ranges([8, 0, 1, 2, 10]) == "0-2,8,10"
    assert number_ranges([]) == "-"
    assert share(3, 8) == "3 of 8"
    assert size_share(2**30, 2**33) == "1 GiB of 8 GiB"
    assert counts_text({"running": 2, "queued": 0, "lost": 1}) == "2 running, 1 lost"
    assert counts_text({}) == "none"


def test_text_of_others_is_made_safe() -> None:
    assert command_text(["sh", "-c", "a\nb\x1b[2J"]) == "sh -c 'a b'"
    assert pairs_text({"b": "2\x07", "a": "1"}) == "a=1 b=2"
