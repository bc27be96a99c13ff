"""Tasks and batches: submitting, reading, waiting, steering."""

from __future__ import annotations

import asyncio
import hashlib
from itertools import islice
from typing import Final, cast

import msgspec
from msgspec.structs import replace

from kohaku_daemon.core.access.permissions import may_see_contents, may_steer
from kohaku_daemon.core.cluster.ended import EndedTasks
from kohaku_daemon.core.cluster.events import (
    RetryAsked,
    SteerAsked,
    SubmitAsked,
    Verb,
    WholeAsked,
)
from kohaku_daemon.core.cluster.views import describe, explain_task, redact_task, view_task
from kohaku_daemon.host.handlers.rows import (
    batch_records,
    brief_rows,
    fit,
    known_batch,
    no_batch,
    stored_task,
)
from kohaku_daemon.host.parts import Call, Parts
from protocol.errors import BadRequest, Forbidden, NotFound
from protocol.ids import BatchId, TaskId
from protocol.messages.stream import OpenLogs, Ticket
from protocol.messages.task import (
    BatchPage,
    BatchResult,
    ExplainResult,
    ListBatches,
    ListTasks,
    OneBatch,
    OneTask,
    Retried,
    RetryTask,
    SteerResult,
    SteerTasks,
    SubmitTask,
    Submitted,
    TaskPage,
    TaskResult,
    WaitResult,
    WaitTasks,
)
from protocol.models.task import Explanation, TaskState

_MOST_NAMES: Final = 1000
#: How often what has just ended is looked up again, until the store knows of its end.
_LOOKS: Final = 5
#: Ended tasks that are read in one go, some 2 ms: a batch may have 100,000.
_LOOKED_AT: Final = 500


async def submit(call: Call, params: SubmitTask) -> Submitted:
    """Make tasks."""
    user = call.actor.user
    earlier = None
    if (user, params.request_id) not in call.parts.state.by_request:
        earlier = call.parts.store.by_request(user, params.request_id)
    known = await _known_states(call.parts, params.after)
    digest = _digest(params)
    asked = SubmitAsked(call.actor, params, digest, earlier, known)
    return cast("Submitted", await call.ask(asked))


async def retry(call: Call, params: RetryTask) -> Retried:
    """Try tasks again."""
    parts = call.parts
    if (params.batch is None) == (params.task is None):
        raise BadRequest("name either a task or a batch")
    if params.batch is not None:
        source = await known_batch(parts, params.batch)
    else:
        task = await stored_task(parts, cast("TaskId", params.task))
        source = batch_records(parts, [task.batch])[task.batch]
    if not may_steer(call.actor, source.owner):
        raise Forbidden(f"the tasks of batch {source.id} belong to somebody else")
    await _made_whole(parts, source.id)
    await parts.loop.settled()
    ended = EndedTasks(params.request_id)
    named = iter((params.task,)) if params.task is not None else source.ids()
    while some := tuple(islice(named, _LOOKED_AT)):
        ended.take(parts.store.ended(some))
        await asyncio.sleep(0)
    request_key = (source.owner, params.request_id)
    held = request_key in parts.state.by_request
    asked = RetryAsked(
        call.actor,
        params.request_id,
        _digest(params),
        source,
        params.task,
        ended,
        earlier=None if held else parts.store.by_request(*request_key),
    )
    return cast("Retried", await call.ask(asked))


async def _made_whole(parts: Parts, batch: BatchId) -> None:
    """Wait until all tasks of a batch are made, if it is being made at present."""
    live = parts.state.batches.get(batch)
    if live is not None and live.folded:
        await parts.loop.ask(WholeAsked(batch))


def _digest(params: SubmitTask | RetryTask) -> bytes:
    """Give what tells a request from another that uses the same id."""
    words = msgspec.msgpack.encode(replace(params, request_id=""), order="deterministic")
    return hashlib.sha3_256(words).digest()


async def _known_states(parts: Parts, after: tuple[int, ...]) -> dict[int, TaskState]:
    """Give how tasks and batches stand that are to be waited for, as the store has them.

    What is live in memory is left out. What ended a moment ago is waited for to be stored.
    """
    known: dict[int, TaskState] = {}
    for _ in range(_LOOKS if after else 0):
        await parts.loop.settled()
        # From here to the engine nothing is waited for, so nothing ends in between.
        ended = [name for name in dict.fromkeys(after) if name not in parts.state.tasks]
        found = {name: parts.store.standing(name) for name in ended}
        known = {name: state for name, state in found.items() if state is not None}
        if not any(
            not state.is_final and BatchId(name) not in parts.state.batches
            for name, state in known.items()
        ):
            break
    return known


async def list_tasks(call: Call, params: ListTasks) -> TaskPage:
    """Give a page of tasks."""
    limit = params.limit
    await call.parts.loop.settled()
    records = call.parts.store.page(
        states=params.states,
        batch=params.batch,
        node=params.node,
        owner=params.owner,
        before=params.before,
        after=params.after,
        limit=limit + 1,
    )
    rows = brief_rows(call.parts, call.actor, records[:limit])
    count = fit(rows)
    return TaskPage(tuple(rows[:count]), more=len(records) > limit or count < len(rows))


