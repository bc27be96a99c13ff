"""What scripts may rely on in every JSON document."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kohaku_tui.document import render_json, to_document, to_plain
from kohaku_tui.sanitize import clean_line
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.messages.cluster import Event, Update
from protocol.messages.task import SteerResult, Submitted, WaitTasks
from protocol.methods import METHODS, StreamingMethod
from protocol.models.node import Claimed, Node, NodeState, Readings, TaskReading
from protocol.models.target import Target
from protocol.models.task import Change, Claim, Task, TaskSpec, TaskState

BIG = 2**62 + 1


def test_every_field_is_there_and_ids_are_strings() -> None:
    task = Task(
        id=TaskId(BIG),
        batch=BatchId(BIG),
        owner=UserName("ada"),
        state=TaskState.RUNNING,
        spec=TaskSpec(command=("echo", "hi"), env={"A": "b"}),
        target=Target("node1", gpus=(1,)),
        claim=Claim((0, 1)),
        history=(Change(1.5, TaskState.QUEUED),),
    )
    document: Any = to_document(task)
    assert set(document) == set(Task.__struct_fields__)
    assert document["id"] == document["batch"] == str(BIG)
    assert document["state"] == "running"
    assert document["spec"]["env"] == {"A": "b"}
    assert document["target"] == {"node": "node1", "numa": None, "gpus": [1]}
    assert document["claim"]["cores"] == [0, 1]
    assert document["history"][0]["at"] == 1.5
    assert document["exit"] is None
    assert document["index"] == 0


def test_ids_are_found_in_pairs_lists_and_options() -> None:
    assert to_document(SteerResult(1, ((TaskId(BIG), "over"),)))["refused"] == [[str(BIG), "over"]]
    assert to_document(WaitTasks(tasks=(TaskId(BIG),), batch=None)) == {
        "tasks": [str(BIG)],
        "batch": None,
        "hold_s": 30.0,
    }
    assert to_document(Event(id=BIG, at=1.0, kind="k", text="t", task=TaskId(BIG)))["id"] == str(
        BIG
    )
    node = Node(
        name=NodeName("a"),
        state=NodeState.ONLINE,
        claimed=Claimed(1, 2),
        readings=Readings(tasks=(TaskReading(TaskId(BIG)),)),
    )
    document: Any = to_document(Update(nodes=(node,)))
    assert document["nodes"][0]["readings"]["tasks"][0]["task"] == str(BIG)


def test_a_submission_gives_ids_not_runs() -> None:
    assert to_document(Submitted(BatchId(1), ((5, 2),))) == {
        "batch": "1",
        "tasks": ["5", "6"],
        "repeated": False,
    }


def test_whole_numbers_that_are_ids_without_saying_so_are_known() -> None:
    """Every other id of an answer has a type that says so, and becomes a string by it."""
    bare = {
        (kind, name)
        for kind in structs_of_answers()
        for name, hint in get_type_hints(kind).items()
        if hint is int and name in {"id", "task", "batch", "event"}
    }
    assert bare == {(Event, "id")}


def structs_of_answers() -> set[type[msgspec.Struct]]:
    """Give every struct that an answer or an item of the table can hold."""
    found: set[type[msgspec.Struct]] = set()
    new: list[Any] = [method.result for method in METHODS.values()]
    new += [m.item for m in METHODS.values() if isinstance(m, StreamingMethod)]
    while new:
        hint = new.pop()
        new += get_args(hint)
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct) and hint not in found:
            found.add(hint)
            new += get_type_hints(hint).values()
    return found


@given(st.text(st.characters(exclude_categories=[])))
def test_json_is_safe_to_print_and_means_the_same(text: str) -> None:
    written = render_json({"name": text}, indent=None)
    assert json.loads(written) == {"name": text}
    assert written == clean_line(written)


def test_values_of_no_known_shape_become_plain() -> None:
    value = {"node": ("a", TaskState.LOST), 1: [2**53, 2**53 - 1, None, True, 0.5, b"x"]}
    assert to_plain(value) == {
        "node": ["a", "lost"],
        "1": [str(2**53), 2**53 - 1, None, True, 0.5, "b'x'"],
    }
