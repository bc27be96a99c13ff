"""``kohaku batch``: tasks that were submitted together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.options import (
    AsJson,
    Everything,
    Limit,
    OnContext,
    OneBatchId,
    Timeout,
    batch_id,
    whole,
)
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.table import Column, Row
from kohaku_tui.cli.task import kill_and_tell
from kohaku_tui.cli.task_view import RESULT_COLUMNS, result_row
from kohaku_tui.cli.wait import wait_and_exit
from kohaku_tui.document import to_document
from kohaku_tui.format import age, counts_text, moment
from protocol.ids import BatchId, TaskId
from protocol.messages.task import BatchPage, ListBatches, ListTasks, OneBatch, TaskPage
from protocol.methods import BATCH_LIST, BATCH_SHOW, TASK_LIST
from protocol.models.task import Batch, Task, TaskState

if TYPE_CHECKING:
    from protocol.client import Cluster

#: What one answer of the host may hold.
_PAGE: Final = 500
#: Tasks that people are shown of a batch, unless they ask for more.
_SHOWN: Final = 50

_COLUMNS: Final = (
    Column("ID"),
    Column("TASKS", right=True),
    Column("OWNER", yields=True, spare=3),
    Column("AGE", right=True, spare=1),
    Column("NAME", yields=True, spare=2),
    Column("STATES", yields=True),
)


def list_batches(
    owner: Annotated[str, typer.Option("--owner", metavar="USER", help="Only theirs.")] = "",
    limit: Limit = 50,
    *,
    everything: Everything = False,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """List batches, newest first."""
    most = None if everything else limit
    page = ask_cluster(context, lambda cluster: _gather(cluster, owner, most))
    if as_json:
        output.print_document(to_document(page))
        return
    now = output.now()
    output.print_table(_COLUMNS, (_row(batch, now) for batch in page.batches))
    if page.more and output.talks_to_terminal():
        output.note("there are older ones: --limit N or --all", "dim")


def show(
    batch: OneBatchId,
    state: Annotated[
        list[TaskState] | None,
        typer.Option("--state", help="Only its tasks in this state; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            parser=whole(1),
            show_default="50, with --json all",
            help="How many of its tasks at most.",
        ),
    ] = None,
    *,
    everything: Everything = False,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Show a batch and what became of each of its tasks, in their order."""
    wanted = batch_id(batch)
    most = None if everything or (as_json and limit is None) else limit or _SHOWN

    async def look(cluster: Cluster) -> tuple[Batch, TaskPage]:
        answer = await cluster.call(BATCH_SHOW, OneBatch(wanted))
        return answer.batch, await _gather_tasks(cluster, wanted, tuple(state or ()), most)

    answer, page = ask_cluster(context, look)
    if as_json:
        output.print_document({**to_document(answer), **to_document(page)})
        return
    now = output.now()
    output.print_facts(
        [
            ("id", str(answer.id)),
            ("name", answer.name),
            ("owner", answer.owner),
            ("submitted", f"{moment(answer.created_at)}, {age(answer.created_at, now)} ago"),
            ("tasks", f"{answer.size}: {counts_text(answer.states)}"),
        ]
    )
    output.say("")
    output.print_table(RESULT_COLUMNS, (result_row(task, now) for task in page.tasks))
    if page.more and output.talks_to_terminal():
        output.note("there are more: --limit N, --all or --state failed", "dim")


def wait(
    batch: OneBatchId, timeout: Timeout = None, *, as_json: AsJson = False, context: OnContext = ""
) -> None:
    """Wait until a batch is over.

    Exits as its tasks did: with the first status that is not 0, in their order.
    """
    wait_and_exit((), batch_id(batch), timeout, as_json=as_json, context=context)


def kill(batch: OneBatchId, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """End all tasks of a batch that are not over."""
    kill_and_tell((), batch_id(batch), as_json=as_json, context=context)


async def _gather_tasks(
    cluster: Cluster, batch: BatchId, states: tuple[TaskState, ...], most: int | None
) -> TaskPage:
    """Give at most so many tasks of a batch, the first ones."""
    tasks: list[Task] = []
    more = True
    while more and (most is None or len(tasks) < most):
        limit = _PAGE if most is None else min(_PAGE, most - len(tasks))
        after = tasks[-1].id if tasks else TaskId(0)
        wanted = ListTasks(states=states, batch=batch, after=after, limit=limit)
        page = await cluster.call(TASK_LIST, wanted)
        tasks += page.tasks
        more = page.more and bool(page.tasks)
    return TaskPage(tuple(tasks), more)


async def _gather(cluster: Cluster, owner: str, most: int | None) -> BatchPage:
    batches: list[Batch] = []
    more = True
    while more and (most is None or len(batches) < most):
        limit = _PAGE if most is None else min(_PAGE, most - len(batches))
        before = batches[-1].id if batches else None
        wanted = ListBatches(owner=owner, before=before, limit=limit)
        page = await cluster.call(BATCH_LIST, wanted)
        batches += page.batches
        more = page.more and bool(page.batches)
    return BatchPage(tuple(batches), more)


def _row(batch: Batch, now: float) -> Row:
    return (
        str(batch.id),
        str(batch.size),
        batch.owner or "-",
        age(batch.created_at, now),
        batch.name or "-",
        counts_text(batch.states),
    )
