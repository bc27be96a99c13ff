"""What people see of the host's memory: rows, explanations, the state of the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.access.permissions import Actor, may_see_contents
from kohaku_daemon.core.cluster.records import BatchRecord, TaskRecord
from kohaku_daemon.core.cluster.state import ClusterState, LiveBatch
from kohaku_daemon.core.placement.gang import plan_gang
from kohaku_daemon.core.placement.place import verdict
from kohaku_daemon.core.placement.words import name_by_id, say_place
from protocol.ids import BatchId, NodeName, TaskId
from protocol.messages.cluster import Status
from protocol.models.node import Claimed, NodeState
from protocol.models.task import Cause, Exit, Explanation, NodeVerdict, Task, TaskSpec, TaskState
from protocol.units import render_duration, render_size

#: Stands where the reader may not see a command.
_HIDDEN: Final = ("(hidden)",)
#: Characters of a command that a row shows.
_LONGEST_BRIEF: Final = 256
#: Awaited tasks that an explanation names.
_MOST_AWAITED: Final = 10


def view_task(task: TaskRecord, batch: BatchRecord, *, history: bool = False) -> Task:
    """Show a task as its owner sees it."""
    row = batch.row(task.index)
    spec = replace(batch.spec, env={**batch.spec.env, **row}) if row else batch.spec
    return Task(
        id=task.id,
        batch=task.batch,
        index=task.index,
        size=batch.size,
        owner=task.owner,
        state=task.state,
        spec=spec,
        target=batch.targets[batch.position(task.index)] if batch.targets else None,
        node=task.node,
        claim=task.claim,
        attempt=task.attempt,
        reason=task.reason,
        exit=task.exit,
        created_at=task.created_at,
        started_at=task.started_at,
        ended_at=task.ended_at,
        kill_asked=bool(task.kill_asked_by) and not task.state.is_final,
        after=batch.after,
        gang=batch.gang,
        retry_of=task.retry_of,
        history=task.history if history else (),
    )


def brief_task(task: Task) -> Task:
    """Make a row of bounded size: without variables and mounts, and with a long command cut."""
    spec = task.spec
    if spec.env or spec.mounts or sum(map(len, spec.command)) > _LONGEST_BRIEF:
        spec = replace(spec, env={}, mounts=(), command=_cut(spec.command))
        return replace(task, spec=spec)
    return task


def _cut(command: tuple[str, ...]) -> tuple[str, ...]:
    left = _LONGEST_BRIEF
    parts = []
    for part in command:
        if len(part) > left:
            parts.append(part[:left] + "\N{HORIZONTAL ELLIPSIS}")
            break
        parts.append(part)
        left -= len(part)
    return tuple(parts)


def redact_task(task: Task, actor: Actor) -> Task:
    """Blank what an actor may not see: command, variables, working directory, mounts."""
    return task if may_see_contents(actor, task.owner) else hide_contents(task)


def hide_contents(task: Task) -> Task:
    """Blank a task's command, variables, working directory and mounts."""
    spec = replace(task.spec, command=_HIDDEN, env={}, workdir="", mounts=())
    return replace(task, spec=spec)


def explain_task(state: ClusterState, task: TaskRecord) -> Explanation:
    """Say why a live task is where it is."""
    batch = state.batch_of(task)
    request = batch.request(task.index)
    if task.state is not TaskState.QUEUED:
        summary = describe(task, batch.record.spec, _absence(state, task.node))
        place = _say_place(state, task)
        if place:
            summary = f"{summary}; it holds {place}"
        return Explanation(task.id, task.state, summary)
    held_back = _say_held_back(state, task)
    if held_back:
        return Explanation(task.id, task.state, held_back)
    verdicts = []
    for node in sorted(state.fleet.nodes.values(), key=lambda node: node.name):
        held_for = state.backlog.held_for(node.name)
        reason = (
            f"kept free for task {held_for}, which waits longer or has higher priority"
            if held_for is not None and held_for != task.id
            else ""
        )
        verdicts.append(verdict(request, node.site, reason, partial(_name_task, state)))
    ahead = state.backlog.ahead_of(task.id)
    summary = _summary(state, verdicts)
    if batch.record.gang:
        summary = _summary_of_gang(state, batch, summary)
    return Explanation(task.id, task.state, summary, ahead, tuple(verdicts))


def _name_task(state: ClusterState, name: TaskId) -> str:
    """Say which task one is; of one that has ended nobody asks whose it was."""
    task = state.tasks.get(name)
    return f"task {name} of {task.owner}" if task is not None else name_by_id(name)


