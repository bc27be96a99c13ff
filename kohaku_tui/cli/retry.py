"""``kohaku task retry``: trying tasks again that were lost or did not complete.

Knows: that an id may be a task's or a batch's, and that one that is refused must not keep the
others from being tried, nor keep back the ids of what was made for them.
Does not know: what is tried again and how; the host says.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.options import AsJson, OnContext, TaskIds, task_ids
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.document import Plain
from protocol.errors import KohakuError, NotFound
from protocol.ids import TaskId
from protocol.messages.task import Retried

if TYPE_CHECKING:
    from protocol.client import Cluster


def retry(tasks: TaskIds, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Try tasks again that are lost or ended without completing; print the ids to look at.

    A lost task gets a new attempt. One that ended keeps its end, so it is made anew: the
    same command and place in its batch, under a new id. The id of a batch stands for all
    its tasks.
    """
    names = task_ids(tasks)
    answers: list[tuple[TaskId, Retried | KohakuError]] = []

    async def ask(cluster: Cluster) -> None:
        for name in names:
            said = await _try_again(cluster, name)
            answers.append((name, said))
            _tell(said, as_json=as_json)

    try:
        ask_cluster(context, ask)
    finally:
        # Also when the cluster goes away half way: these have been made.
        if as_json and answers:
            output.print_document({"retried": [_to_document(*answer) for answer in answers]})
    if any(isinstance(said, KohakuError) for _, said in answers):
        raise typer.Exit(1)


async def _try_again(cluster: Cluster, name: TaskId) -> Retried | KohakuError:
    request_id = uuid.uuid4().hex
    try:
        try:
            return await cluster.retry(name, request_id=request_id)
        except NotFound:
            return await _try_batch_again(cluster, name, request_id)
    except KohakuError as error:
        # Status 1 is the cluster's word on this one; what else there is would meet the next, too.
        if error.exit_status != 1:
            raise
        return error


async def _try_batch_again(cluster: Cluster, name: TaskId, request_id: str) -> Retried:
    try:
        return await cluster.retry(batch=name, request_id=request_id)
    except NotFound:
        raise NotFound(
            f"there is no task or batch {name}", hint="see: kohaku task list, kohaku batch list"
        ) from None


def _tell(said: Retried | KohakuError, *, as_json: bool) -> None:
    if as_json:
        return  # refusals are in the document, as those of a kill are
    if isinstance(said, KohakuError):
        output.show_error(said, as_json=False)
    else:
        new = said.submitted.ids() if said.submitted is not None else ()
        for task in (*said.requeued, *new):
            output.say(str(task))


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
