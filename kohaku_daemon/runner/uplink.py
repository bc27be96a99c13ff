"""The link to the host, kept for ever: dials, joins once, hands over to ``Link``, dials again.

Knows: the credential and how it came to be, when to dial again, what to tell the log.
Does not know: what is said on an open link (``link``).

The log is told of changes only: a host that is away for a night leaves two lines.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from typing import Final, NoReturn, Protocol

import kohaku_daemon
from kohaku_daemon.core.access.tokens import TokenKind, make_token, token_digest, token_prefix
from kohaku_daemon.runner.config import RunnerConfig
from kohaku_daemon.runner.memory import Identity, Memory
from protocol.backoff import delay_s
from protocol.connection import Connection
from protocol.errors import BadRequest, Internal, KohakuError, Unauthenticated
from protocol.messages.runner import Join, Registered
from protocol.methods import RUNNER_JOIN

_log = logging.getLogger(__name__)

PATH: Final = "/v1/runner"
_DIAL_S: Final = 10.0
_JOIN_S: Final = 60.0
#: Seconds between tries of a runner whose credential the host does not know: somebody has to
#: act before another try can go better.
_STRANGER_RETRY_S: Final = 60.0
#: A link that held for so long was a good one: the next wait begins small again.
_GOOD_LINK_S: Final = 10.0


class Conversation(Protocol):
    """What is said on an open link."""

    async def register(self, connection: Connection) -> Registered:
        """Say what this node has."""

    async def serve(self, connection: Connection, registered: Registered) -> KohakuError:
        """Go on until the link ends; give why it did."""


class _NotKnown(Unauthenticated):
    """The host does not know the credential of a runner that was a node."""


class Uplink:
    """Dials for ever."""

    def __init__(self, config: RunnerConfig, memory: Memory, conversation: Conversation) -> None:
        self._config = config
        self._memory = memory
        self._conversation = conversation
        self._agent = f"kohakud {kohaku_daemon.version()}"
        #: What the log was told last.
        self._told = ""

    async def run(self) -> NoReturn:
        """Keep the link until cancelled."""
        tries = 0
        clock = asyncio.get_running_loop()
        while True:
            began = clock.time()
            error = await self._try_link()
            if clock.time() - began > _GOOD_LINK_S:
                tries = 0
            await asyncio.sleep(self._wait_s(error, tries))
            tries += 1

    async def _try_link(self) -> KohakuError:
        """Dial, and stay as long as it lasts; give why it ended."""
        try:
            error = await self._link()
        except KohakuError as refusal:
            error = refusal
        except Exception as bug:
            incident = secrets.token_hex(4)
            _log.error("the link failed, incident %s", incident, exc_info=bug)
            return Internal(f"the link failed here, incident {incident}")
        self._tell(logging.WARNING, error.message, error.hint)
        return error

    async def _link(self) -> KohakuError:
        identity = await self._identity()
        try:
            connection = await self._dial(identity)
        except Unauthenticated as error:
            if identity.joined_with:
                raise await self._not_known(identity) from error
            raise
        async with connection:
            if not identity.joined_with:
                await self._join(connection, identity)
            registered = await self._conversation.register(connection)
            self._tell(logging.INFO, f"linked to {connection.url} as node {registered.node}")
            return await self._conversation.serve(connection, registered)

    async def _dial(self, identity: Identity) -> Connection:
        return await Connection.dial(
            self._config.host,
            token=identity.credential if identity.joined_with else "",
            path=PATH,
            agent=self._agent,
            timeout_s=_DIAL_S,
        )

    # Becoming a node ----------------------------------------------------------------

    async def _identity(self) -> Identity:
        """Give who we are; decided, and on the disk, before the host first hears of it.

        So an answer to a join may be lost: the same join is answered again.
        """
        identity = self._memory.identity()
        if identity is None:
            identity = Identity(credential=_make_credential())
            await self._memory.keep_identity(identity)
        return identity

    async def _join(self, connection: Connection, identity: Identity) -> None:
        token = self._config.read_join_token()
        if not token:
            raise Unauthenticated(
                "this runner is no node of a cluster yet, and has no join token",
                hint='make one with "kohaku node join-token" and set join_token_file to its file',
            )
        join = Join(
            token=token,
            node=self._config.name,
            credential=identity.credential,
            labels=self._config.labels,
        )
        try:
            joined = await connection.call(RUNNER_JOIN, join, timeout_s=_JOIN_S)
        except Unauthenticated as error:
            message = f"the host does not let this runner join: {error.message}"
            raise Unauthenticated(message, hint=error.hint) from error
        await self._memory.keep_identity(
            Identity(credential=identity.credential, joined_with=token_digest(token))
        )
        _log.info("joined", extra={"node": joined.node, "cluster": joined.cluster})

    async def _not_known(self, identity: Identity) -> KohakuError:
        """Say what the host's word means, and become a stranger if there is a way back in.

        The node was removed, or the host is another one than before. Only a join token that
        was not used yet is a person's leave to join anew; tasks here go on either way.
        """
        try:
            token = self._config.read_join_token()
        except BadRequest:
            token = ""  # a file that was taken away after the join is as good as none
        if token and token_digest(token) != identity.joined_with:
            await self._memory.keep_identity(Identity(credential=_make_credential()))
            return Unauthenticated(
                "the host no longer knows this runner; joining anew with the join token "
                f"{token_prefix(token)}..."
            )
        return _NotKnown(
            f"the host at {self._config.host} does not know this runner's credential: "
            "its node was removed, or this is another host; tasks go on",
            hint='to join anew: make a token with "kohaku node join-token", give it to this runner',
        )

    # Trying again -------------------------------------------------------------------

    def _wait_s(self, error: KohakuError, tries: int) -> float:
        share = random.random()
        if isinstance(error, _NotKnown):
            return _STRANGER_RETRY_S * (0.5 + share / 2)
        return delay_s(tries, share, longest_s=self._config.reconnect_max_s)

    def _tell(self, level: int, text: str, hint: str = "") -> None:
        if text != self._told:
            self._told = text
            _log.log(level, "%s%s", text, f" ({hint})" if hint else "")


def _make_credential() -> str:
    return make_token(TokenKind.RUNNER, secrets.token_bytes(32))