def _say_place(state: ClusterState, task: TaskRecord) -> str:
    """Say which GPUs and NUMA nodes a task has; empty if it has none, or they are like others."""
    node = state.fleet.nodes.get(task.node)
    if node is None or task.claim is None:
        return ""
    return say_place(task.claim, node.site.books)


def _say_held_back(state: ClusterState, task: TaskRecord) -> str:
    """Say what keeps a waiting task out of the queue; empty if it is in it."""
    if task.id in state.backlog:
        return ""
    batch = state.batch_of(task)
    awaits = sorted(batch.awaits)
    if batch.falls is not None:
        return f"is about to end: {batch.falls.message}"
    if not awaits:
        if task.folded or (batch.is_entering and not task.attempt):
            return "is about to enter the queue, after others of its batch"
        return f"waits to be tried again: {task.reason}"
    named = ", ".join(_say_awaited(state, name) for name in awaits[:_MOST_AWAITED])
    more = f" and {len(awaits) - _MOST_AWAITED} more" if len(awaits) > _MOST_AWAITED else ""
    return f"waits for {named}{more} to complete"


def _say_awaited(state: ClusterState, name: int) -> str:
    task = state.tasks.get(TaskId(name))
    if task is not None:
        return f"task {name} ({task.state})"
    batch = state.batches.get(BatchId(name))
    if batch is None or not batch.live:
        return f"{name} (which has just ended)"
    return f"batch {name} ({batch.live + batch.folded} tasks left)"


def _summary(state: ClusterState, verdicts: list[NodeVerdict]) -> str:
    """Say in one sentence what a waiting task waits for."""
    if not verdicts:
        return "waits: no node has joined the cluster"
    hopeful = [one.node for one in verdicts if one.could_ever]
    if not hopeful:
        return "waits: no node there is could ever hold it"
    closed = [name for name in hopeful if state.fleet.nodes[name].site.closed]
    if closed == hopeful:
        if len(hopeful) > 1:
            return f"waits: the {len(hopeful)} nodes that could hold it are out of service"
        return f"waits for {hopeful[0]}: {state.fleet.nodes[hopeful[0]].site.closed}"
    able = len(hopeful) - len(closed)
    nodes = f"{able} of {len(verdicts)} nodes" if len(verdicts) > 1 else "the one node"
    out = f"; {_count_more(closed)} out of service" if closed else ""
    return f"waits for room: {nodes} could hold it when idle{out}"


def _count_more(names: list[NodeName]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} more are"


def _summary_of_gang(state: ClusterState, batch: LiveBatch, one: str) -> str:
    """Say the same of a task that begins with others, by what is said of it alone."""
    gang = f"its gang of {batch.live} begins together or not at all"
    held = (state.tasks.get(name) for name in batch.record.ids())
    members = [(task.id, batch.request(task.index)) for task in held if task is not None]
    if plan_gang(members, state.fleet.sites) is None:
        # What one of them finds is no news then.
        return f"waits: the nodes in service have no room for all of it, even idle; {gang}"
    return f"{one}; {gang}"


def _absence(state: ClusterState, name: NodeName) -> str:
    """Say that a node is not there, to stand behind its name; empty if it is."""
    node = state.fleet.nodes.get(name)
    return "" if node is None or node.is_online else f", which is {node.state}"


def describe(task: TaskRecord, spec: TaskSpec, absence: str = "") -> str:
    """Say in one sentence where a placed or ended task stands.

    ``absence`` follows the node's name and says that it is not there.
    """
    kill = f"; {task.kill_asked_by} has asked for its end" if task.kill_asked_by else ""
    asked = absence + kill
    match task.state:
        case TaskState.QUEUED:
            return "waits for room"
        case TaskState.ASSIGNED:
            return f"ordered, and not confirmed yet, on {task.node}{asked}"
        case TaskState.PREPARING:
            how = f": {task.reason}" if task.reason else ""
            return f"makes ready on {task.node}{how}{asked}"
        case TaskState.RUNNING:
            return f"runs on {task.node}{asked}"
        case TaskState.PAUSED:
            return f"is held still on {task.node}{asked}"
        case TaskState.LOST:
            if not absence:
                return f"ordered again, and not confirmed yet, on {task.node}{kill}"
            return f"{task.node} is away; if it comes back the task is known again{kill}"
        case _:
            return task.reason or (
                describe_exit(task.exit, spec, task.kill_asked_by) if task.exit else str(task.state)
            )


