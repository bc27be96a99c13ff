"""The host's shell in a simulation: groups of events, one commit for each, death anywhere.

The engine and its records are the real ones. What is kept is what a commit wrote: documents
first, then tasks, as two stores do.
"""

from __future__ import annotations

from collections.abc import Callable

from kohaku_daemon.core.cluster.actions import (
    Answer,
    CloseLink,
    ClusterAction,
    Refuse,
    SaveTask,
    SendOrder,
)
from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import (
    ClusterEvent,
    PlacementDue,
    RunnerBeat,
    RunnerGone,
    RunnerRegistered,
    RunnerReported,
    Ticked,
)
from kohaku_daemon.core.cluster.records import DropDocument, NodeRecord, PutDocument
from protocol.errors import KohakuError
from protocol.ids import NodeName
from protocol.messages.runner import Orders, Register, Registered, Report, Reported
from protocol.models.node import Readings
from tests.simulation.link import Link, Message
from tests.simulation.stage import Stage
from tests.support.playbook import Kept, recoded

#: Seconds until tasks of a silent node are lost: short, so that it happens.
LOST_AFTER_S = 20.0
Reply = Callable[[object], None]


class Host:
    """The one host."""

    def __init__(self, stage: Stage, nodes: list[NodeRecord]) -> None:
        self.kept = Kept()
        self.kept.commit([PutDocument(node) for node in nodes])
        self.engine: ClusterEngine | None = None
        #: Those that have registered.
        self.links: dict[NodeName, Link] = {}
        self._open: list[Link] = []
        self._stage = stage
        self._gathered: list[tuple[ClusterAction, Reply | None]] = []
        self._committing = False
        self._life = 0
        self.boot()

    def boot(self) -> None:
        """Start from what is kept."""
        self.engine = self.kept.restored(self._stage.now, lost_after_s=LOST_AFTER_S)
        self._life += 1
        self._gathered, self._committing = [], False
        self._stage.tell("host is up")
        self._tick(self._life)

    def die(self) -> None:
        """Lose everything that was not committed."""
        self.engine = None
        links, self._open, self.links = self._open, [], {}
        for link in links:
            link.cut("the host died")
        self._stage.tell("host is dead")
        self._stage.after(self._stage.random.choice([0.1, 1.0, 5.0, 30.0]), self.boot)

    def ask(self, event: ClusterEvent, reply: Reply | None = None) -> None:
        """Handle an event; the reply comes once what it changed is committed, if at all."""
        if self.engine is None:
            return
        for action in self.engine.handle(event, self._stage.now):
            self._gathered.append((action, reply))
        self.engine.state.check_invariants()
        self._commit_soon()

    def accept(self, link: Link) -> bool:
        """Take a connection, if the host is there."""
        if self.engine is not None:
            self._open.append(link)
        return self.engine is not None

    def receive(self, link: Link, message: Message, call: int) -> None:
        """Take what a runner says."""
        if self.engine is None:
            return
        match message:
            case Register():
                self._register(link, message, call)
            case _ if self.links.get(link.node) is not link:
                pass  # a link that was replaced, or never registered
            case Report(reports):
                reported = RunnerReported(link.node, reports)
                self.ask(reported, lambda _: link.send("runner", Reported(), call))
            case Readings():
                self.ask(RunnerBeat(link.node, message))
            case _:
                raise AssertionError(f"a runner said {message}")

    def lost(self, link: Link) -> None:
        """Note that a link is broken."""
        if self.links.get(link.node) is link:
            del self.links[link.node]
            self.ask(RunnerGone(link.node, "its connection closed"))

    def _register(self, link: Link, message: Register, call: int) -> None:
        before = self.links.get(link.node)
        self.links[link.node] = link
        if before is not None and before is not link:
            before.cut("replaced by a new one")
        ended = frozenset(self.kept.ended())
        event = RunnerRegistered(link.node, "10.0.0.1", message.inventory, message.attempts, ended)
        self.ask(event, lambda _: link.send("runner", Registered(link.node), call))

    def _tick(self, life: int) -> None:
        if self._life == life and self.engine is not None:
            self.ask(Ticked())
            self._stage.after(1.0, lambda: self._tick(life))

    def _commit_soon(self) -> None:
        if not self._committing and self._gathered:
            self._committing = True
            life = self._life
            self._stage.soon(lambda: self._begin_commit(life))

    def _begin_commit(self, life: int) -> None:
        if self._life != life or self.engine is None:
            return
        for action in self.engine.handle(PlacementDue(), self._stage.now):
            self._gathered.append((action, None))
        self.engine.state.check_invariants()
        group, self._gathered = self._gathered, []
        written = [_as_it_is_now(action) for action, _ in group]
        self._stage.soon(lambda: self._end_commit(life, written, group))

    def _end_commit(
        self,
        life: int,
        written: list[ClusterAction],
        group: list[tuple[ClusterAction, Reply | None]],
    ) -> None:
        if self._life != life or self.engine is None or self._dies():
            return
        documents = [one for one in written if isinstance(one, PutDocument | DropDocument)]
        self.kept.commit(documents)
        if documents and self._dies():
            return
        self.kept.commit([one for one in written if one not in documents])
        for action, reply in group:
            if self._dies():
                return
            self._release(action, reply)
        self._committing = False
        self._commit_soon()

    def _release(self, action: ClusterAction, reply: Reply | None) -> None:
        match action:
            case SendOrder(node, order):
                if node in self.links:
                    self.links[node].send("runner", Orders((order,)))
            case CloseLink(node, reason):
                if node in self.links:
                    self.links[node].cut(reason)
            case Answer(value) if reply is not None:
                reply(value)
            case Refuse(error):
                self._refused(error, reply)
            case _:
                pass

    def _refused(self, error: KohakuError, reply: Reply | None) -> None:
        assert reply is not None, f"nobody asked for what was refused: {error}"
        reply(error)

    def _dies(self) -> bool:
        if self._stage.chance(0.003):
            self.die()
            return True
        return False


def _as_it_is_now(action: ClusterAction) -> ClusterAction:
    if isinstance(action, SaveTask):
        return SaveTask(recoded(action.task), action.batch)
    return action
