"""Which handler answers which method of the table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from kohaku_daemon.host.handlers import cluster, environment, node, task
from kohaku_daemon.host.parts import Call
from protocol import methods
from protocol.methods import Method

Handler = Callable[[Call, Any], Awaitable[Any]]

#: Every method that clients call and that answers once. ``watch`` streams.
CALLS: Final[Mapping[Method[Any, Any], Handler]] = {
    methods.WHOAMI: cluster.whoami,
    methods.STATUS: cluster.status,
    methods.EVENT_LIST: cluster.list_events,
    methods.TASK_SUBMIT: task.submit,
    methods.TASK_LIST: task.list_tasks,
    methods.TASK_SHOW: task.show,
    methods.TASK_EXPLAIN: task.explain,
    methods.TASK_WAIT: task.wait,
    methods.TASK_KILL: task.kill,
    methods.TASK_PAUSE: task.pause,
    methods.TASK_RESUME: task.resume,
    methods.TASK_RETRY: task.retry,
    methods.TASK_LOGS: task.logs,
    methods.BATCH_LIST: task.list_batches,
    methods.BATCH_SHOW: task.show_batch,
    methods.NODE_LIST: node.list_nodes,
    methods.NODE_SHOW: node.show,
    methods.NODE_DRAIN: node.drain,
    methods.NODE_UNDRAIN: node.undrain,
    methods.NODE_LABEL: node.label,
    methods.NODE_REMOVE: node.remove,
    methods.NODE_JOIN_TOKEN: node.join_token,
    methods.ENVIRONMENT_LIST: environment.list_environments,
    methods.ENVIRONMENT_SHOW: environment.show,
    methods.ENVIRONMENT_CREATE: environment.create,
    methods.ENVIRONMENT_PACK: environment.pack,
    methods.ENVIRONMENT_PULL: environment.pull,
    methods.ENVIRONMENT_SHELL: environment.shell,
    methods.ENVIRONMENT_DELETE: environment.delete,
    methods.REGISTRY_LIST: environment.list_registries,
    methods.REGISTRY_SET: environment.set_registry,
    methods.REGISTRY_REMOVE: environment.remove_registry,
}
