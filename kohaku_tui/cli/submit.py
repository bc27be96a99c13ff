"""``kohaku task submit``: make tasks, and stay with them if asked to."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.complete import complete_environments, complete_nodes, complete_tasks
from kohaku_tui.cli.follow import exit_status, follow_output, note_ends, wait_over
from kohaku_tui.cli.options import AsJson, OnContext, Timeout, read_duration, whole
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.submission import Wish, make_request
from kohaku_tui.cli.wait import note_left
from kohaku_tui.document import render_json, to_document
from protocol.errors import BadRequest, TimedOut
from protocol.ids import TaskId
from protocol.messages.task import LARGEST_BATCH, SubmitTask, Submitted
from protocol.methods import TASK_SUBMIT
from protocol.models.task import Network, Task
from protocol.units import render_duration

if TYPE_CHECKING:
    from protocol.client import Cluster

#: The command's own options follow it: nothing after its first word is ours.
SUBMIT_SETTINGS: Final = {"allow_interspersed_args": False}


def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="The command and its arguments.")
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "-t",
            "--target",
            metavar="TARGET",
            autocompletion=complete_nodes,
            help="Where: node, node:numa, node::gpu,gpu or node:numa:gpu,gpu. "
            "Repeated: one task for each.",
        ),
    ] = None,
    cores: Annotated[
        int,
        typer.Option(
            "-c",
            "--cores",
            metavar="N",
            parser=whole(0),
            help="Whole cores; 0 is no claim and no limit.",
        ),
    ] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--memory",
            metavar="SIZE",
            show_default=False,
            help="Such as 64M or 1.5Gi; none is no claim and no limit.",
        ),
    ] = None,
    gpus: Annotated[
        int, typer.Option("--gpus", metavar="N", parser=whole(0), help="How many GPUs.")
    ] = 0,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="LABEL=VALUE", help="Only nodes with this label."),
    ] = None,
    container: Annotated[
        str,
        typer.Option(
            "--container",
            metavar="ENV",
            autocompletion=complete_environments,
            help="Run it in this environment of the cluster.",
        ),
    ] = "",
    image: Annotated[
        str,
        typer.Option("--image", metavar="REF", help="Run it in this image of a registry."),
    ] = "",
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="What to run it in: docker or process; else what the node has.",
        ),
    ] = "",
    mount: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="SRC:DST[:ro]",
            help="A file or folder of the node to see in the container; may be repeated.",
        ),
    ] = None,
    user: Annotated[
        str,
        typer.Option("--user", metavar="USER[:GROUP]", help="Whom to be in the container."),
    ] = "",
    network: Annotated[
        Network, typer.Option("--network", help="With none it has only its own loopback.")
    ] = Network.DEFAULT,
    shm_size: Annotated[
        str | None,
        typer.Option(
            "--shm-size", metavar="SIZE", show_default="64Mi", help="Of its /dev/shm, such as 1Gi."
        ),
    ] = None,
    ulimit: Annotated[
        list[str] | None,
        typer.Option(
            "--ulimit",
            metavar="NAME=SOFT[:HARD]",
            help="Such as nofile=4096 or memlock=unlimited; may be repeated.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("-e", "--env", metavar="KEY[=VALUE]", help="A variable; without =, yours."),
    ] = None,
    workdir: Annotated[
        str, typer.Option("--workdir", metavar="DIR", help="Where to start; else a scratch folder.")
    ] = "",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="A name for people.")] = "",
    priority: Annotated[
        int, typer.Option("--priority", metavar="N", parser=whole(), help="Higher first.")
    ] = 0,
    grace: Annotated[
        str | None,
        typer.Option(
            "--grace",
            metavar="DURATION",
            show_default="10s",
            help="Between SIGTERM and SIGKILL when it is killed.",
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            "--time-limit",
            metavar="DURATION",
            show_default=False,
            help="Such as 90m or 2h: ended when it has run so long; none is no limit.",
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            "--retries", metavar="N", parser=whole(0), help="New attempts after one that failed."
        ),
    ] = 0,
    after: Annotated[
        list[str] | None,
        typer.Option(
            "--after",
            metavar="ID",
            autocompletion=complete_tasks,
            help="Begin when this task or batch has completed; may be repeated.",
        ),
    ] = None,
    array: Annotated[
        int | None,
        typer.Option(
            "--array",
            metavar="N",
            parser=whole(1, LARGEST_BATCH),
            help="N tasks, told apart by KOHAKU_TASK_INDEX.",
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", metavar="FILE", help="A task for each row of variables, .csv or .json."
        ),
    ] = None,
    *,
    gang: Annotated[
        bool, typer.Option("--gang", help="All tasks of the batch begin together, or none.")
    ] = False,
    requeue_on_lost: Annotated[
        bool,
        typer.Option(
            "--requeue-on-lost",
            help="A new attempt elsewhere if its node is lost; the old one may still run there.",
        ),
    ] = False,
    privileged: Annotated[
        bool,
        typer.Option(
            "--privileged", help="All of the machine's powers; for operators, where nodes allow it."
        ),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the end; exit with the task's own status.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Write its output as it comes; exit as it does.")
    ] = False,
    timeout: Timeout = None,
    request_id: Annotated[
        str | None,
        typer.Option(
            "--request-id",
            metavar="ID",
            help="8 to 64 characters; the same again give the same tasks: makes a repeat safe.",
        ),
    ] = None,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Submit a command; print the ids of its tasks.

    All after -- is the command, flags included: kohaku task submit -c 2 -- make -j2
    """
    request = make_request(
        Wish(
            command=command, request_id=uuid.uuid4().hex if request_id is None else request_id,
            targets=target or (),
            cores=cores, memory=memory, gpus=gpus, backend=backend, env=env or (), name=name,
            priority=priority, array=array, rows=rows, labels=on or (), workdir=workdir,
            grace=grace, after=after or (), gang=gang, time_limit=time_limit, retries=retries,
            requeue_on_lost=requeue_on_lost, container=container, image=image,
            mounts=mount or (), user=user, network=network, shm_size=shm_size,
            ulimits=ulimit or (), privileged=privileged,
        ),
        os.environ,
    )  # fmt: skip
    if timeout is not None and not (wait or follow):
        raise BadRequest("--timeout needs --wait or --follow")
    timeout_s = None if timeout is None else read_duration("--timeout", timeout)
    stay = Stay(request, as_json=as_json, wait=wait, follow=follow, timeout_s=timeout_s)
    try:
        ended = ask_cluster(context, stay.run)
    except KeyboardInterrupt:
        stay.note_left()
        raise typer.Exit(130) from None
    note_ends(ended)
    raise typer.Exit(exit_status(ended))