async def show(call: Call, params: OneTask) -> TaskResult:
    """Give one task with its history."""
    record = await stored_task(call.parts, params.task)
    batch = batch_records(call.parts, [record.batch])[record.batch]
    return TaskResult(redact_task(view_task(record, batch, history=True), call.actor))


async def explain(call: Call, params: OneTask) -> ExplainResult:
    """Say why a task is where it is."""
    state = call.parts.state

    def live() -> Explanation | None:
        task = state.tasks.get(params.task)
        return explain_task(state, task) if task is not None else None

    explanation = await call.parts.loop.read(live)
    if explanation is not None:
        return ExplainResult(explanation)
    record = await stored_task(call.parts, params.task)
    batch = batch_records(call.parts, [record.batch])[record.batch]
    return ExplainResult(Explanation(record.id, record.state, describe(record, batch.spec)))


async def wait(call: Call, params: WaitTasks) -> WaitResult:
    """Answer when tasks are over, or when the time to hold the answer is up."""
    parts = call.parts
    ids = await _named(call, params.tasks, params.batch)
    if params.batch is not None:
        await _made_whole(parts, params.batch)
    if params.batch is None:
        await _check_known(parts, [task for task in ids if task not in parts.state.tasks])
    live = (task for task in ids if _is_awaited(parts, task))
    if params.batch is None:
        left = await parts.waiting.wait(live, params.hold_s)
    else:
        left = await parts.waiting.wait_batch(params.batch, live, params.hold_s)
    if not left:
        await parts.loop.settled()
        if parts.loop.trouble:  # it began meanwhile: what is over is not stored, ask again
            left = sum(_is_awaited(parts, task) for task in ids)
    return WaitResult(done=not left, left=left)


async def kill(call: Call, params: SteerTasks) -> SteerResult:
    """End tasks."""
    return await _steer(call, params, Verb.KILL)


async def pause(call: Call, params: SteerTasks) -> SteerResult:
    """Hold tasks still."""
    return await _steer(call, params, Verb.PAUSE)


async def resume(call: Call, params: SteerTasks) -> SteerResult:
    """Let tasks go on."""
    return await _steer(call, params, Verb.RESUME)


async def logs(call: Call, params: OpenLogs) -> Ticket:
    """Give a ticket to read a task's output."""
    record = await stored_task(call.parts, params.task)
    if not may_see_contents(call.actor, record.owner):
        raise Forbidden(f"task {record.id} belongs to somebody else")
    if params.attempt is not None and not 1 <= params.attempt <= record.attempt:
        raise NotFound(f"task {record.id} has no attempt {params.attempt}")
    return call.parts.relay.ticket(params, call.actor.user)


async def list_batches(call: Call, params: ListBatches) -> BatchPage:
    """Give a page of batches."""
    limit = params.limit
    await call.parts.loop.settled()
    batches = call.parts.store.batch_page(owner=params.owner, before=params.before, limit=limit + 1)
    count = min(fit(batches), limit)
    return BatchPage(tuple(batches[:count]), more=count < len(batches))


async def show_batch(call: Call, params: OneBatch) -> BatchResult:
    """Give one batch."""
    await call.parts.loop.settled()
    batch = call.parts.store.batch_summary(params.batch)
    if batch is None:
        raise no_batch(call.parts, params.batch)
    return BatchResult(batch)


async def _steer(call: Call, params: SteerTasks, verb: Verb) -> SteerResult:
    parts = call.parts
    ids = await _named(call, params.tasks, params.batch)
    if params.batch is not None:
        asked = SteerAsked(call.actor, verb, batch=params.batch)
    else:
        await parts.loop.settled()
        ended: dict[TaskId, TaskState] = {}
        for task in ids:
            if task not in parts.state.tasks and (record := parts.store.task(task)) is not None:
                ended[task] = record.state
        asked = SteerAsked(call.actor, verb, ids, ended=ended)
    return cast("SteerResult", await call.ask(asked))


async def _named(
    call: Call, tasks: tuple[TaskId, ...], batch: BatchId | None
) -> tuple[TaskId, ...]:
    """Give the tasks a request names, by themselves or by their batch."""
    if (batch is None) == (not tasks):
        raise BadRequest("name either tasks or a batch")
    if len(tasks) > _MOST_NAMES:
        raise BadRequest(f"{len(tasks)} tasks are named; at most {_MOST_NAMES} in one call")
    if batch is None:
        return tasks
    record = await known_batch(call.parts, batch)
    return tuple(record.ids())


async def _check_known(parts: Parts, tasks: list[TaskId]) -> None:
    for task in tasks:
        await stored_task(parts, task)


def _is_awaited(parts: Parts, task: TaskId) -> bool:
    live = parts.state.tasks.get(task)
    if live is not None and not live.state.is_over:
        return True
    if not parts.loop.trouble:
        return False
    # An end that the disk has not taken is none: a crash would undo it.
    stored = parts.store.task(task)
    return stored is not None and not stored.state.is_over
