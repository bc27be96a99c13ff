"""What the runner keeps in its vault: launches, and who it is in the cluster.

Knows: under which keys, how it is written, that one thread does the writing.
Does not know: what launches go through (``core.node``), how one becomes a node (``uplink``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import msgspec

from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.store.vault import Vault
from protocol.errors import Unsupported

T = TypeVar("T")

_LAUNCH: Final = "launch/"
_IDENTITY: Final = "identity"


class Identity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who this runner is. Field names are the schema: add with defaults, never rename."""

    #: ``khr_`` and 256 random bits, made here before the host first hears of it.
    credential: str
    #: Digest of the join token that made it a node; empty while it is none.
    joined_with: str = ""

    def __repr__(self) -> str:
        return f"Identity(joined={bool(self.joined_with)})"


class Memory:
    """The vault, in the runner's terms. ``close`` closes the vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        # A thread of its own: in the shared pool a commit could wait for a disk that hangs.
        self._writer = ThreadPoolExecutor(1, "vault")

    def launches(self) -> list[LaunchRecord]:
        """Give every launch that is kept.

        Raises:
            Unsupported: One cannot be read. Going on without it could launch it twice.
            Unavailable: The disk failed or the file is damaged.
        """
        return [_read(key, value, LaunchRecord) for key, value in self._vault.items(_LAUNCH)]

    def identity(self) -> Identity | None:
        """Give who the runner is, if it has been decided.

        Raises:
            Unsupported: It cannot be read.
            Unavailable: The disk failed or the file is damaged.
        """
        value = self._vault.get(_IDENTITY)
        return None if value is None else _read(_IDENTITY, value, Identity)

    async def keep_identity(self, identity: Identity) -> None:
        """Keep who the runner is; on return it is on the disk.

        Raises:
            Unavailable: The disk is full or failed.
        """
        await self._write({_IDENTITY: msgspec.msgpack.encode(identity)}, ())

    async def keep_launches(self, launches: Mapping[str, bytes], gone: Iterable[str]) -> None:
        """Keep launches, made by ``encode_launch``, and forget others, all at once.

        Raises:
            Unavailable: The disk is full or failed. Nothing of it was kept.
        """
        puts = {_LAUNCH + key: value for key, value in launches.items()}
        await self._write(puts, [_LAUNCH + key for key in gone])

    def close(self) -> None:
        """Finish the write under way, and close the vault."""
        self._writer.shutdown()
        self._vault.close()

    async def _write(self, puts: Mapping[str, bytes], drops: Iterable[str]) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, self._vault.write, puts, drops)


def encode_launch(record: LaunchRecord) -> bytes:
    """Write a launch as it is now."""
    return msgspec.msgpack.encode(record)


def _read(key: str, value: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        raise Unsupported(
            f"the vault's entry {key} cannot be read: {error}",
            hint="was it written by a newer version? then start that one",
        ) from error
