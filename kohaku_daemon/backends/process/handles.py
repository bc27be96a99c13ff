"""From a handle to a launch's record, and what is done with that before anything runs.

Knows: how a launch is named, how a launch that never began is kept from beginning.
Does not know: what runs.
"""

from __future__ import annotations

import os
import re
from typing import Final

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.process.record import Record, give_up, make_record, read_record
from kohaku_daemon.core.workload import Handle

_NAME: Final = re.compile(r"(\d+)-(\d+)-([0-9a-f]{16})")


def name_launch(handle: Handle) -> str:
    """Give the name of a launch's record, ``TASK-ATTEMPT-PLAN``.

    Raises:
        BackendFailed: It is no handle of ours.
    """
    try:
        task, attempt = int(handle.data["task"]), int(handle.data["attempt"])
        return f"{task}-{attempt}-{int(str(handle.data['plan']), 16):016x}"
    except (KeyError, ValueError) as error:
        raise BackendFailed(f"this is no handle of the process backend: {handle.data}") from error


def find_handle(name: str) -> Handle | None:
    """Give the handle of a launch by the name of its record; None if it is no launch's.

    It does for all but ``adopt``, which needs the boot of the machine, too.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        return None
    task, attempt, plan = parts.groups()
    return Handle(
        backend="process", data={"task": int(task), "attempt": int(attempt), "plan": plan}
    )


def is_there(path: str) -> bool:
    """Say whether a launch has a record: not, if it was removed."""
    return os.path.lexists(path)


def try_give_up(path: str) -> Record:
    """Decide that a launch never starts, unless a keeper was faster; give what is recorded.

    Of a launch without a record that is nothing, and nobody can take it.

    Raises:
        BackendFailed: The record cannot be used.
    """
    try:
        give_up(path)
        return read_record(path)
    except FileNotFoundError:
        return Record()
    except OSError as error:
        raise BackendFailed(f"cannot use {path}: {error.strerror}") from error


def prepare(path: str) -> None:
    """Make the record of a launch, if there is none.

    Raises:
        BackendFailed: That is not possible.
    """
    try:
        make_record(path)
    except OSError as error:
        raise BackendFailed(f"cannot use {path}: {error.strerror}") from error
