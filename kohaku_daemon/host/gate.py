"""The door: who is calling, whether they may, and the line in the audit log.

Knows: tokens of people and credentials of runners, by their digests.
Does not know: what methods do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from msgspec import Struct

from kohaku_daemon.clock import Clock
from kohaku_daemon.core.access.permissions import STRANGER, Actor, check_call
from kohaku_daemon.core.access.tokens import TokenKind, is_token, token_digest, token_prefix
from kohaku_daemon.core.cluster.records import AuditRecord, TokenRecord
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.host.refusals import Refusals
from protocol.errors import Unauthenticated
from protocol.ids import NodeName
from protocol.messages.environment import (
    CreateEnvironment,
    OneEnvironment,
    OneRegistry,
    OpenShell,
    PullEnvironment,
    SetRegistry,
)
from protocol.messages.node import LabelNode, MakeJoinToken, OneNode, RemoveNode
from protocol.messages.runner import Join
from protocol.messages.task import SteerTasks, SubmitTask
from protocol.methods import Method

_LOGIN_HINT: Final = "log in again with: kohaku login URL"
#: Characters. What is named in a call has not been checked yet and may be of any length.
_LONGEST_SUBJECT: Final = 1000


class Gate:
    """Lets people and runners in, or not."""

    def __init__(
        self,
        state: ClusterState,
        tokens: Iterable[TokenRecord],
        clock: Clock,
        refusals: Refusals,
    ) -> None:
        self._state = state
        self._tokens = {token.digest: token for token in tokens}
        self._clock = clock
        self._refusals = refusals

    def actor(self, token: str, address: str) -> Actor:
        """Say whose token this is; no token is a stranger's.

        Raises:
            Unauthenticated: It is nobody's, or has expired.
        """
        if not token:
            return STRANGER
        try:
            record = self._known(token)
        except Unauthenticated as error:
            self._refusals.note(address, "a token", error)
            raise
        return Actor(record.user, record.role, token_prefix(token), address)

    def _known(self, token: str) -> TokenRecord:
        if not is_token(TokenKind.API, token):
            raise Unauthenticated(
                "this is not an API token", hint="API tokens begin with kht_; " + _LOGIN_HINT
            )
        record = self._tokens.get(token_digest(token))
        if record is None:
            raise Unauthenticated("this API token is not known here", hint=_LOGIN_HINT)
        if 0 < record.expires_at <= self._clock.now():
            raise Unauthenticated(f"the API token {record.prefix}... has expired", hint=_LOGIN_HINT)
        return record

    def node(self, credential: str, address: str) -> NodeName:
        """Say which node's runner has this credential.

        Raises:
            Unauthenticated: No node's: it never joined, or was removed.
        """
        if is_token(TokenKind.RUNNER, credential):
            digest = token_digest(credential)
            for node in self._state.fleet.nodes.values():
                if node.record.credential == digest:
                    return node.name
        error = Unauthenticated(
            "this runner's credential is not known here: it never joined, or its node was removed",
            hint="let it join with a token from: kohaku node join-token",
        )
        self._refusals.note(address, "a runner", error)
        raise error

    def check(self, actor: Actor, method: Method[Any, Any]) -> None:
        """Let an actor call a method.

        Raises:
            Unauthenticated, Forbidden: It may not.
        """
        check_call(actor, method)

    def audit(
        self, actor: Actor, method: Method[Any, Any], params: Struct | None = None
    ) -> AuditRecord | None:
        """Write the line for the audit log, if the method leaves one.

        Without parameters it is of a call that was refused before they were looked at.
        """
        if not method.audited:
            return None
        return AuditRecord(
            at=self._clock.now(),
            actor=actor.user,
            role=actor.role,
            address=actor.address,
            method=method.name,
            subject=_subject(params)[:_LONGEST_SUBJECT],
        )


def bearer(header: str) -> str:
    """Take the token out of ``Authorization: Bearer TOKEN``; empty if there is none."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _subject(params: Struct | None) -> str:
    """Say what a call is about, without secrets, variables and command lines."""
    match params:
        case SubmitTask():
            count = len(params.targets) or params.array or len(params.rows) or 1
            return f"{count} x {params.spec.name or 'unnamed'}, request {params.request_id}"
        case SteerTasks():
            named = ", ".join(map(str, params.tasks[:20]))
            more = f" and {len(params.tasks) - 20} more" if len(params.tasks) > 20 else ""
            return f"batch {params.batch}" if params.batch is not None else f"tasks {named}{more}"
        case LabelNode():
            return f"node {params.node}: set {sorted(params.set)}, unset {sorted(params.unset)}"
        case OneNode() | RemoveNode() | Join():
            return f"node {params.node}"
        case MakeJoinToken():
            return f"{params.uses} uses for {params.node or 'any name'}"
        case CreateEnvironment():
            return f"environment {params.environment} from {params.image}"
        case OneEnvironment():
            return f"environment {params.environment}"
        case PullEnvironment():
            return f"environment {params.environment} to {' '.join(params.nodes[:20]) or 'all'}"
        case OpenShell():
            return f"environment {params.environment}"
        case SetRegistry():
            return f"registry {params.registry} as {params.username}"
        case OneRegistry():
            return f"registry {params.registry}"
        case _:
            return ""
