"""``kohaku task``: reading tasks and steering them.

Submitting them and staying with them have modules of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
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
from protocol.errors import KohakuError, NotFound
from protocol.ids import BatchId, TaskId
from protocol.messages.node import OneNode
from protocol.messages.task import OneBatch, SteerResult, TaskPage
from protocol.methods import BATCH_SHOW, NODE_SHOW
from protocol.models.node import NodeState
from protocol.models.task import Explanation, Task, TaskState

if TYPE_CHECKING:
    from protocol.client import Cluster, TaskFilter

_LIVE: Final = tuple(state for state in TaskState if not state.is_final)


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
    *,
    everything: Everything = False,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """List tasks, newest first."""
    only: TaskFilter = {"states": state or (), "node": node, "owner": owner}
    if batch:
        only["batch"] = batch_id(batch)
    if not everything:
        only["most"] = limit + 1  # one more than is shown tells whether there are older ones

    async def look(cluster: Cluster) -> list[Task]:
        listed = [task async for task in cluster.tasks(**only)]
        if not listed and not as_json:
            await _note_unknown(cluster, node, only.get("batch"))
        return listed

    found = tuple(ask_cluster(context, look))
    more = not everything and len(found) > limit
    page = TaskPage(found[:limit] if more else found, more)
    if as_json:
        output.print_document(to_document(page))
        return
    now = output.now()
    output.print_table(TASK_COLUMNS, (task_row(task, now) for task in page.tasks))
    if page.more and output.talks_to_terminal():
        output.note("there are older ones: --limit N or --all", "dim")


def show(task: OneTaskId, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Show everything about a task."""
    wanted = task_id(task)

    async def look(cluster: Cluster) -> tuple[Task, dict[str, int]]:
        found = await cluster.task(wanted)
        return found, {} if as_json else await _gpu_indices(cluster, found)

    answer, indices = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(answer))
        return
    output.print_facts(task_facts(answer, output.now(), indices))
    if answer.history:
        output.say("")
        output.print_table(HISTORY_COLUMNS, map(history_row, answer.history))


def explain(task: OneTaskId, *, as_json: AsJson = False, context: OnContext = "") -> None:
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


def kill(tasks: TaskIds, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """End tasks.

    All their processes get SIGTERM, and SIGKILL after the grace.
    """
    kill_and_tell(task_ids(tasks), None, as_json=as_json, context=context)


def pause(tasks: TaskIds, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Hold running tasks still. They keep what they have claimed."""
    ids = task_ids(tasks)
    tell_steered("pause", ask_cluster(context, lambda c: c.pause(ids)), as_json=as_json)


def resume(tasks: TaskIds, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Let paused tasks go on."""
    ids = task_ids(tasks)
    tell_steered("resume", ask_cluster(context, lambda c: c.resume(ids)), as_json=as_json)


def kill_and_tell(
    ids: Sequence[TaskId], batch: BatchId | None, *, as_json: bool, context: str
) -> None:
    """End tasks or a batch; tell which will not end, and which not yet.

    Raises:
        Exit: With 1, if some will not end.
    """

    async def ask(cluster: Cluster) -> SteerResult:
        result = await cluster.kill(ids, batch=batch)
        if result.asked and not as_json:
            with suppress(KohakuError):  # the kill is ordered, whatever becomes of this
                await _note_delayed(cluster, frozenset(ids), batch)
        return result

    tell_steered("kill", ask_cluster(context, ask), as_json=as_json)


def tell_steered(verb: str, result: SteerResult, *, as_json: bool) -> None:
    """Tell which tasks will not change, and why.

    Raises:
        Exit: With 1, if there are any.
    """
    if as_json:
        output.print_document(to_document(result))
    else:
        for refused, reason in result.refused:
            output.note(f"task {refused}: {reason}")
        if output.talks_to_terminal() and result.asked:
            output.note(f"{verb} asked of {plural(result.asked, 'task')}", "dim")
    if result.refused:
        raise typer.Exit(1)


async def _gpu_indices(cluster: Cluster, task: Task) -> dict[str, int]:
    """Give the indices of a task's GPUs, by UUID: what people call them by."""
    if task.claim is None or not task.claim.gpus:
        return {}
    try:
        node = (await cluster.call(NODE_SHOW, OneNode(task.node))).node
    except KohakuError:
        return {}  # a node that is gone has no indices; the UUIDs say it, too
    return {gpu.uuid: gpu.index for gpu in node.inventory.gpus if gpu.uuid in task.claim.gpus}


async def _note_unknown(cluster: Cluster, node: str, batch: int | None) -> None:
    """Tell of a filter that lets nothing through because it names nothing there is."""
    try:
        if node:
            await cluster.call(NODE_SHOW, OneNode(node))
        if batch is not None:
            await cluster.call(BATCH_SHOW, OneBatch(BatchId(batch)))
    except NotFound as error:
        output.note(error.message)
        if error.hint:
            output.note(error.hint)


async def _note_delayed(cluster: Cluster, ids: Collection[TaskId], batch: BatchId | None) -> None:
    """Tell of tasks whose end has to wait for their node, of those named or of a batch."""
    if (await cluster.status()).nodes.keys() <= {NodeState.ONLINE}:
        return
    for node in await cluster.nodes():
        if node.state is NodeState.ONLINE:
            continue
        only: TaskFilter = {"states": _LIVE, "node": node.name}
        if batch is not None:
            only["batch"] = batch
        asked = [
            task.id
            async for task in cluster.tasks(**only)
            if task.kill_asked and (batch is not None or task.id in ids)
        ]
        if asked:
            what = f"task {asked[0]} ends" if len(asked) == 1 else f"{len(asked)} tasks end"
            output.note(f"{node.name} is {node.state}: {what} when it is back")
