"""Nodes as operators see to them: letting in, draining, labelling, taking out.

Knows: what is refused, what becomes of the tasks of a node that is taken out.
Does not know: links, heartbeats, what runners say (``engine``).
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.cluster.actions import Answer, CloseLink, NodeChanged
from kohaku_daemon.core.cluster.events import (
    DrainAsked,
    JoinAsked,
    JoinTokenAsked,
    LabelAsked,
    RemoveAsked,
)
from kohaku_daemon.core.cluster.moves import Moves
from kohaku_daemon.core.cluster.records import (
    DropDocument,
    JoinTokenRecord,
    NodeRecord,
    PutDocument,
)
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.core.task.lifecycle import TaskEvent
from kohaku_daemon.core.task.validation import check_labels
from protocol.errors import BadRequest, Conflict
from protocol.ids import NodeName, parse_node_name
from protocol.models.task import Cause, Exit

#: Labels of one node: a row of it has to fit into a frame beside others.
_MOST_LABELS: Final = 64
_LONGEST_JOIN_TOKEN_S: Final = 30 * 86400.0


class Membership:
    """Carries out what is asked of nodes."""

    def __init__(self, state: ClusterState, scribe: Scribe, moves: Moves) -> None:
        self._state = state
        self._scribe = scribe
        self._moves = moves

    def drain(self, event: DrainAsked) -> None:
        """Give a node nothing new, or work again.

        Raises:
            NotFound: There is no such node.
        """
        node = self._state.fleet.find(event.node)
        if node.record.draining != event.draining:
            node.record = replace(node.record, draining=event.draining)
            node.close_or_open()
            self._state.backlog.renew()
            self._scribe.keep_node(node)
            kind = "node.draining" if event.draining else "node.undrained"
            text = "gets nothing new" if event.draining else "takes work again"
            self._scribe.tell(kind, f"{node.name} {text}", node=node.name, actor=event.actor.user)
        self._scribe.add(Answer(node.view()))

    def label(self, event: LabelAsked) -> None:
        """Change a node's labels.

        Raises:
            KohakuError: There is no such node or label, or too many.
        """
        node = self._state.fleet.find(event.node)
        check_labels(event.set)
        labels = {**node.record.labels, **event.set}
        for key in event.unset:
            if key not in labels:
                raise BadRequest(f"node {node.name} has no label {key}")
            del labels[key]
        if len(labels) > _MOST_LABELS:
            raise BadRequest(f"a node has at most {_MOST_LABELS} labels")
        node.record = replace(node.record, labels=labels)
        node.site.labels = labels
        self._state.backlog.renew()
        self._scribe.keep_node(node)
        self._scribe.add(Answer(node.view()))

    def remove(self, event: RemoveAsked) -> None:
        """Take a node out of the cluster.

        Raises:
            KohakuError: There is no such node, or it has tasks.
        """
        node = self._state.fleet.find(event.node)
        tasks = self._state.tasks_on(node.name)
        if tasks and not event.force:
            raise Conflict(
                f"node {node.name} has {len(tasks)} task{'s' if len(tasks) > 1 else ''} on it",
                hint=f"let them end: kohaku node drain {node.name}; or give them up: --force",
            )
        view = node.view()
        del self._state.fleet.nodes[node.name]
        self.give_up(node.name)
        self._state.backlog.renew()
        self._scribe.add(DropDocument(NodeRecord, node.name))
        self._scribe.add(CloseLink(node.name, "the node was removed from the cluster"))
        self._scribe.add(NodeChanged(node.name))
        text = f"{node.name} left the cluster"
        self._scribe.tell("node.removed", text, node=node.name, actor=event.actor.user)
        self._scribe.add(Answer(view))

    def give_up(self, node: NodeName) -> None:
        """End the tasks of a node that is removed: nobody will tell their end any more.

        Those that are to be tried again when their node is lost are tried again.
        """
        for task in list(self._state.tasks_on(node).values()):
            if self._moves.spec_of(task).requeue_on_lost and not task.kill_asked_by:
                cause = f"{node} was removed from the cluster; tries again, as asked"
                self._moves.requeue_lost(task, cause)
                continue
            exit_ = Exit(
                Cause.NODE_REMOVED, message="what it left on the machine is not followed up"
            )
            self._moves.finish(task, TaskEvent.KILLED, exit_, self._scribe.now)
        del self._state.on_node[node]

    def make_join_token(self, event: JoinTokenAsked) -> None:
        """Make a token that lets runners in.

        Raises:
            BadRequest: It is asked for too many, too long, or an impossible name.
        """
        if not 1 <= event.uses <= 1000:
            raise BadRequest(f"uses must be 1 to 1000, not {event.uses}")
        if not 0 < event.lasts_s <= _LONGEST_JOIN_TOKEN_S:
            raise BadRequest("a join token lasts more than 0 seconds and at most 30 days")
        if event.node:
            parse_node_name(event.node)
        token = JoinTokenRecord(
            digest=event.digest,
            prefix=event.prefix,
            uses_left=event.uses,
            expires_at=self._scribe.now + event.lasts_s,
            node=event.node,
            created_by=event.actor.user,
        )
        self._state.fleet.join_tokens[event.digest] = token
        self._scribe.add(PutDocument(token))
        self._scribe.add(Answer(token.expires_at))

    def join(self, event: JoinAsked) -> None:
        """Let a runner in as a node.

        Raises:
            KohakuError: The token, the name or the labels will not do.
        """
        name = parse_node_name(event.node)
        check_labels(event.labels)
        if name not in self._state.fleet.nodes and self._state.tasks_on(name):
            # A crash between both stores left them behind when an earlier node was removed.
            self.give_up(name)
        node, token = self._state.fleet.admit(
            event.token_digest, name, event.credential_digest, dict(event.labels), self._scribe.now
        )
        if token is not None:
            self._scribe.add(PutDocument(token))
            self._scribe.keep_node(node)
            self._scribe.tell("node.joined", f"{name} joined from {event.address}", node=name)
        self._scribe.add(Answer(name))
