"""The names the cluster has at registries, and which one a reference to an image needs.

Knows: what a registry is called, where a reference says which one it means.
Does not know: how one is asked, where passwords are kept.
"""

from __future__ import annotations

import re
from typing import Final

from kohaku_daemon.core.cluster.actions import Answer
from kohaku_daemon.core.cluster.events import RegistryRemoveAsked, RegistrySetAsked
from kohaku_daemon.core.cluster.records import DropDocument, PutDocument, RegistryRecord
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState
from protocol.errors import BadRequest, NotFound
from protocol.models.environment import Credential, RegistryAccount

#: What a reference without a registry means, and the name under which Docker's own engine asks it.
DOCKER_HUB: Final = "docker.io"
_HUB_NAMES: Final = frozenset(
    {"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"}
)
#: A host name or an address with or without a port (distribution's reference grammar).
_REGISTRY: Final = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(?::[0-9]{1,5})?"
)
_LONGEST_REGISTRY: Final = 255
_LONGEST_NAME: Final = 256
#: Characters. Tokens of some registries are whole JSON documents.
_LONGEST_PASSWORD: Final = 16 * 1024
#: All are in one file that is written anew at each change.
_MOST: Final = 100


def parse_registry(text: str) -> str:
    """Read the name of a registry as people write it, with or without ``https://`` before it.

    Raises:
        BadRequest: It cannot be one.
    """
    name = text[: _LONGEST_REGISTRY + 50].strip().lower()
    name = name.removeprefix("https://").removeprefix("http://")
    name = name.removesuffix("/").removesuffix("/v1").removesuffix("/v2")
    if not _REGISTRY.fullmatch(name) or len(name) > _LONGEST_REGISTRY:
        raise BadRequest(
            f"{text[:100]!r} is not the name of a registry",
            hint="write its host name, with its port if that is not 443, such as ghcr.io",
        )
    return DOCKER_HUB if name in _HUB_NAMES else name


def registry_of(reference: str) -> str:
    """Give the registry that a reference means, as ``docker pull`` understands it."""
    first, slash, _ = reference.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        name = first.lower()
        return DOCKER_HUB if name in _HUB_NAMES else name
    return DOCKER_HUB


def credential_for(state: ClusterState, reference: str) -> Credential | None:
    """Give whom the cluster is where an image comes from; None if it is nobody there."""
    record = state.registries.get(registry_of(reference))
    return None if record is None else Credential(record.username, record.password)


def view_registries(state: ClusterState) -> tuple[RegistryAccount, ...]:
    """Show all names, without the passwords."""
    return tuple(
        RegistryAccount(record.registry, record.username, record.changed_at, record.changed_by)
        for _, record in sorted(state.registries.items())
    )


class Registries:
    """Carries out what is asked about registries."""

    def __init__(self, state: ClusterState, scribe: Scribe) -> None:
        self._state = state
        self._scribe = scribe

    def set(self, event: RegistrySetAsked) -> None:
        """Take a name and its password.

        Raises:
            BadRequest: One of the three cannot be right, or there are too many.
        """
        registry = parse_registry(event.registry)
        if not 0 < len(event.username) <= _LONGEST_NAME or not event.username.isprintable():
            raise BadRequest(f"username must have 1 to {_LONGEST_NAME} printable characters")
        if not 0 < len(event.password) <= _LONGEST_PASSWORD:
            raise BadRequest(f"password must have 1 to {_LONGEST_PASSWORD} characters")
        if registry not in self._state.registries and len(self._state.registries) >= _MOST:
            raise BadRequest(f"a cluster has names at {_MOST} registries at most")
        record = RegistryRecord(
            registry=registry,
            username=event.username,
            password=event.password,
            changed_at=self._scribe.now,
            changed_by=event.actor.user,
        )
        self._state.registries[registry] = record
        self._scribe.add(PutDocument(record))
        self._scribe.add(Answer(view_registries(self._state)))

    def remove(self, event: RegistryRemoveAsked) -> None:
        """Forget a name.

        Raises:
            NotFound: There is none for this registry.
        """
        registry = parse_registry(event.registry)
        if self._state.registries.pop(registry, None) is None:
            raise NotFound(
                f"the cluster has no name at {registry}", hint="see: kohaku registry list"
            )
        self._scribe.add(DropDocument(RegistryRecord, registry))
        self._scribe.add(Answer(view_registries(self._state)))
