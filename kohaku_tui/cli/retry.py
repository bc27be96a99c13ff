"""``kohaku task retry``: trying tasks again that were lost or did not complete.

Knows: that an id may be a task's or a batch's, and that one that is refused must not keep the
others from being tried.
Does not know: what is tried again and how; the host says.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.options import AsJson, OnContext, TaskIds, task_ids
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.document import Plain
from protocol.errors import Conflict, Forbidden, KohakuError, NotFound
from protocol.ids import TaskId
from protocol.messages.task import Retried

if TYPE_CHECKING:
    from protocol.client import Cluster

#: The cluster's word on one of several; the others may still be granted.
_REFUSED: Final = (NotFound, Conflict, Forbidden)


def retry(tasks: TaskIds, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Try tasks again that are lost or ended without completing; print the ids to look at.

    A lost task gets a new attempt. One that ended keeps its end, so it is made anew: the
    same command and place in its batch, under a new id. The id of a batch stands for all
    its tasks.
    """
    names = task_ids(tasks)

    async def ask(cluster: Cluster) -> list[tuple[TaskId, Retried | KohakuError]]:
        return [(name, await _try_again(cluster, name)) for name in names]

    answers = ask_cluster(context, ask)
    if as_json:
        output.print_document({"retried": [_to_document(name, said) for name, said in answers]})
    for _, said in answers:
        if isinstance(said, KohakuError):
            output.show_error(said, as_json=False)
        elif not as_json:
            for task in _list_ids(said):
                output.say(str(task))
    if any(isinstance(said, KohakuError) for _, said in answers):
        raise typer.Exit(1)


async def _try_again(cluster: Cluster, name: TaskId) -> Retried | KohakuError:
    request_id = uuid.uuid4().hex
    try:
        try:
            return await cluster.retry(name, request_id=request_id)
        except NotFound:
            return await cluster.retry(batch=name, request_id=request_id)
    except _REFUSED as error:
        return error


def _list_ids(said: Retried) -> list[TaskId]:
    return [*said.requeued, *(said.submitted.ids() if said.submitted is not None else ())]


def _to_document(name: TaskId, said: Retried | KohakuError) -> Plain:
    if isinstance(said, KohakuError):
        return {"id": str(name), "tasks": [], "requeued": [], "error": said.message}
    new = [] if said.submitted is None else [str(task) for task in said.submitted.ids()]
    return {
        "id": str(name),
        "tasks": list(new),
        "requeued": [str(task) for task in said.requeued],
        "error": "",
    }
