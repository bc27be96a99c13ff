"""Those who look after nodes in a simulation: drain, label, remove, let in again.

Whatever they do they undo, and they ask until they are answered.

Knows: nodes by name, and what their labels should be.
Does not know: tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from kohaku_daemon.core.cluster.engine import ClusterEngine
from kohaku_daemon.core.cluster.events import (
    ClusterEvent,
    DrainAsked,
    JoinTokenAsked,
    LabelAsked,
    RemoveAsked,
)
from protocol.errors import Conflict, KohakuError, NotFound, Unavailable
from tests.simulation.host import Host
from tests.simulation.plan import Drain, MachinePlan, Relabel, Remove
from tests.simulation.stage import Stage, promise
from tests.simulation.uplink import Uplink
from tests.support.builders import OPERATOR

_AGAIN_S: Final = 3.0
_TOKEN_EVERY_S: Final = 10.0


class Operators:
    """Everybody who may touch nodes."""

    def __init__(self, stage: Stage, host: Host, uplinks: Mapping[str, Uplink]) -> None:
        self._stage = stage
        self._random = stage.chance()
        self._host = host
        self._uplinks = uplinks
        self._tokens = 0

    def drain(self, act: Drain) -> None:
        """Drain a node, and undrain it later."""
        self._until_answered(
            DrainAsked(OPERATOR, act.node, draining=True),
            lambda: self._stage.after(act.for_s, lambda: self._undrain(act.node)),
        )

    def relabel(self, act: Relabel) -> None:
        """Give a node another label, and its own back later."""
        self._until_answered(
            LabelAsked(OPERATOR, act.node, {"zone": "elsewhere"}, ()),
            lambda: self._stage.after(act.for_s, lambda: self._label(self._plan(act.node))),
        )

    def remove(self, act: Remove) -> None:
        """Take a node out and let it in again later; without force only if it is idle."""
        self._until_answered(
            RemoveAsked(OPERATOR, act.node, force=act.force),
            lambda: self._stage.after(act.back_after_s, lambda: self._let_in(act.node)),
        )

    def _undrain(self, node: str) -> None:
        self._until_answered(DrainAsked(OPERATOR, node, draining=False))

    def _label(self, machine: MachinePlan) -> None:
        self._until_answered(LabelAsked(OPERATOR, machine.name, {"zone": machine.zone}, ()))

    def _let_in(self, node: str) -> None:
        """Give a runner that is no node any more a join token, until it is one again."""
        engine = self._host.engine
        uplink = self._uplinks[node]
        if engine is not None and uplink.has_joined and self._is_known(engine, uplink):
            return
        self._tokens += 1
        digest = f"token-{self._tokens}"

        def give(value: object) -> None:
            if not isinstance(value, KohakuError):
                uplink.token = digest

        event = JoinTokenAsked(
            OPERATOR, digest=digest, prefix=digest, uses=1, lasts_s=600.0, node=node
        )
        self._later(lambda: self._host.ask(event, give))
        self._stage.after(_TOKEN_EVERY_S, lambda: self._let_in(node))

    def _is_known(self, engine: ClusterEngine, uplink: Uplink) -> bool:
        node = engine.state.fleet.nodes.get(uplink.node)
        return node is not None and node.record.credential == uplink.credential

    def _plan(self, node: str) -> MachinePlan:
        return self._uplinks[node].runner.machine.plan_

    def _until_answered(self, event: ClusterEvent, then: Callable[[], None] = lambda: None) -> None:
        answered = False

        def reply(value: object) -> None:
            nonlocal answered
            if answered or isinstance(value, Unavailable):
                return
            answered = True
            promise(
                not isinstance(value, KohakuError) or isinstance(value, NotFound | Conflict),
                "fair requests are granted",
                "{}: {!r}",
                event,
                value,
            )
            self._stage.tell("{}: {}", event, value if isinstance(value, KohakuError) else "done")
            then()

        def ask() -> None:
            if not answered:
                self._later(lambda: self._host.ask(event, reply))
                self._stage.after(_AGAIN_S, ask)

        ask()

    def _later(self, act: Callable[[], None]) -> None:
        self._stage.after(0.001 + 0.03 * self._random.random(), act)
