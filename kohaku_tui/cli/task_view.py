"""Tasks as tables and facts.

Knows: which columns a list of tasks has, which facts one task has, in which order.
Does not know: where tasks come from, terminals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from kohaku_tui.cli.table import Cell, Column, Row
from kohaku_tui.format import (
    age,
    command_text,
    exit_text,
    image_text,
    limits_text,
    moment,
    mount_text,
    number_ranges,
    pairs_text,
    run_time,
    state_style,
    task_state,
)
from protocol.models.target import render_target
from protocol.models.task import Change, Claim, Network, NodeVerdict, Task, TaskSpec
from protocol.units import render_duration, render_size

TASK_COLUMNS: Final = (
    Column("ID"),
    Column("STATE"),
    Column("NODE"),
    Column("OWNER", yields=True, spare=4),
    Column("AGE", right=True, spare=2),
    Column("RUN", right=True, spare=1),
    Column("IN", yields=True, spare=5),
    Column("NAME", yields=True, spare=3),
    Column("COMMAND", yields=True),
)

#: Of the tasks of one batch, which share their command.
RESULT_COLUMNS: Final = (
    Column("INDEX", right=True),
    Column("ID"),
    Column("STATE"),
    Column("NODE"),
    Column("EXIT", right=True),
    Column("RUN", right=True, spare=1),
    Column("REASON", yields=True),
)

HISTORY_COLUMNS: Final = (
    Column("WHEN"),
    Column("STATE"),
    Column("ATTEMPT", right=True, spare=3),
    Column("NODE", spare=1),
    Column("ACTOR", yields=True, spare=2),
    Column("CAUSE", yields=True),
)

VERDICT_COLUMNS: Final = (Column("NODE"), Column("FITS"), Column("WHY", yields=True))


def task_row(task: Task, now: float) -> Row:
    """Give a task's row under ``TASK_COLUMNS``."""
    return (
        str(task.id),
        Cell(task_state(task), state_style(task.state)),
        task.node or "-",
        task.owner or "-",
        age(task.created_at, now),
        run_time(task, now),
        image_text(task.spec),
        task.spec.name or "-",
        command_text(task.spec.command),
    )


def result_row(task: Task, now: float) -> Row:
    """Give a task's row under ``RESULT_COLUMNS``."""
    code = task.exit.code if task.exit is not None else None
    return (
        str(task.index),
        str(task.id),
        Cell(task_state(task), state_style(task.state)),
        task.node or "-",
        "-" if code is None else str(code),
        run_time(task, now),
        _why(task) or "-",
    )


def history_row(change: Change) -> Row:
    """Give one step of a task's history as a row under ``HISTORY_COLUMNS``."""
    return (
        moment(change.at),
        Cell(change.state, state_style(change.state)),
        str(change.attempt or "-"),
        change.node or "-",
        change.actor or "-",
        change.cause or "-",
    )


def verdict_rows(verdict: NodeVerdict) -> Iterator[Row]:
    """Give why a node takes a task or not, a row for each reason, under ``VERDICT_COLUMNS``."""
    if verdict.fits_now:
        fits = Cell("now", "green")
    else:
        fits = Cell("later", "yellow") if verdict.could_ever else Cell("never", "red")
    first, *others = verdict.reasons or ("-",)
    yield (verdict.node, fits, first)
    for reason in others:
        yield ("", "", reason)


def task_facts(
    task: Task, now: float, indices: Mapping[str, int] | None = None
) -> list[tuple[str, str | Cell]]:
    """Give everything known about a task but its history. Empty values are not shown.

    ``indices`` are those of its node's GPUs by UUID, as far as they are known.
    """
    place = f"{task.index} of {task.size}" if task.size > 1 else ""
    return [
        ("id", str(task.id)),
        ("name", task.spec.name),
        ("state", Cell(task_state(task), state_style(task.state))),
        ("reason", _why(task)),
        ("ended", _end_text(task)),
        ("oom kills", str(task.exit.oom_kills or "") if task.exit is not None else ""),
        ("owner", task.owner),
        ("batch", str(task.batch)),
        ("index", place),
        ("node", task.node),
        ("attempt", str(task.attempt or "")),
        ("submitted", f"{moment(task.created_at)}, {age(task.created_at, now)} ago"),
        ("started at", moment(task.started_at) if task.started_at else ""),
        ("ended at", moment(task.ended_at) if task.ended_at else ""),
        ("run time", run_time(task, now) if task.started_at else ""),
        ("target", render_target(task.target) if task.target is not None else ""),
        ("after", " ".join(map(str, task.after))),
        ("gang", "begins together with its batch" if task.gang else ""),
        ("retry of", str(task.retry_of or "")),
        *_spec_facts(task.spec),
        *_claim_facts(task.claim, indices or {}),
    ]


def change_line(task: Task) -> str:
    """Say in one line where a task stands, for following its changes."""
    parts = [str(task.id), task_state(task)]
    if task.node:
        parts.append(f"on {task.node}")
    if task.exit is not None:
        parts.append(f"({_end_text(task)})")
    elif why := _why(task):
        parts.append(f"({why})")
    return "  ".join(parts)


def _why(task: Task) -> str:
    """Give the reason of where a task stands, unless its state has said it already."""
    return "" if task.reason == task_state(task) else task.reason


def _end_text(task: Task) -> str:
    return exit_text(task.exit, task.spec.time_limit_s) if task.exit is not None else ""


def _spec_facts(spec: TaskSpec) -> Iterator[tuple[str, str]]:
    yield "command", command_text(spec.command)
    yield "workdir", spec.workdir
    for name, value in sorted(spec.env.items()):
        yield "env", f"{name}={value}"
    yield "cores", str(spec.cores) if spec.cores else "no claim and no limit"
    yield "memory", render_size(spec.memory) if spec.memory else "no claim and no limit"
    yield "gpus", str(spec.gpus or "")
    yield "labels", pairs_text(spec.labels) if spec.labels else ""
    yield "priority", str(spec.priority or "")
    yield "backend", spec.backend
    yield "container", spec.container
    yield "image", spec.image
    for mount in spec.mounts:
        yield "mount", mount_text(mount)
    yield "user", spec.user
    yield "network", "" if spec.network is Network.DEFAULT else str(spec.network)
    yield "shm size", render_size(spec.shm_size) if spec.shm_size else ""
    yield "ulimits", limits_text(spec.ulimits)
    yield "privileged", "yes" if spec.privileged else ""
    yield "grace", render_duration(spec.grace_s)
    yield "time limit", render_duration(spec.time_limit_s) if spec.time_limit_s else ""
    yield "retries", str(spec.retries or "")
    yield "if lost", "tried again elsewhere" if spec.requeue_on_lost else ""


def _claim_facts(claim: Claim | None, indices: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    if claim is None:
        return
    if claim.cores:
        # A bare 0 would read as none.
        numbers = "number" if len(claim.cores) == 1 else "numbers"
        yield "claimed cores", f"{len(claim.cores)}, {numbers} {number_ranges(claim.cores)}"
    yield "claimed memory", render_size(claim.memory) if claim.memory else ""
    for uuid in claim.gpus:
        number = f"GPU {indices[uuid]}, " if uuid in indices else ""
        yield "claimed gpu", number + uuid
    yield "claimed numa", "" if claim.numa is None else f"NUMA node {claim.numa}"
