"""Runners at the door /v1/runner: joining, registering, taking orders, reporting.

Knows: one link a node, when a second one is a stranger with a copied credential, and how much
and how often a runner may speak.
Does not know: what reports mean; they go to the engine as they are.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec

from kohaku_daemon.core.access.permissions import Actor
from kohaku_daemon.core.access.tokens import TokenKind, is_token, token_digest
from kohaku_daemon.core.cluster.copies import refuse_copy
from kohaku_daemon.core.cluster.events import (
    JoinAsked,
    PinAsked,
    RunnerBeat,
    RunnerGone,
    RunnerRegistered,
    RunnerReported,
)
from kohaku_daemon.host.clients import welcome
from kohaku_daemon.host.guard import vouch
from kohaku_daemon.host.links import RunnerLink
from kohaku_daemon.host.parts import Parts
from kohaku_daemon.host.reported import check_inventory, check_readings, tidy
from kohaku_daemon.loop_time import Purse
from kohaku_daemon.supervise import spawn
from kohaku_daemon.wire import ItemSink, Served
from protocol.errors import (
    BadRequest,
    Conflict,
    KohakuError,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from protocol.ids import NodeName, TaskId, UserName
from protocol.messages.hello import Hello, Welcome
from protocol.messages.runner import (
    AttemptReport,
    HeartbeatTaken,
    Join,
    Joined,
    PinImage,
    PinnedImage,
    Register,
    Registered,
    Report,
    Reported,
)
from protocol.methods import (
    RUNNER_HEARTBEAT,
    RUNNER_JOIN,
    RUNNER_REPORT,
    Method,
    StreamingMethod,
)
from protocol.models.access import Role
from protocol.models.node import Readings
from protocol.session import CloseCode

_log = logging.getLogger(__name__)

#: A link that was heard within so many heartbeats is alive, and a second one is refused.
_ALIVE_HEARTBEATS: Final = 3
#: Bytes of an inventory, and of readings. 256 cores and 8 GPUs have some 10 KiB.
_LARGEST_SAID: Final = 96 * 1024

#: Launches that one runner may say it knows when it registers.
_MOST_ATTEMPTS: Final = 50_000
#: Of those the books never heard of, so many are told: each is a line of the diary.
_MOST_UNKNOWN: Final = 100
#: Attempts that are looked up in the store before everybody else has a turn.
_LOOKED_UP: Final = 200
#: Registrations of one node in a minute. Each is written to cluster.json; a runner whose link
#: breaks at once each time makes some ten, because its pauses grow.
_MOST_REGISTRATIONS: Final = 30
_MINUTE_S: Final = 60.0
#: Seconds on the loop of one node, at once and for each one it leaves to others: reports of
#: busy nodes are most of the host's work, and go before what people ask for without measure.
_NODE_PURSE_S: Final = 0.02
_NODE_INCOME: Final = 0.5

_encode: Final = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class _Visitor:
    """A connection of a runner, and how far it has come."""

    #: Known once it has shown its credential.
    node: NodeName | None = None
    #: Digest of that credential.
    credential: str = ""
    #: Set once it has registered.
    link: RunnerLink | None = None
    #: Attempts of registrations that said more would follow.
    said: list[AttemptReport] = field(default_factory=list)


class RunnerDoor:
    """Answers runners."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        #: When each node registered lately, by ``asyncio``'s clock.
        self._registered: dict[NodeName, deque[float]] = {}
        #: One for all connections of a node.
        self._purses: dict[NodeName, Purse] = {}

    async def hello(self, served: Served, params: Hello) -> Welcome:
        """Let a runner in: as a node by its credential, or to join."""
        visitor = _Visitor()
        if params.token:
            visitor.node = self._parts.gate.node(params.token, served.address)
            visitor.credential = token_digest(params.token)
            self._let_in(served, visitor.node)
        served.actor = visitor
        served.admit = partial(_admit, visitor)
        served.take = partial(self._take, visitor)
        actor = Actor(UserName(visitor.node or ""), Role.ANONY, address=served.address)
        return welcome(self._parts, params, actor)

    async def call(
        self, served: Served, method: Method[Any, Any], params: msgspec.Struct
    ) -> msgspec.Struct:
        """Answer a call."""
        visitor = _visitor(served)
        match params:
            case Join():
                return await self._join(served, visitor, params)
            case Register():
                return await self._register(served, visitor, params)
            case Report(reports):
                link = _link(visitor, method)
                tidied = tuple(map(tidy, reports))
                await self._parts.loop.ask(RunnerReported(link.node, tidied), patient=True)
                return Reported()
            case Readings():
                return self._beat(_link(visitor, method), params)
            case PinImage():
                return await self._pin(_link(visitor, method), params)
            case _:
                raise BadRequest(f"{method.name} is not answered here")

    async def stream(
        self,
        served: Served,
        method: StreamingMethod[Any, Any, Any],
        params: msgspec.Struct,
        sink: ItemSink,
    ) -> msgspec.Struct:
        """Answer a streaming call: there is one for runners, ``runner.orders``."""
        link = _link(_visitor(served), method)
        await link.pass_orders(sink)
        raise AssertionError("orders end with their link")

    def closed(self, served: Served) -> None:
        """Note that a runner's connection has ended."""
        visitor = served.actor
        if isinstance(visitor, _Visitor) and visitor.link is not None:
            link = visitor.link
            visitor.link = None
            if self._parts.links.drop(link):
                self._parts.loop.tell(RunnerGone(link.node, "its connection closed"))

    def _take(
        self, visitor: _Visitor, params: msgspec.Struct, answer: Callable[[msgspec.Struct], None]
    ) -> bool:
        """Take heartbeats and reports, which are nearly all that runners say."""
        match params:
            case Readings():
                answer(self._beat(_link(visitor, RUNNER_HEARTBEAT), params))
            case Report(reports):
                link = _link(visitor, RUNNER_REPORT)
                event = RunnerReported(link.node, tuple(map(tidy, reports)))
                self._parts.loop.ask_later(event, lambda _: answer(Reported()))
            case _:
                return False
        return True

    async def _pin(self, link: RunnerLink, params: PinImage) -> PinnedImage:
        event = PinAsked(link.node, params.batch, params.reference, params.digest)
        answer = await self._parts.loop.ask(event)
        assert isinstance(answer, PinnedImage)
        return answer

    def _beat(self, link: RunnerLink, readings: Readings) -> HeartbeatTaken:
        _check_size("the readings", readings)
        check_readings(readings)
        link.heard_at = asyncio.get_running_loop().time()
        self._parts.loop.tell(RunnerBeat(link.node, readings))
        return HeartbeatTaken()

    def _let_in(self, served: Served, node: NodeName) -> None:
        """Treat a connection as that of a node."""
        served.purse = self._purses.setdefault(node, Purse(_NODE_PURSE_S, _NODE_INCOME))
        vouch(served.transport, served.purse)

    async def _join(self, served: Served, visitor: _Visitor, params: Join) -> Joined:
        if visitor.node is not None:
            raise Conflict(f"this runner is node {visitor.node} already")
        if not is_token(TokenKind.RUNNER, params.credential):
            raise BadRequest("credential must be khr_ and 64 hexadecimal digits")
        event = JoinAsked(
            token_digest=token_digest(params.token),
            node=params.node,
            credential_digest=token_digest(params.credential),
            labels=params.labels,
            address=served.address,
        )
        actor = Actor(UserName("runner"), Role.ANONY, address=served.address)
        audit = None
        if event.token_digest in self._parts.state.fleet.join_tokens:
            # A guess leaves no line: whoever can connect could fill the disk.
            audit = self._parts.gate.audit(actor, RUNNER_JOIN, params)
        try:
            await self._parts.loop.ask(event, audit)
        except KohakuError as error:
            self._parts.refusals.note(served.address, "a join", error)
            raise
        _log.info("a runner joined", extra={"node": params.node, "address": served.address})
        visitor.node = NodeName(params.node)
        visitor.credential = event.credential_digest
        self._let_in(served, visitor.node)
        return Joined(visitor.node, self._parts.state.cluster)

    async def _register(self, served: Served, visitor: _Visitor, params: Register) -> Registered:
        name = _node(visitor)
        self._check_current(name, visitor)
        _check_size("the inventory", params.inventory)
        check_inventory(params.inventory)
        if params.node and params.node != name:
            raise Conflict(
                f"this runner calls itself {params.node}, and its credential is node {name}'s",
                hint=f"set its name to {name}, or give it an empty data folder to join anew",
            )
        heartbeat_s = self._parts.config.heartbeat_s
        visitor.said += map(tidy, params.attempts)
        if len(visitor.said) > _MOST_ATTEMPTS:
            visitor.said.clear()
            raise TooLarge(f"node {name} says that it knows more than {_MOST_ATTEMPTS} launches")
        if params.more:
            return Registered(name, heartbeat_s)
        attempts, visitor.said = visitor.said, []
        self._check_often(name)
        wanted, ended, begun = await self._look_up(attempts)
        self._check_current(name, visitor)  # again: it may have been removed meanwhile
        refuse_copy(name, wanted, self._parts.state.tasks, begun)
        link = visitor.link or RunnerLink(name, served)
        self._refuse_second(name, params.instance, link)
        link.instance = params.instance
        link.heard_at = asyncio.get_running_loop().time()
        visitor.link = link
        before = self._parts.links.put(link)
        if before is not None:
            reason = "the same runner has connected again"
            spawn(before.served.close(CloseCode.REPLACED, reason), name=f"close {name}'s old link")
        event = RunnerRegistered(name, served.address, params.inventory, wanted, ended, begun)
        await self._parts.loop.ask(event, patient=True)
        return Registered(name, heartbeat_s)

    def _check_current(self, name: NodeName, visitor: _Visitor) -> None:
        """Refuse a runner whose node was removed since it said hello, or is another's now."""
        node = self._parts.state.fleet.nodes.get(name)
        if node is None or node.record.credential != visitor.credential:
            raise Unauthenticated(
                f"node {name} was removed from the cluster, and this runner's credential with it",
                hint="let it join anew with a token from: kohaku node join-token",
            )

    def _refuse_second(self, name: NodeName, instance: str, link: RunnerLink) -> None:
        """Refuse a second runner with one credential, as after copying a data folder.

        A runner that restarted is told apart by its old link's silence: what was killed does
        not send heartbeats.
        """
        there = self._parts.links.get(name)
        if there is None or there is link or there.instance == instance:
            return
        silent_s = asyncio.get_running_loop().time() - there.heard_at
        if silent_s < _ALIVE_HEARTBEATS * self._parts.config.heartbeat_s:
            error = Conflict(
                f"node {name} is connected already, from {there.served.address}",
                hint="if this is a copy of its data folder, empty it and let the runner join "
                "under a name of its own",
            )
            address = link.served.address
            self._parts.refusals.note(address, f"a second runner of node {name}", error)
            raise error

    def _check_often(self, name: NodeName) -> None:
        """Refuse a runner that registers again and again."""
        now = asyncio.get_running_loop().time()
        times = self._registered.setdefault(name, deque(maxlen=_MOST_REGISTRATIONS))
        if len(times) == _MOST_REGISTRATIONS and now - times[0] < _MINUTE_S:
            raise Unavailable(
                f"node {name} has registered {_MOST_REGISTRATIONS} times in a minute",
                hint="look at its runner's log for what makes it register again",
            )
        times.append(now)

    async def _look_up(
        self, attempts: Sequence[AttemptReport]
    ) -> tuple[tuple[AttemptReport, ...], frozenset[TaskId], frozenset[TaskId]]:
        """Give those attempts that say something, those of their tasks that have ended, and those
        of these that ended after that attempt had begun.

        Of what the books never heard of, which is only told, some are enough.
        """
        live = self._parts.state.tasks
        wanted: list[AttemptReport] = []
        ended, begun = set[TaskId](), set[TaskId]()
        looked_up = unknown = 0
        for report in attempts:
            if report.task in live:
                wanted.append(report)
                continue
            looked_up += 1
            if looked_up % _LOOKED_UP == 0:
                await asyncio.sleep(0)
            record = self._parts.store.task(report.task)
            if record is not None and record.state.is_final:
                ended.add(report.task)
                if record.started_at and record.attempt == report.attempt:
                    begun.add(report.task)
                wanted.append(report)
            elif unknown < _MOST_UNKNOWN:
                unknown += 1
                wanted.append(report)
        return tuple(wanted), frozenset(ended), frozenset(begun)


def _visitor(served: Served) -> _Visitor:
    assert isinstance(served.actor, _Visitor), "hello comes first"
    return served.actor


def _admit(visitor: _Visitor, method: Method[Any, Any] | None) -> None:
    if method is not RUNNER_JOIN:
        _node(visitor)


def _check_size(subject: str, said: msgspec.Struct) -> None:
    """Refuse what could not be shown: both together go into one message to those who watch."""
    size = len(_encode(said))
    if size > _LARGEST_SAID:
        raise TooLarge(f"{subject} has {size} bytes; at most {_LARGEST_SAID} are taken")


def _node(visitor: _Visitor) -> NodeName:
    if visitor.node is None:
        raise Unauthenticated(
            "this runner has not shown a credential",
            hint="say hello with one, or join with a token from: kohaku node join-token",
        )
    return visitor.node


def _link(visitor: _Visitor, method: Method[Any, Any]) -> RunnerLink:
    _node(visitor)
    if visitor.link is None:
        raise Conflict(f"{method.name} comes after runner.register")
    return visitor.link