def describe_exit(exit_: Exit, spec: TaskSpec, killed_by: str) -> str:
    """Say in one sentence how a task ended."""
    more = f": {exit_.message}" if exit_.message else ""
    signalled = f"signal {exit_.signal}" if exit_.signal is not None else "a signal"
    match exit_.cause:
        case Cause.EXITED:
            oom = f"; the kernel killed {exit_.oom_kills} of its processes for memory"
            return f"exited with {exit_.code}{oom if exit_.oom_kills else ''}{more}"
        case Cause.SIGNALLED:
            return f"ended by {signalled}{more}"
        case Cause.OOM:
            limit = f" of {render_size(spec.memory)}" if spec.memory else ""
            return f"ran out of memory: the kernel ended it at its limit{limit}{more}"
        case Cause.KILLED:
            by = f" by {killed_by}" if killed_by else ""
            how = f" with {signalled}" if exit_.signal is not None else ""
            return f"killed{by}{how}{more}"
        case Cause.START_FAILED:
            return f"could not be started{more}"
        case Cause.NODE_FAILED:
            return f"its node failed{more}"
        case Cause.NODE_REMOVED:
            return f"its node was removed from the cluster{more}"
        case Cause.TIME_LIMIT:
            return f"ended at its time limit of {render_duration(spec.time_limit_s)}{more}"
        case Cause.DEPENDENCY | Cause.GANG:
            return f"never began{more}"


def count_reasons(state: ClusterState) -> Counter[str]:
    """Count the waiting tasks by what they wait for: ``room``, ``node`` (none that could hold it
    is in service), ``gang`` (room for all of it), ``after`` (others), ``retry`` (its time).
    """
    reasons: Counter[str] = Counter()
    sites = state.fleet.sites
    for request, count in state.backlog.shapes():
        if request is None:
            reasons["gang"] += count
        elif state.backlog.has_hope(request, sites):
            reasons["room"] += count
        else:
            reasons["node"] += count
    waiting_for_others = {batch for batches in state.dependents.values() for batch in batches}
    reasons["after"] = sum(
        state.batches[batch].live + state.batches[batch].folded for batch in waiting_for_others
    )
    reasons["retry"] = sum(
        task in state.tasks and task not in state.backlog for _, task in state.delayed
    )
    return reasons


def view_status(
    state: ClusterState, version: str, started_at: float, ended: dict[str, int]
) -> Status:
    """Show the cluster at a glance. ``ended`` counts tasks that ended lately, by state."""
    nodes = state.fleet.nodes.values()
    states = Counter([task.state for task in state.tasks.values()])
    tasks = Counter({str(one): count for one, count in states.items()})
    return Status(
        cluster=state.cluster,
        version=version,
        started_at=started_at,
        nodes=dict(Counter(str(node.state) for node in nodes)),
        draining=sum(node.record.draining for node in nodes),
        tasks={**tasks, **ended},
        capacity=_sum(
            Claimed(
                tasks=node.record.inventory.max_tasks,
                cores=len(node.record.inventory.cores),
                memory=node.record.inventory.memory,
                gpus=len(node.record.inventory.claimable_gpus),
            )
            for node in nodes
            if node.is_online
        ),
        claimed=_sum(node.site.books.claimed() for node in nodes if node.is_online),
        problems=tuple(_problems(state)),
    )


def _problems(state: ClusterState) -> list[str]:
    nodes = sorted(state.fleet.nodes.values(), key=lambda node: node.name)
    problems = []
    for node in nodes:
        if node.state is not NodeState.ONLINE:
            count = len(state.tasks_on(node.name))
            held = f" with {count} task{'s' if count > 1 else ''} on it" if count else ""
            problems.append(f"node {node.name} is {node.state}{held}")
        problems += [f"node {node.name}: {trouble}" for trouble in node.troubles]
        problems += [
            f"node {node.name}: backend {info.name}: {info.message}"
            for info in node.record.inventory.backends
            if not info.healthy
        ]
        problems += [
            f"node {node.name}: GPU {gpu} is out of service: {fault}"
            for gpu, fault in node.site.books.faults.items()
        ]
    if not nodes:
        problems.append("no node has joined; let one in with: kohaku node join-token")
    return problems


def _sum(parts: Iterable[Claimed]) -> Claimed:
    total = Claimed()
    for part in parts:
        total = Claimed(
            total.tasks + part.tasks,
            total.cores + part.cores,
            total.memory + part.memory,
            total.gpus + part.gpus,
        )
    return total
