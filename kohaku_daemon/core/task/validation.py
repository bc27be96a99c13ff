"""A submission that makes no sense, and why.

Knows: what every request must look like, whatever the cluster has. Sizes are bounded here
so that no single request is dear to keep, and that each of its orders fits into one frame of
256 KiB: at most 176 KiB of a spec with its image and the names of its batch's machines, and
69 KiB of a claim of 8192 cores (the largest NR_CPUS of Linux) and 1024 GPUs.
Does not know: nodes; whether it fits somewhere is placement's question. Containers have a
module of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from kohaku_daemon.core.task.containers import LONGEST_PATH, check_container, texts
from protocol.errors import BadRequest
from protocol.messages.task import LARGEST_BATCH, SubmitTask
from protocol.models.target import Target, render_target
from protocol.models.task import TaskSpec

#: Linux refuses a single argument above 128 KiB (MAX_ARG_STRLEN, man execve).
_LARGEST_COMMAND: Final = 96 * 1024
#: Of one task: of ``env`` and its row together.
_LARGEST_ENV: Final = 64 * 1024
_LARGEST_MOUNTS: Final = 16 * 1024
#: Of what these three have together in one order, with the names of machines.
_LARGEST_WHOLE: Final = 160 * 1024
_LARGEST_ROWS: Final = 4 * 1024 * 1024
_MOST_LABELS: Final = 64
#: What MessagePack writes before a text, at most. Counted with each, or a command of nothing
#: but empty arguments would have no size.
_HEADER: Final = 5
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{8,64}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LABEL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_LONGEST_TIME_LIMIT_S: Final = 10 * 366 * 86400.0
_MOST_RETRIES: Final = 100
_MOST_AWAITED: Final = 100
_LARGEST_GANG: Final = 1024
#: Machines of a batch whose names its tasks are told; of larger batches they are told none.
MOST_HOSTS: Final = 1024
#: HOST_NAME_MAX of Linux. No node's name is longer.
LONGEST_HOST: Final = 64
_PRIORITIES: Final = range(-1000, 1001)


def check_submission(request: SubmitTask) -> None:
    """Refuse what no cluster could carry out.

    Raises:
        BadRequest: Naming the field.
    """
    check_request_id(request.request_id)
    shapes = [bool(request.targets), request.array != 0, bool(request.rows)]
    if sum(shapes) > 1:
        raise BadRequest(
            "targets, array and rows were given together",
            hint="choose one: a task per target, numbered tasks, or a task per row",
        )
    if not (
        0 <= request.array <= LARGEST_BATCH
        and len(request.rows) <= LARGEST_BATCH
        and len(request.targets) <= LARGEST_BATCH
    ):
        raise BadRequest(f"a batch has 1 to {LARGEST_BATCH} tasks")
    _check_spec(request.spec)
    _check_order(request)
    largest_row = _check_rows(request.rows, request.spec.env)
    _check_whole(request, largest_row)
    for target in dict.fromkeys(request.targets):  # many tasks, and few nodes
        _check_target(target, request.spec)


def check_request_id(request_id: str) -> None:
    """Refuse what cannot name a request.

    Raises:
        BadRequest: It is too short, too long or has other characters.
    """
    if not _REQUEST_ID.fullmatch(request_id):
        raise BadRequest("request_id must be 8 to 64 printable characters without spaces")


def batch_size(request: SubmitTask) -> int:
    """Say how many tasks a checked request makes."""
    return len(request.targets) or request.array or len(request.rows) or 1


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse labels that could not be written on a command line or be matched.

    Raises:
        BadRequest: Naming the label.
    """
    for key, value in labels.items():
        if not _LABEL.fullmatch(key) or (value and not _LABEL.fullmatch(value)):
            raise BadRequest(
                f"{key}={value} cannot be a label",
                hint="use up to 63 letters, digits, dots, slashes, underscores and hyphens",
            )


