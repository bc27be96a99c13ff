"""Numbers that a request may have, and the words that say so."""

from __future__ import annotations

from typing import Any

import pytest

from protocol import methods
from protocol.errors import BadRequest
from protocol.framing import decode_value, encode_value
from protocol.methods import Method


@pytest.mark.parametrize(
    ("method", "params", "said"),
    [
        (methods.TASK_LIST, {"limit": -3}, "task.list: limit must be from 1 to 500"),
        (methods.TASK_LIST, {"limit": 501}, "task.list: limit must be from 1 to 500"),
        (methods.BATCH_LIST, {"limit": 0}, "batch.list: limit must be from 1 to 500"),
        (methods.EVENT_LIST, {"limit": 0}, "event.list: limit must be from 1 to 500"),
        (methods.TASK_WAIT, {"hold_s": -0.1}, "task.wait: hold_s must be from 0 to 60"),
        (methods.TASK_WAIT, {"hold_s": float("nan")}, "task.wait: hold_s must be from 0 to 60"),
        (methods.TASK_WAIT, {"tasks": [1, -2]}, "task.wait: tasks[1] must be from 0 to 9"),
        (methods.TASK_SHOW, {"task": 2**63}, f"task.show: task must be from 0 to {2**63 - 1}"),
        (methods.TASK_LOGS, {"task": 1, "attempt": 0}, "task.logs: attempt must be from 1 to "),
        (methods.TASK_LOGS, {"task": 1, "tail_lines": -1}, "task.logs: tail_lines must be from 0 "),
        (methods.TASK_LOGS, {"task": 1, "stdout_from": 2**63}, "task.logs: stdout_from must be "),
        (methods.TASK_SUBMIT, {"request_id": "x" * 8, "spec": {"command": ["x"]}, "array": -1},
         "task.submit: array must be from 0 to 100000"),
        # What is no number out of its bounds keeps msgspec's reason, after the field's name.
        (methods.TASK_LIST, {"limit": "9"}, "task.list: limit: expected `int`, got `str`"),
        (methods.TASK_SUBMIT, {"request_id": "x" * 8, "spec": {"command": ["x"], "cores": "2"}},
         "task.submit: spec.cores: expected `int`, got `str`"),
        (methods.TASK_SHOW, {}, "task.show: object missing required field `task`"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_what_it_takes(
    method: Method[Any, Any], params: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        decode_value(encode_value(params), method.params, method.name)
    assert caught.value.message.startswith(said)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        (methods.TASK_LIST, {"limit": 1}),
        (methods.TASK_LIST, {"limit": 500}),
        (methods.TASK_WAIT, {"hold_s": 0.0}),
        (methods.TASK_WAIT, {"hold_s": 60}),
        (methods.TASK_LOGS, {"task": 1, "stdout_from": -(2**63), "tail_lines": 0, "attempt": 1}),
    ],
)
def test_the_bounds_themselves_are_taken(method: Method[Any, Any], params: dict[str, Any]) -> None:
    decode_value(encode_value(params), method.params, method.name)
