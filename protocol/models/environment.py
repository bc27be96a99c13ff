"""Environments as both ends see them: what a container is made of, and where that is."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from protocol.ids import NodeName, UserName


class Version(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One packed state of an environment: a file that never changes, and its image.

    The file is what ``docker save`` writes, compressed with zstd, under the name
    ``DIGEST.tar.zst``. Beside it, ``DIGEST.pieces`` has the SHA-256 of each 4 MiB of it.
    """

    #: SHA-256 of the file, hexadecimal.
    digest: str
    #: Bytes of the file.
    size: int
    #: SHA-256 of the list of pieces, hexadecimal.
    pieces: str
    #: Id of the image that it holds, ``sha256:...``.
    image: str
    #: UTC seconds.
    packed_at: float = 0.0
    packed_by: UserName = UserName("")


class EnvironmentState(StrEnum):
    """What is being done with an environment on the host machine."""

    #: Its image is fetched and its container made.
    CREATING = "creating"
    #: It can be entered and packed.
    READY = "ready"
    PACKING = "packing"
    #: It could not be made; ``trouble`` says why. Delete it, or create it again.
    FAILED = "failed"

    __hash__ = str.__hash__


class Environment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One environment."""

    name: str
    #: The image it was made from.
    source: str = ""
    state: EnvironmentState = EnvironmentState.READY
    #: How far the work at hand is, such as ``packing 43 %``; empty if there is none.
    progress: str = ""
    #: What went wrong with the last work.
    trouble: str = ""
    created_at: float = 0.0
    created_by: UserName = UserName("")
    #: What was packed and is kept, the newest first. Tasks run in the first.
    versions: tuple[Version, ...] = ()
    #: Where the newest version is, and where it is on its way. Filled by ``environment.show`` only.
    nodes: tuple[Presence, ...] = ()


class Presence(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far one node is with an image."""

    node: NodeName
    #: ``present``, or a share such as ``43 %``, or why it cannot be brought there.
    state: str


class WantedImage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The image a task runs in, as the host tells its runner. One of the two halves is set."""

    #: Name of the environment, and the version that its batch runs in.
    environment: str = ""
    version: Version | None = None
    #: Reference in a registry, as it was submitted.
    reference: str = ""


class ImageReading(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image of ours on a node."""

    #: Of the version: SHA-256 of its file.
    digest: str
    #: It can be run now.
    present: bool = False
    #: Per cent of the way here, while it is not.
    percent: float = 0.0
    #: Why it is not on its way any more.
    trouble: str = ""


class RegistryAccount(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whom the cluster is to a registry, without the password."""

    #: Host name and port of the registry, such as ``ghcr.io``.
    registry: str
    username: str
    changed_at: float = 0.0
    changed_by: UserName = UserName("")


class Credential(msgspec.Struct, frozen=True):
    """Whom the cluster is to a registry. Told to runners for a pull, and never stored by them."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Credential({self.username!r})"
