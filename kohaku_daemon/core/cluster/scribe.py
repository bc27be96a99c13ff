"""What one event comes to, as it is worked out: the actions so far, the time, the diary.

Knows: that a node is stored and shown in one go, and that the diary is numbered.
Does not know: why anything happens.
"""

from __future__ import annotations

from msgspec.structs import replace

from kohaku_daemon.core.cluster.actions import AnswerLater, ClusterAction, NodeChanged, SaveEvent
from kohaku_daemon.core.cluster.fleet import FleetNode
from kohaku_daemon.core.cluster.records import EventRecord, PutDocument, Remnant, TaskRecord


class Scribe:
    """Collects the actions of one event."""

    def __init__(self, last_event: int) -> None:
        self._last_event = last_event
        self.out: list[ClusterAction] = []
        #: UTC seconds of the event at hand.
        self.now = 0.0
        self._last_answer = 0

    def begin(self, now: float) -> None:
        """Begin with a new event."""
        self.out = []
        self.now = now

    def add(self, action: ClusterAction) -> None:
        """Have something done."""
        self.out.append(action)

    def answer_later(self) -> int:
        """Put off the answer to the request at hand; give the number it will have."""
        self._last_answer += 1
        self.out.append(AnswerLater(self._last_answer))
        return self._last_answer

    def keep_node(self, node: FleetNode) -> None:
        """Store and show a node."""
        self.out.append(PutDocument(node.record))
        self.out.append(NodeChanged(node.name))

    def keep_remnants(self, node: FleetNode, remnants: tuple[Remnant, ...]) -> None:
        """Store what may still be held on a node by attempts that were given up."""
        node.record = replace(node.record, remnants=remnants)
        self.keep_node(node)

    def tell(
        self,
        kind: str,
        text: str,
        *,
        node: str = "",
        task: TaskRecord | None = None,
        actor: str = "",
    ) -> None:
        """Write a line of the diary."""
        self._last_event += 1
        self.out.append(
            SaveEvent(
                EventRecord(
                    id=self._last_event,
                    at=self.now,
                    kind=kind,
                    text=text,
                    node=node or (task.node if task is not None else ""),
                    task=task.id if task is not None else None,
                    actor=actor,
                )
            )
        )
