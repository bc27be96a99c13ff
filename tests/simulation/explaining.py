"""Whether what the cluster explains is so, worked out once more and more simply.

Knows: what a task asked for, what nodes have and who is on them.
Does not know: how placement chooses.
"""

from __future__ import annotations

from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.fleet import FleetNode
from kohaku_daemon.core.cluster.records import TaskRecord
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.core.cluster.views import explain_task
from protocol.models.target import Target
from protocol.models.task import Explanation, NodeVerdict, TaskSpec, TaskState
from tests.simulation.stage import promise

_RULE = "everything explains itself"


def check_explanations(engine: ClusterEngine) -> None:
    """Check what is said about every live task. All that could be placed has been."""
    for task in engine.state.tasks.values():
        explanation = explain_task(engine.state, task)
        promise(explanation.state == task.state, _RULE, "{} is {}", explanation, task.state)
        if task.state is TaskState.QUEUED:
            _check_waiting(engine.state, task, explanation)
        else:
            _check_placed(engine.state, task, explanation)


def _check_placed(state: ClusterState, task: TaskRecord, explanation: Explanation) -> None:
    summary = explanation.summary
    node = state.fleet.nodes.get(task.node)
    promise(task.node in summary, _RULE, "{} is on {}: {}", task.id, task.node, summary)
    if node is None or task.state is TaskState.LOST:
        return
    says_away = "offline" in summary or "lost" in summary
    promise(says_away != node.is_online, _RULE, "{} is {}: {}", node.name, node.state, summary)


def _check_waiting(state: ClusterState, task: TaskRecord, explanation: Explanation) -> None:
    batch = state.batch_of(task).record
    target = batch.targets[batch.position(task.index)] if batch.targets else None
    nodes = state.fleet.nodes
    if not explanation.nodes and task.id not in state.backlog:
        held = state.batch_of(task)
        waits = bool(held.awaits or held.falls or held.is_entering or task.folded)
        waits = waits or bool(task.not_before)
        promise(waits, _RULE, "{} waits for nothing: {}", task.id, explanation)
        return
    promise(len(explanation.nodes) == len(nodes), _RULE, "{} of {} nodes", explanation, nodes)
    for verdict in explanation.nodes:
        node = nodes[verdict.node]
        could = _could_ever(batch.spec, target, node)
        promise(
            verdict.could_ever == could or not node.record.inventory.cores,
            _RULE,
            "{} could {} run on {}: {}",
            task.id,
            "" if could else "never",
            node.name,
            verdict,
        )
        promise(
            verdict.fits_now != bool(verdict.reasons),
            _RULE,
            "{} on {}: {}",
            task.id,
            node.name,
            verdict,
        )
        placeable = verdict.fits_now and not batch.gang
        promise(not placeable, _RULE, "{} waits and fits on {}", explanation, node.name)
        _check_standing(node, verdict)


def _check_standing(node: FleetNode, verdict: NodeVerdict) -> None:
    text = " ".join(verdict.reasons)
    if not node.is_online:
        said = str(node.state) in text
    elif node.record.draining:
        said = "draining" in text
    else:
        said = "draining" not in text and "offline" not in text
    promise(said or "wants node" in text, _RULE, "{} is {}: {}", node.name, node.state, verdict)


def _could_ever(spec: TaskSpec, target: Target | None, node: FleetNode) -> bool:
    """Whether a node could run it if it were idle, whole and in service."""
    inventory, labels = node.record.inventory, node.record.labels
    if target is not None and target.node != node.name:
        return False
    if any(labels.get(key) != value for key, value in spec.labels.items()):
        return False
    cores, memory = len(inventory.cores), inventory.memory
    if target is not None and target.numa is not None:
        pinned = [numa for numa in inventory.numa if numa.number == target.numa]
        if not pinned:
            return False
        cores, memory = len(pinned[0].cores), pinned[0].memory
    indices = {gpu.index for gpu in inventory.gpus}
    named = set(target.gpus) if target is not None else set()
    wanted = spec.gpus if not named else 0
    return (
        spec.cores <= cores
        and spec.memory <= memory
        and wanted <= len(indices)
        and named <= indices
    )
