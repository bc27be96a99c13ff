"""People at the door /v1/ws: hello, then every call through the gate to its handler."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

import kohaku_daemon
from kohaku_daemon.core.access.permissions import STRANGER, Actor
from kohaku_daemon.host.guard import vouch
from kohaku_daemon.host.handlers.calls import CALLS
from kohaku_daemon.host.handlers.watch import watch
from kohaku_daemon.host.parts import Call, Parts
from kohaku_daemon.loop_time import Purse
from kohaku_daemon.wire import ItemSink, Served
from protocol.errors import Forbidden, Unauthenticated, Unsupported
from protocol.ids import UserName
from protocol.messages.cluster import Watch
from protocol.messages.hello import Hello, Welcome
from protocol.methods import Method, StreamingMethod
from protocol.version import CAPABILITIES, OLDEST_VERSION, PROTOCOL_VERSION, agree


class ClientDoor:
    """Answers clients."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        #: One for all connections of somebody: opening more of them buys no more of the host.
        self._purses: dict[UserName, Purse] = {}

    async def hello(self, served: Served, params: Hello) -> Welcome:
        """Let somebody in. A stranger may come in, and be refused everything but the health."""
        actor = self._parts.gate.actor(params.token, served.address)
        served.actor = actor
        served.admit = partial(self._admit, actor)
        if actor is not STRANGER:
            served.purse = self._purses.setdefault(actor.user, Purse())
            vouch(served.transport, served.purse)
        return welcome(self._parts, params, actor)

    async def call(
        self, served: Served, method: Method[Any, Any], params: msgspec.Struct
    ) -> msgspec.Struct:
        """Answer a call."""
        handler = CALLS[method]
        answer: msgspec.Struct = await handler(self._make_call(served, method, params), params)
        return answer

    async def stream(
        self,
        served: Served,
        method: StreamingMethod[Any, Any, Any],
        params: msgspec.Struct,
        sink: ItemSink,
    ) -> msgspec.Struct:
        """Answer a streaming call: there is one for clients, ``watch``."""
        call = self._make_call(served, method, params)
        assert isinstance(params, Watch)
        return await watch(call, params, sink)

    def _admit(self, actor: Actor, method: Method[Any, Any] | None) -> None:
        if method is None:
            if actor is STRANGER:
                raise Unauthenticated(
                    "every method needs an API token",
                    hint="log in with: kohaku login URL, or set KOHAKU_TOKEN",
                )
            return
        try:
            self._parts.gate.check(actor, method)
        except Forbidden as error:
            # Strangers leave no line: whoever can connect could fill the disk.
            audit = self._parts.gate.audit(actor, method)
            if audit is not None:
                self._parts.loop.audit(audit, outcome=error.code)
            raise

    def _make_call(self, served: Served, method: Method[Any, Any], params: msgspec.Struct) -> Call:
        assert isinstance(served.actor, Actor), "hello comes first"
        return Call(self._parts, served.actor, self._parts.gate.audit(served.actor, method, params))


def welcome(parts: Parts, hello: Hello, actor: Actor) -> Welcome:
    """Answer a hello.

    Raises:
        Unsupported: The peer's version of the protocol is too old or too new.
    """
    spoken = agree(hello.version, hello.oldest)
    if spoken is None:
        older = hello.version < OLDEST_VERSION
        raise Unsupported(
            f"protocol version {hello.version} is not spoken here; "
            f"this host speaks {OLDEST_VERSION} to {PROTOCOL_VERSION}",
            hint="upgrade this program" if older else "upgrade the host first, then the others",
            details={"oldest": OLDEST_VERSION, "newest": PROTOCOL_VERSION},
        )
    return Welcome(
        version=spoken,
        cluster=parts.state.cluster,
        role=actor.role,
        user=actor.user,
        agent=f"kohakud/{kohaku_daemon.version()}",
        capabilities=CAPABILITIES,
        keep_alive_s=parts.config.keep_alive_s,
    )
