"""``kohaku task logs|watch|wait``: commands that stay until something is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.follow import (
    absence_told,
    changes,
    exit_status,
    note_ends,
    wait_over,
    wait_started,
    write_logs,
)
from kohaku_tui.cli.log_writer import STDERR, STDOUT, LogWriter
from kohaku_tui.cli.options import (
    AsJson,
    OnContext,
    OneTaskId,
    TaskIds,
    Timeout,
    read_duration,
    task_id,
    task_ids,
    whole,
)
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.task_view import TASK_COLUMNS, change_line, task_row
from kohaku_tui.document import to_document
from kohaku_tui.format import clock
from protocol.errors import BadRequest
from protocol.ids import BatchId, TaskId
from protocol.messages.stream import Source
from protocol.models.task import Task

if TYPE_CHECKING:
    from rich.text import Text

    from protocol.client import Cluster


def logs(
    task: OneTaskId,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the task is over.")
    ] = False,
    only_stdout: Annotated[bool, typer.Option("--stdout", help="Only its stdout.")] = False,
    only_stderr: Annotated[
        bool, typer.Option("--stderr", help="Only its stderr, written to stdout.")
    ] = False,
    attempt: Annotated[
        int | None,
        typer.Option("--attempt", metavar="N", parser=whole(1), help="Of an earlier launch."),
    ] = None,
    tail: Annotated[
        int | None,
        typer.Option(
            "--tail", metavar="N", parser=whole(1), help="Only the last lines of each output."
        ),
    ] = None,
    context: OnContext = "",
) -> None:
    """Write a task's output.

    Its stdout goes to stdout and its stderr to stderr, unless one of them is chosen.
    On a terminal only text and colours are shown; a file or pipe gets every byte.
    """
    wanted = task_id(task)
    places = _choose_places(only_stdout=only_stdout, only_stderr=only_stderr)

    async def read(cluster: Cluster) -> bool:
        items = cluster.logs(
            wanted, follow=follow, sources=tuple(places), attempt=attempt, tail_lines=tail or 0
        )
        if not follow:
            return await write_logs(LogWriter(places), items)
        async with absence_told(cluster, wanted):
            if attempt is None and not (await wait_started(cluster, wanted)).started_at:
                output.note(f"task {wanted} never started")
                return True
            return await write_logs(LogWriter(places), items)

    with leave_alone([wanted], None, verb="logs -f"):
        whole = ask_cluster(context, read)
    if not whole:
        raise typer.Exit(1)


def watch(tasks: TaskIds, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Follow tasks' states until all are over.

    With --json, one document a line.
    """
    ids = task_ids(tasks)
    show = _watch_lines(as_json=as_json)
    if output.reads_terminal() and not as_json:
        show = _watch_table
    with leave_alone(ids, None, verb="watch"):
        ask_cluster(context, lambda cluster: show(cluster, ids))


def wait(
    tasks: TaskIds,
    timeout: Timeout = None,
    *,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Wait until tasks are over.

    Exits as they did: with the first status that is not 0, in the order given.
    """
    wait_and_exit(task_ids(tasks), None, timeout, as_json=as_json, context=context)


def wait_and_exit(
    ids: Sequence[TaskId],
    batch: BatchId | None,
    timeout: str | None,
    *,
    as_json: bool,
    context: str,
) -> NoReturn:
    """Wait until tasks or a batch are over, and exit with their status.

    Raises:
        Exit: Always.
        TimedOut: They are not over in time.
    """
    timeout_s = None if timeout is None else read_duration("--timeout", timeout)

    async def stay(cluster: Cluster) -> list[Task]:
        return await wait_over(cluster, ids=ids, batch=batch, timeout_s=timeout_s)

    with leave_alone(ids, batch, verb="wait"):
        ended = ask_cluster(context, stay)
    if as_json:
        output.print_document({"tasks": [to_document(task) for task in ended]})
    note_ends(ended)
    raise typer.Exit(exit_status(ended))


@contextmanager
def leave_alone(ids: Sequence[TaskId], batch: BatchId | None, *, verb: str) -> Iterator[None]:
    """Turn Ctrl-C into leaving: the tasks go on, and it says how to come back to them."""
    try:
        yield
    except KeyboardInterrupt:
        note_left(ids, batch, verb=verb)
        raise typer.Exit(130) from None


def note_left(ids: Sequence[TaskId], batch: BatchId | None, *, verb: str) -> None:
    """Say that tasks go on without us, how to come back and how to end them."""
    family, names = ("batch", [batch]) if batch is not None else ("task", list(ids))
    words = " ".join(map(str, names))
    goes_on = f"{family} {words} goes on" if len(names) == 1 else f"{family}s {words} go on"
    output.note("")
    output.note(f"{goes_on} without this command")
    output.note(f"come back:  kohaku {family} {verb} {words}")
    output.note(f"end it:     kohaku {family} kill {words}")


def _choose_places(*, only_stdout: bool, only_stderr: bool) -> dict[Source, int]:
    if only_stdout and only_stderr:
        raise BadRequest(
            "--stdout and --stderr exclude each other", hint="leave both out to get both"
        )
    if only_stdout:
        return {Source.STDOUT: STDOUT}
    if only_stderr:
        return {Source.STDERR: STDOUT}
    return {Source.STDOUT: STDOUT, Source.STDERR: STDERR}


def _watch_lines(*, as_json: bool) -> Callable[[Cluster, Sequence[TaskId]], Awaitable[None]]:
    async def show(cluster: Cluster, ids: Sequence[TaskId]) -> None:
        said: dict[TaskId, str] = {}
        async with aclosing(changes(cluster, ids)) as steps:
            async for task in steps:
                if as_json:
                    output.print_document_line(to_document(task))
                    continue
                line = change_line(task)
                if said.get(task.id) != line:
                    said[task.id] = line
                    output.say(f"{clock(output.now())}  {line}")

    return show


async def _watch_table(cluster: Cluster, ids: Sequence[TaskId]) -> None:
    from rich.console import Console
    from rich.live import Live

    seen: dict[TaskId, Task] = {}
    console = Console(highlight=False)

    def draw() -> Text:
        now = output.now()
        rows = [task_row(task, now) for task in seen.values()]
        return output.draw_table(TASK_COLUMNS, rows, console.width)

    with Live(console=console, get_renderable=draw, refresh_per_second=2) as live:
        async with aclosing(changes(cluster, ids)) as steps:
            async for task in steps:
                seen[task.id] = task
                live.refresh()
