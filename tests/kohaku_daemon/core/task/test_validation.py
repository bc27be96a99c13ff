"""What no cluster could carry out is refused by name; everything else is let through."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kohaku_daemon.core.task.validation import (
    LONGEST_HOST,
    batch_size,
    check_labels,
    check_submission,
)
from protocol.errors import BadRequest
from protocol.framing import encode_item
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import OrderStart
from protocol.messages.task import LARGEST_BATCH, SubmitTask
from protocol.models.environment import WantedImage
from protocol.models.target import Target, parse_target
from protocol.models.task import Claim, Mount, TaskSpec
from tests.support.builders import a_spec

FINE = SubmitTask(request_id="request-1", spec=a_spec())
REQUEST_IDS = st.just(FINE.request_id) | st.text(max_size=70)
#: Drawn by its type: left alone, hypothesis would also try msgspec's mark for a default.
EVERY_FIELD = dict.fromkeys(TaskSpec.__struct_fields__, ...)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "x" * 128, "priority": -1000, "grace_s": 0.0},
        {"env": {"PATH": "/bin", "_": ""}, "workdir": "/data", "labels": {"gpu": "a100", "x": ""}},
        {"cores": 0, "memory": 0, "gpus": 0},
        {"cores": 64, "memory": 2**20, "gpus": 8, "priority": 1000, "grace_s": 3600.0},
        {"command": ("echo", "", "\n", "ünïcödé")},
        {"command": ("x" * (96 * 1024 - 5),)},
        {"workdir": "/" + "x" * 4094, "backend": "x" * 64},
        {"labels": {f"label-{number}": "" for number in range(64)}},
    ],
)
def test_a_reasonable_spec_is_let_through(changes: dict[str, Any]) -> None:
    check_submission(replace(FINE, spec=a_spec(**changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"command": ()}, "there is no command"),
        ({"command": ("", "x")}, "there is no command"),
        ({"command": ("a\0b",)}, "the command contains a NUL character"),
        ({"command": ("x" * 96 * 1024,)}, "the command is longer than 96 KiB"),
        # An empty argument takes room too.
        ({"command": ("x", *[""] * 100_000)}, "the command is longer than 96 KiB"),
        # It is bytes that have to fit into an order, and an umlaut has two of them.
        ({"command": ("ü" * 60 * 1024,)}, "the command is longer than 96 KiB"),
        ({"name": "x" * 129}, "name must be at most 128 printable characters"),
        ({"name": "a\x1b[2J"}, "name must be at most 128 printable characters"),
        ({"env": {"A B": ""}}, "env: 'A B' is not a name of a variable"),
        ({"env": {"": ""}}, "env: '' is not a name of a variable"),
        ({"env": {"KOHAKU_TASK_ID": "1"}}, "env: KOHAKU_TASK_ID is set by the cluster"),
        ({"env": {"A": "\0"}}, "env: the value of A contains a NUL character"),
        ({"env": {"A": "x" * 65536}}, "env holds more than 64 KiB"),
        ({"env": {"A": "ü" * 40000}}, "env holds more than 64 KiB"),
        ({"labels": {"gpu": "a 100"}}, "gpu=a 100 cannot be a label"),
        ({"labels": {"": "x"}}, "=x cannot be a label"),
        (
            {"labels": {f"label-{number}": "" for number in range(65)}},
            "a task may ask for 64 labels, not 65",
        ),
        ({"backend": "x" * 65}, "backend must be at most 64 printable characters"),
        ({"backend": "a\x1b[2J"}, "backend must be at most 64 printable characters"),
        ({"workdir": "/" + "x" * 4095}, "workdir is longer than 4095 bytes"),
        ({"workdir": "/" + "ü" * 2048}, "workdir is longer than 4095 bytes"),
        ({"workdir": "data"}, "workdir 'data' is not an absolute path"),
        ({"workdir": "/a\0b"}, r"workdir '/a\x00b' is not an absolute path"),
        (
            {"mounts": tuple(Mount("/" + "s" * 4000, f"/{n}") for n in range(5))},
            "mounts hold more than 16 KiB",
        ),
        (
            {
                "mounts": (Mount("/" + "s" * 4000, "/d"),),
                "env": {"A": "x" * 65000},
                "command": ("x" * 98000,),
            },
            "command, env and mounts hold more than 160 KiB together",
        ),
        ({"image": "no image"}, "image 'no image' is not a reference to an image"),
        ({"cores": -1}, "cores must be 0 to 65536, not -1"),
        ({"cores": 65537}, "cores must be 0 to 65536, not 65537"),
        ({"memory": -1}, "memory must be 0 or more bytes, not -1"),
        ({"memory": 64}, "memory of 64 bytes is less than 1 MiB"),
        ({"gpus": -1}, "gpus must be 0 to 1024, not -1"),
        ({"priority": 1001}, "priority must be -1000 to 1000, not 1001"),
        ({"grace_s": -0.5}, "grace must be 0 to 3600 seconds, not -0.5"),
        ({"grace_s": 8_553_600.0}, "grace must be 0 to 3600 seconds, not 8553600"),
        ({"grace_s": float("nan")}, "grace must be 0 to 3600 seconds, not nan"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    assert _refusal(replace(FINE, spec=a_spec(**changes))) == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request_id": "short"}, "request_id must be 8 to 64 printable characters without spaces"),
        (
            {"request_id": "with a space"},
            "request_id must be 8 to 64 printable characters without spaces",
        ),
        ({"array": 2, "rows": ({},)}, "targets, array and rows were given together"),
        (
            {"array": -1, "targets": (Target("n1"),)},
            "targets, array and rows were given together",
        ),
        ({"array": -1}, "a batch has 1 to 100000 tasks"),
        ({"array": LARGEST_BATCH + 1}, "a batch has 1 to 100000 tasks"),
        ({"rows": ({},) * (LARGEST_BATCH + 1)}, "a batch has 1 to 100000 tasks"),
        ({"targets": (Target("n1"),) * (LARGEST_BATCH + 1)}, "a batch has 1 to 100000 tasks"),
        ({"rows": ({"A": "1"}, {"A-": "2"})}, "rows: 'A-' is not a name of a variable"),
        ({"rows": ({"A": "x" * 60000},) * 80}, "rows hold more than 4 MiB"),
        ({"rows": ({"A": "x" * 65536},)}, "rows: a row and env hold more than 64 KiB together"),
        (
            {"rows": ({"A": "x" * 40000},), "spec": a_spec(env={"B": "x" * 40000})},
            "rows: a row and env hold more than 64 KiB together",
        ),
        ({"targets": (Target("n1", None, (0, 0)),)}, "target 'n1::0,0' names a GPU twice"),
        ({"targets": (Target("n1", -1),)}, "n1: NUMA nodes and GPUs are counted from 0"),
        ({"targets": (Target("n1", None, (-1,)),)}, "n1: NUMA nodes and GPUs are counted from 0"),
        (
            {"targets": (parse_target("n1::0,1"),), "spec": a_spec(gpus=3)},
            "n1: 2 GPUs named, 3 asked for",
        ),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    assert _refusal(replace(FINE, **changes)) == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"array": 1024, "gang": True}, "more than 91 KiB together beside the names of 1024"),
        ({"targets": (Target("n1"),) * 100}, "more than 153 KiB together beside the names of 100"),
        # Nobody is told the names of so many, and nobody of a batch that goes where it likes.
        ({"targets": (Target("n1"),) * 1025}, ""),
        ({"array": 1024}, ""),
    ],
)
def test_the_names_of_machines_need_room_in_an_order(changes: dict[str, Any], words: str) -> None:
    spec = a_spec(command=("x" * 95 * 1024,), env={"A": "x" * 60 * 1024})
    request = replace(FINE, spec=spec, **changes)
    if words:
        assert words in _refusal(request)
    else:
        check_submission(request)


def test_gpus_may_be_counted_and_named_if_both_agree() -> None:
    targets = (parse_target("n1::0,1"),)
    check_submission(replace(FINE, targets=targets, spec=a_spec(gpus=2)))
    check_submission(replace(FINE, targets=targets))


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 1), ({"array": 7}, 7), ({"rows": ({}, {})}, 2), ({"targets": (Target("n1"),)}, 1)],
)
def test_how_many_tasks_a_submission_makes(changes: dict[str, Any], size: int) -> None:
    assert batch_size(replace(FINE, **changes)) == size


@settings(deadline=None)
@given(st.builds(SubmitTask, request_id=REQUEST_IDS, spec=st.builds(TaskSpec, **EVERY_FIELD)))
def test_whatever_comes_is_let_through_or_is_a_bad_request(request: SubmitTask) -> None:
    try:
        check_submission(request)
    except BadRequest:
        return
    else:
        assert 1 <= batch_size(request) <= LARGEST_BATCH


@settings(deadline=None, max_examples=12, phases=[Phase.generate])  # shrinking takes minutes
@given(
    letter=st.sampled_from(["x", "ü", "語", "\N{ROCKET}"]),
    argument=st.integers(0, 300),
    value=st.integers(0, 300),
    shared=st.integers(0, 200),
    told=st.sampled_from([1, 300, 1024]),
)
def test_the_largest_submission_makes_an_order_that_fits_a_frame(
    letter: str, argument: int, value: int, shared: int, told: int
) -> None:
    """Each part is grown as far as it is let through; then comes the largest claim there is."""

    def variables(prefix: str, count: int) -> dict[str, str]:
        return {f"{prefix}{number:x}": letter * value for number in range(count)}

    image = "registry/" + "x" * 240 + ":" + "t" * 128 + "@sha256:" + "0" * 64
    spec = a_spec(
        cores=65536,
        memory=2**53,
        gpus=1024,
        image=image,
        user="u" * 63 + ":" + "g" * 63,
        ulimits=dict.fromkeys(("core", "memlock", "nofile", "nproc", "stack"), (2**62, 2**62)),
        privileged=True,
    )
    gang = replace(FINE, spec=spec, rows=({},) * told, gang=True)

    def grow(change: Callable[[int], dict[str, object]]) -> None:
        nonlocal spec
        spec = _grown(replace(gang, spec=spec), change)

    grow(lambda size: {"env": variables("E", min(size, shared))})
    grow(lambda size: {"mounts": tuple(Mount("/" + letter * size, f"/{n}") for n in range(64))})
    grow(lambda size: {"command": ("x", *[letter * argument] * size)})
    grow(lambda size: {"name": letter * size})
    grow(lambda size: {"workdir": "/" + letter * size})
    grow(lambda size: {"labels": {f"{n:063}": "v" * 63 for n in range(size)}})
    others = gang.rows[1:]
    most = _most(lambda size: replace(gang, spec=spec, rows=(variables("R", size), *others)))
    row = variables("R", most)
    order = OrderStart(
        task=TaskId(2**63 - 1),
        attempt=2**31,
        batch=BatchId(2**63 - 1),
        index=LARGEST_BATCH,
        size=LARGEST_BATCH,
        spec=replace(spec, env={**spec.env, **row}),
        claim=Claim(tuple(range(8192)), 2**53, tuple(f"GPU-{n:036}" for n in range(1024)), 8),
        image=WantedImage(reference=image),
        trusted=True,
        hosts=("h" * LONGEST_HOST,) * told,
    )
    assert 64 * 1024 < len(encode_item(2**32 - 1, order)) < 250 * 1024


def _grown(request: SubmitTask, change: Callable[[int], dict[str, object]]) -> TaskSpec:
    """Make one field of a spec as large as it is let through."""
    spec = request.spec
    most = _most(lambda size: replace(request, spec=replace(spec, **change(size))))
    return replace(spec, **change(most))


def _most(make: Callable[[int], SubmitTask]) -> int:
    """Find the largest size that is let through, if anything is ever refused."""
    too_much = 1
    while too_much < 2**20 and _is_fine(make(too_much)):
        too_much *= 2
    return bisect_left(range(too_much), True, key=lambda size: not _is_fine(make(size))) - 1


@pytest.mark.parametrize("key", ["gpu", "a", "zone/rack-1", "A_b.c", "x" * 63])
def test_a_label_that_can_be_written(key: str) -> None:
    check_labels({key: "", "other": key})


@pytest.mark.parametrize("key", ["", "-x", "x-", "a=b", "a b", "ä", "x" * 64, "a\n"])
def test_a_label_that_cannot(key: str) -> None:
    with pytest.raises(BadRequest, match="cannot be a label"):
        check_labels({key: "v"})


def _is_fine(request: SubmitTask) -> bool:
    try:
        check_submission(request)
    except BadRequest:
        return False
    return True


def _refusal(request: SubmitTask) -> str:
    with pytest.raises(BadRequest) as caught:
        check_submission(request)
    return caught.value.message
