"""Where the tasks of a batch are, for those that talk to one another.

Knows: that targets name the node of each task beforehand, and that a gang is placed as a whole.
Does not know: how a task is told (the runner makes a variable of it), networks.
"""

from __future__ import annotations

import re
from typing import Final

from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.core.task.validation import LONGEST_HOST, MOST_HOSTS
from protocol.ids import BatchId, NodeName

#: What can stand in a list with commas, as a machine says it is called.
_HOST_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_HOST - 1}}}")


def hosts_of(state: ClusterState, name: BatchId) -> tuple[str, ...]:
    """Give the host names of the machines that the tasks of a batch are on, by index.

    All of them or none: of a gang that is not whole, of a batch that goes wherever there is
    room, of one that is larger than ``MOST_HOSTS`` and of a part that is tried again, nobody
    knows them all.
    """
    batch = state.batches[name].record
    if batch.size > MOST_HOSTS or batch.count < batch.size:
        return ()
    if batch.targets:
        return tuple(_host_name(state, NodeName(target.node)) for target in batch.targets)
    if not batch.gang:
        return ()
    members = [state.tasks.get(task) for task in batch.ids()]
    nodes = [task.node for task in members if task is not None and task.node]
    if len(nodes) < batch.size:
        return ()
    return tuple(_host_name(state, node) for node in nodes)


def _host_name(state: ClusterState, name: NodeName) -> str:
    """Give what a machine is called in its network; its name in the cluster if it did not say."""
    node = state.fleet.nodes.get(name)
    said = "" if node is None else node.record.inventory.hostname
    return said if _HOST_NAME.fullmatch(said) else name
