"""Staying with tasks until they are over: their output, their states, their end.

Knows: when a task has output to follow, how watching and asking fill each other's gaps, when
silence has to be explained, which exit status stands for several tasks.
Does not know: which command wants it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from kohaku_tui.cli import output
from kohaku_tui.cli.log_writer import STDERR, STDOUT, LogWriter, end_notes
from kohaku_tui.format import counts_text, exit_text, plural, task_state
from protocol.errors import KohakuError, NotFound, Unavailable
from protocol.ids import BatchId, TaskId
from protocol.messages.cluster import Topic
from protocol.messages.node import OneNode
from protocol.messages.stream import LogChunk, LogEnd, Source
from protocol.methods import NODE_SHOW
from protocol.models.node import NodeState
from protocol.models.task import Cause, Task, TaskState

if TYPE_CHECKING:
    from protocol.client import Cluster


async def changes(cluster: Cluster, ids: Sequence[TaskId]) -> AsyncGenerator[Task]:
    """Give each task as it stands, then whenever it changed, until all are over.

    Raises:
        NotFound: One of them does not exist.
    """
    left = set(ids)
    for wanted in ids:
        task = await cluster.task(wanted)
        yield task
        if task.state.is_over:
            left.discard(wanted)
    if not left:
        return
    told: set[TaskId] = set()
    async with aclosing(cluster.watch([Topic.TASKS], tasks=sorted(left))) as updates:
        async for update in updates:
            news = [task for task in update.tasks if task.id in left]
            told.update(task.id for task in news)
            if update.ready:
                # One that ended between the question and the watch need not be in its snapshot.
                news += [await cluster.task(wanted) for wanted in sorted(left - told)]
            for task in news:
                yield task
            left -= {task.id for task in news if task.state.is_over}
            if not left:
                return


async def wait_started(cluster: Cluster, task: TaskId, *, after: int = 0) -> Task:
    """Give the task once its program has run, or once it is clear that it never will.

    ``after``: the attempt that is known; a later one is waited for.
    Until then a terminal is told where it stands.
    """
    with output.progress() as tell:
        async with aclosing(changes(cluster, [task])) as steps:
            async for seen in steps:
                if (seen.started_at and seen.attempt > after) or seen.state.is_over:
                    return seen
                where = f" on {seen.node}" if seen.node else f"; why: kohaku task explain {task}"
                tell(f"waiting for task {task}: {task_state(seen)}{where}")
    return await cluster.task(task)


def absence_told(cluster: Cluster, task: TaskId) -> AbstractAsyncContextManager[None]:
    """Say on stderr, while inside, when the node that a task is on or wants is not there."""
    return _meanwhile(_tell_absence(cluster, task))


async def follow_output(cluster: Cluster, ids: Sequence[TaskId]) -> list[Task]:
    """Write the output of tasks as it comes, one task after the other; give how they ended.

    One after the other, because the outputs of two tasks cannot share a stream and stay whole.
    """
    ended = []
    for place, task in enumerate(ids, 1):
        if len(ids) > 1 and output.talks_to_terminal():
            output.note(f"==> task {task}, {place} of {len(ids)}", "bold")
        ended.append(await _follow_one(cluster, task))
    return ended


async def write_logs(writer: LogWriter, items: AsyncIterator[LogChunk | LogEnd]) -> bool:
    """Write what comes until its end; say whether all of it came."""
    whole = True
    try:
        async for item in items:
            if isinstance(item, LogChunk):
                await writer.write(item)
            else:
                whole = not item.error
                for line in end_notes(item):
                    output.note(line)
    finally:
        await writer.finish()
    return whole


async def wait_over(
    cluster: Cluster,
    *,
    ids: Sequence[TaskId] = (),
    batch: BatchId | None = None,
    timeout_s: float | None = None,
) -> list[Task]:
    """Wait until tasks are over, telling a terminal how far they are; give them in order.

    Raises:
        TimedOut: They are not over in time.
        NotFound: One of them does not exist.
    """
    if not output.talks_to_terminal():
        return await _wait(cluster, ids, batch, timeout_s)
    async with _meanwhile(_tell_progress(cluster, ids, batch)):
        return await _wait(cluster, ids, batch, timeout_s)


def exit_status(tasks: Sequence[Task]) -> int:
    """Give the exit status that stands for tasks: the first that is not 0, in their order."""
    return next((status for task in tasks if (status := _status(task))), 0)


def note_ends(tasks: Sequence[Task]) -> None:
    """Tell of tasks that did not end by their own return, for their exit status does not."""
    for task in tasks:
        if task.state is TaskState.LOST:
            output.note(f"task {task.id} is lost: its node {task.node} does not answer")
        elif task.exit is not None and task.exit.cause is not Cause.EXITED:
            said = exit_text(task.exit, task.spec.time_limit_s)
            state = "" if said.startswith(task.state) else f"{task.state}: "
            output.note(f"task {task.id} {state}{said}")
        elif task.exit is None and task.state is not TaskState.COMPLETED:
            output.note(f"task {task.id} {task.state}: {task.reason or 'it never started'}")


def _status(task: Task) -> int:
    if task.state is TaskState.LOST:
        return 1
    if task.exit is None:
        return 0 if task.state is TaskState.COMPLETED else 1
    if task.state is TaskState.COMPLETED:
        return task.exit.status
    # A killed task may have returned 0 on its SIGTERM: that is not success.
    return task.exit.status or 1


async def _wait(
    cluster: Cluster, ids: Sequence[TaskId], batch: BatchId | None, timeout_s: float | None
) -> list[Task]:
    if batch is None:
        return await cluster.wait(ids, timeout_s=timeout_s)
    return await cluster.wait(batch=batch, timeout_s=timeout_s)


async def _tell_progress(cluster: Cluster, ids: Sequence[TaskId], batch: BatchId | None) -> None:
    # Of a batch there may be 100,000: their states are kept, and not the tasks.
    states: dict[TaskId, TaskState] = {}
    last: Task | None = None
    subject = plural(len(ids), "task") if batch is None else f"batch {batch}"
    try:
        with output.progress() as tell:
            tell(f"waiting for {subject}")
            async for update in cluster.watch([Topic.TASKS], tasks=ids, batch=batch):
                if update.start:
                    states.clear()
                states.update((task.id, task.state) for task in update.tasks)
                last = update.tasks[-1] if update.tasks else last
                tell(f"waiting for {subject}: {say_standing(states.values(), last)}")
    except KohakuError:
        return  # progress is a kindness; the wait itself reports what is wrong


def say_standing(states: Collection[TaskState], last: Task | None) -> str:
    """Say where tasks stand: how many in each state, and of a single one how far it is."""
    if last is not None and len(states) == 1:
        return task_state(last)
    return counts_text(Counter(states))


async def _tell_absence(cluster: Cluster, task: TaskId) -> None:
    try:
        seen, said = await cluster.task(task), ""
        async for update in cluster.watch([Topic.TASKS, Topic.EVENTS], tasks=[task]):
            seen = next(iter(update.tasks), seen)
            wanted = seen.node or (seen.target.node if seen.target else "")
            # The diary tells when to look again: it is quieter than a watch of all nodes.
            news = update.ready or update.tasks or any(e.node == wanted for e in update.events)
            if not wanted or not news:
                continue
            node = (await cluster.call(NODE_SHOW, OneNode(wanted))).node
            away = node.state is not NodeState.ONLINE
            line = f"waiting for {wanted}, which is {node.state}" if away else ""
            if line and line != said:
                output.note(line)
            said = line
    except KohakuError:
        return  # a kindness, too


@asynccontextmanager
async def _meanwhile(job: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run a job beside what is inside, and end it with that."""
    import asyncio

    running = asyncio.get_running_loop().create_task(job)
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])  # it takes its line off the terminal


