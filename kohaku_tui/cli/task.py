"""``kohaku task``: reading tasks and steering them. Submitting and waiting have their own modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.complete import complete_batches, complete_nodes
from kohaku_tui.cli.options import (
    AsJson,
    Everything,
    Limit,
    OnContext,
    OneTaskId,
    TaskIds,
    batch_id,
    task_id,
    task_ids,
)
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.task_view import (
    HISTORY_COLUMNS,
    TASK_COLUMNS,
    VERDICT_COLUMNS,
    history_row,
    task_facts,
    task_row,
    verdict_rows,
)
from kohaku_tui.document import to_document
from kohaku_tui.format import plural
from protocol.errors import BadRequest
from protocol.ids import BatchId
from protocol.messages.task import ListTasks, SteerResult, SteerTasks, TaskPage
from protocol.methods import TASK_KILL, TASK_LIST, TASK_PAUSE, TASK_RESUME, Method
from protocol.models.task import Explanation, Task, TaskState

if TYPE_CHECKING:
    from protocol.client import Cluster

#: What one answer of the host may hold (``ListTasks.limit``).
_PAGE: Final = 500
#: What one steering call may name (``SteerTasks``).
_NAMES: Final = 1000


def list_tasks(
    state: Annotated[
        list[TaskState] | None,
        typer.Option("--state", help="Only tasks in this state; may be repeated."),
    ] = None,
    node: Annotated[
        str,
        typer.Option(
            "--node", metavar="NODE", help="Only tasks on this node.", autocompletion=complete_nodes
        ),
    ] = "",
    owner: Annotated[str, typer.Option("--owner", metavar="USER", help="Only their tasks.")] = "",
    batch: Annotated[
        str,
        typer.Option(
            "--batch", metavar="ID", help="Only this batch.", autocompletion=complete_batches
        ),
    ] = "",
    limit: Limit = 50,
    everything: Everything = False,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """List tasks, newest first."""
    wanted = ListTasks(
        states=tuple(state or ()), node=node, owner=owner, batch=batch_id(batch) if batch else None
    )
    most = None if everything else limit

    async def look(cluster: Cluster) -> TaskPage:
        return await gather_tasks(cluster, wanted, most)

    page = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(page))
        return
    now = output.now()
    output.print_table(TASK_COLUMNS, (task_row(task, now) for task in page.tasks))
    if page.more and output.talks_to_terminal():
        output.note("there are older ones: --limit N or --all", "dim")


async def gather_tasks(cluster: Cluster, wanted: ListTasks, most: int | None) -> TaskPage:
    """Read pages of tasks until ``most`` are there, or all; None is all."""
    from msgspec.structs import replace

    tasks: list[Task] = []
    more = True
    while more and (most is None or len(tasks) < most):
        limit = _PAGE if most is None else min(_PAGE, most - len(tasks))
        before = tasks[-1].id if tasks else None
        page = await cluster.call(TASK_LIST, replace(wanted, before=before, limit=limit))
        tasks += page.tasks
        more = page.more and bool(page.tasks)
    return TaskPage(tuple(tasks), more)


def show(task: OneTaskId, as_json: AsJson = False, context: OnContext = "") -> None:
    """Show everything about a task, and how it came to be where it is."""
    wanted = task_id(task)

    async def look(cluster: Cluster) -> Task:
        return await cluster.task(wanted)

    answer = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(answer))
        return
    output.print_facts(task_facts(answer, output.now()))
    if answer.history:
        output.say("")
        output.print_table(HISTORY_COLUMNS, map(history_row, answer.history))


def explain(task: OneTaskId, as_json: AsJson = False, context: OnContext = "") -> None:
    """Say why a task is where it is, node by node."""
    wanted = task_id(task)

    async def look(cluster: Cluster) -> Explanation:
        return await cluster.explain(wanted)

    answer = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(answer))
        return
    output.say(f"task {answer.task} is {answer.state}: {answer.summary}")
    if answer.ahead:
        output.say(f"{plural(answer.ahead, 'task')} before it in the queue")
    if answer.nodes:
        output.say("")
        rows = (row for verdict in answer.nodes for row in verdict_rows(verdict))
        output.print_table(VERDICT_COLUMNS, rows)


def kill(tasks: TaskIds, as_json: AsJson = False, context: OnContext = "") -> None:
    """End tasks: SIGTERM to all their processes, then SIGKILL after their grace."""
    steer(TASK_KILL, tasks, None, context=context, as_json=as_json)


def pause(tasks: TaskIds, as_json: AsJson = False, context: OnContext = "") -> None:
    """Hold running tasks still. They keep what they have claimed."""
    steer(TASK_PAUSE, tasks, None, context=context, as_json=as_json)


def resume(tasks: TaskIds, as_json: AsJson = False, context: OnContext = "") -> None:
    """Let paused tasks go on."""
    steer(TASK_RESUME, tasks, None, context=context, as_json=as_json)


def steer(
    method: Method[SteerTasks, SteerResult],
    tasks: Sequence[str],
    batch: BatchId | None,
    *,
    context: str,
    as_json: bool,
) -> None:
    """Ask for a change of tasks, or of a whole batch, and tell which were refused and why.

    Raises:
        Exit: With 1, if any was refused.
    """
    names = task_ids(tasks)
    if len(names) > _NAMES:
        raise BadRequest(f"{len(names)} ids at once", hint=f"give {_NAMES} at most, or a batch")

    async def ask(cluster: Cluster) -> SteerResult:
        return await cluster.call(method, SteerTasks(tasks=tuple(names), batch=batch))

    result = ask_cluster(context, ask)
    if as_json:
        output.print_document(to_document(result))
    else:
        for refused, reason in result.refused:
            output.note(f"task {refused}: {reason}")
        if output.talks_to_terminal() and result.asked:
            verb = method.name.rpartition(".")[2]
            output.note(f"{verb} asked of {plural(result.asked, 'task')}", "dim")
    if result.refused:
        raise typer.Exit(1)