class Stay:
    """One submission, and staying with its tasks for as long as was asked."""

    def __init__(
        self,
        request: SubmitTask,
        *,
        as_json: bool,
        wait: bool,
        follow: bool,
        timeout_s: float | None,
    ) -> None:
        self._request = request
        self._as_json = as_json
        self._wait = wait
        self._follow = follow
        self._timeout_s = timeout_s
        self._submitted: Submitted | None = None

    async def run(self, cluster: Cluster) -> Sequence[Task]:
        """Submit, print the ids, stay. Gives the tasks that were waited for.

        Raises:
            TimedOut: They are not over in time.
        """
        submitted = await cluster.call(TASK_SUBMIT, self._request)
        self._submitted = submitted
        ids = list(submitted.ids())
        self._print_ids(submitted, ids)
        if self._follow:
            return await self._follow_all(cluster, ids)
        if self._wait:
            batch = submitted.batch if len(ids) > 1 else None
            alone = ids if batch is None else ()
            return await wait_over(cluster, ids=alone, batch=batch, timeout_s=self._timeout_s)
        return ()

    def note_left(self) -> None:
        """Say how to come back to what was submitted, or how to find out whether it was."""
        if self._submitted is None:
            output.note("")
            output.note("interrupted before the host answered: it may have taken the submission")
            output.note(f"to be sure, repeat it with:  --request-id {self._request.request_id}")
            return
        ids = list(self._submitted.ids())
        if not (self._wait or self._follow):
            return
        if len(ids) == 1:
            note_left(ids, None, verb="logs -f" if self._follow else "wait")
        else:
            note_left((), self._submitted.batch, verb="wait")

    def _print_ids(self, submitted: Submitted, ids: Sequence[TaskId]) -> None:
        """Write the ids to stdout, or to stderr where stdout is for the task's own output."""
        text = "\n".join(map(str, ids))
        if self._as_json:
            text = render_json(to_document(submitted))
        tell = output.note if self._follow else output.say
        tell(text)

    async def _follow_all(self, cluster: Cluster, ids: Sequence[TaskId]) -> Sequence[Task]:
        import asyncio

        try:
            async with asyncio.timeout(self._timeout_s):
                return await follow_output(cluster, ids)
        except TimeoutError:
            waited = render_duration(self._timeout_s or 0.0)
            raise TimedOut(
                f"not over after {waited}: task {' '.join(map(str, ids[:3]))}",
                hint="the tasks go on; end them with: kohaku task kill ID",
            ) from None