async def _follow_one(cluster: Cluster, task: TaskId) -> Task:
    told = 0
    async with absence_told(cluster, task):
        while True:
            seen = await wait_started(cluster, task, after=told)
            for attempt in await _attempts_since(cluster, seen, told):
                if attempt > 1:
                    output.note(f"task {task}: attempt {attempt}")
                await _follow_attempt(cluster, task, attempt)
            told = seen.attempt
            if seen.state.is_over:
                break
            if not seen.spec.retries and not seen.spec.requeue_on_lost:
                break
    if seen.state.is_final:
        return seen
    return (await cluster.wait([task]))[0]


async def _attempts_since(cluster: Cluster, seen: Task, told: int) -> list[int]:
    """Give the attempts that have begun after the one that is told: none, or one, as a rule.

    A quick one may have been missed. Numbers have gaps: after a restore of the host they go on
    a thousand higher, so its history says which there were.
    """
    # A node without a start: the attempt ended there before it began. Without a node it ended,
    # and the task waited for the next.
    begun = seen.attempt if seen.started_at or not seen.node else seen.attempt - 1
    if begun <= told + 1:
        return [begun] if begun > told else []
    history = (await cluster.task(seen.id)).history
    return sorted({change.attempt for change in history if told < change.attempt <= begun})


async def _follow_attempt(cluster: Cluster, task: TaskId, attempt: int) -> None:
    writer = LogWriter({Source.STDOUT: STDOUT, Source.STDERR: STDERR})
    try:
        await write_logs(writer, cluster.logs(task, follow=True, attempt=attempt))
    except NotFound:
        return  # it was never made, or is forgotten: there is no output to miss
    except Unavailable as reason:
        # Its node may be gone: what became of the task is still to be told.
        output.note(f"the output of task {task} breaks off: {reason.message}")