def _check_spec(spec: TaskSpec) -> None:
    if not spec.command or not spec.command[0]:
        raise BadRequest("there is no command", hint="put it after --: kohaku task submit -- date")
    if any("\0" in part for part in spec.command):
        raise BadRequest("the command contains a NUL character")
    if sum(map(_size, spec.command)) > _LARGEST_COMMAND:
        raise BadRequest("the command is longer than 96 KiB", hint="put it into a script")
    if len(spec.name) > 128 or not spec.name.isprintable():
        raise BadRequest("name must be at most 128 printable characters")
    _check_variables("env", spec.env)
    if _size_of_env(spec.env) > _LARGEST_ENV:
        raise BadRequest("env holds more than 64 KiB", hint="put large values into files")
    if len(spec.labels) > _MOST_LABELS:
        raise BadRequest(f"a task may ask for {_MOST_LABELS} labels, not {len(spec.labels)}")
    check_labels(spec.labels)
    if len(spec.backend) > 64 or not spec.backend.isprintable():
        raise BadRequest("backend must be at most 64 printable characters")
    if _bytes(spec.workdir) > LONGEST_PATH:
        raise BadRequest(f"workdir is longer than {LONGEST_PATH} bytes")
    if spec.workdir and (not spec.workdir.startswith("/") or "\0" in spec.workdir):
        raise BadRequest(f"workdir {spec.workdir!r} is not an absolute path")
    if not 0 <= spec.cores <= 65536:
        raise BadRequest(f"cores must be 0 to 65536, not {spec.cores}")
    if not 0 <= spec.memory <= 2**53:
        raise BadRequest(f"memory must be 0 or more bytes, not {spec.memory}")
    check_container(spec)
    if _size_of_mounts(spec) > _LARGEST_MOUNTS:
        raise BadRequest("mounts hold more than 16 KiB", hint="mount the folder that these are in")
    if 0 < spec.memory < 2**20:
        raise BadRequest(
            f"memory of {spec.memory} bytes is less than 1 MiB", hint="sizes take K, M, G: -m 64M"
        )
    if not 0 <= spec.gpus <= 1024:
        raise BadRequest(f"gpus must be 0 to 1024, not {spec.gpus}")
    if spec.priority not in _PRIORITIES:
        raise BadRequest(f"priority must be -1000 to 1000, not {spec.priority}")
    if not 0 <= spec.grace_s <= 3600:
        raise BadRequest(f"grace must be 0 to 3600 seconds, not {_plain(spec.grace_s)}")
    if not (spec.time_limit_s == 0 or 1 <= spec.time_limit_s <= _LONGEST_TIME_LIMIT_S):
        limit = _plain(spec.time_limit_s)
        raise BadRequest(
            f"time limit must be 1 second to 10 years, or 0 for none, not {limit} s",
            hint="times take s, m, h, d: --time-limit 90m",
        )
    if not 0 <= spec.retries <= _MOST_RETRIES:
        raise BadRequest(f"retries must be 0 to {_MOST_RETRIES}, not {spec.retries}")


def _check_order(request: SubmitTask) -> None:
    if len(request.after) > _MOST_AWAITED:
        raise BadRequest(
            f"after names {len(request.after)} tasks; at most {_MOST_AWAITED}",
            hint="submit those as one batch and name the batch",
        )
    if not request.gang:
        return
    if batch_size(request) > _LARGEST_GANG:
        raise BadRequest(f"a gang has at most {_LARGEST_GANG} tasks, not {batch_size(request)}")
    if request.spec.retries or request.spec.requeue_on_lost:
        raise BadRequest(
            "the tasks of a gang begin together, so none of them is tried again by itself",
            hint="leave out --retries and --requeue-on-lost; later: kohaku task retry BATCH",
        )


def _check_target(target: Target, spec: TaskSpec) -> None:
    if (target.numa or 0) < 0 or any(index < 0 for index in target.gpus):
        raise BadRequest(f"{target.node}: NUMA nodes and GPUs are counted from 0")
    if len(set(target.gpus)) != len(target.gpus):
        raise BadRequest(f"target {render_target(target)!r} names a GPU twice")
    if target.gpus and spec.gpus not in {0, len(target.gpus)}:
        raise BadRequest(
            f"{target.node}: {len(target.gpus)} GPUs named, {spec.gpus} asked for",
            hint="leave out --gpus when the target names them",
        )


def _check_rows(rows: Sequence[Mapping[str, str]], env: Mapping[str, str]) -> int:
    """Check each row and all of them together; give the size of the largest."""
    room = _LARGEST_ENV - _size_of_env(env)
    total = largest = 0
    for row in rows:
        _check_variables("rows", row)
        size = _size_of_env(row)
        if size > room:
            raise BadRequest(
                "rows: a row and env hold more than 64 KiB together",
                hint="put large values into files",
            )
        total += size
        largest = max(largest, size)
    if total > _LARGEST_ROWS:
        raise BadRequest("rows hold more than 4 MiB", hint="put large values into files")
    return largest


def _check_whole(request: SubmitTask, largest_row: int) -> None:
    """Keep what may be large in an order small enough together."""
    spec = request.spec
    size = sum(map(_size, spec.command)) + _size_of_env(spec.env) + largest_row
    size += _size_of_mounts(spec)
    told = batch_size(request) if request.gang or request.targets else 0
    hosts = told * (_HEADER + LONGEST_HOST) if told <= MOST_HOSTS else 0
    if size > _LARGEST_WHOLE - hosts:
        beside = f" beside the names of {told} machines" if hosts else ""
        raise BadRequest(
            f"command, env and mounts hold more than {(_LARGEST_WHOLE - hosts) // 1024} KiB"
            f" together{beside}",
            hint="put the command into a script and large values into files",
        )


def _check_variables(field: str, env: Mapping[str, str]) -> None:
    for key, value in env.items():
        if not _VARIABLE.fullmatch(key):
            raise BadRequest(f"{field}: {key!r} is not a name of a variable")
        if key.startswith("KOHAKU_"):
            raise BadRequest(f"{field}: {key} is set by the cluster", hint="choose another name")
        if "\0" in value:
            raise BadRequest(f"{field}: the value of {key} contains a NUL character")


def _plain(number: float) -> str:
    """Write a number as people do: 8553600, where ``g`` would write 8.5536e+06."""
    return f"{number:.15g}"


def _size_of_env(env: Mapping[str, str]) -> int:
    return sum(_size(key) + _size(value) for key, value in env.items())


def _size_of_mounts(spec: TaskSpec) -> int:
    return sum(map(_size, texts(spec)))


def _size(text: str) -> int:
    """Give the bytes it takes in an order, or a few more."""
    return _HEADER + _bytes(text)


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))
