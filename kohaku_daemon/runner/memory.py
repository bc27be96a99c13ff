"""What the runner keeps in its vault: launches, and who it is in the cluster.

Knows: under which keys, how it is written, that one thread does the writing.
Does not know: what launches go through (``core.node``), how one becomes a node (``uplink``).

A launch has a row of its own until it is settled. What stays of it then, a fence, shares a
row with those that were settled together: 10,000 of them are kept, and each is written once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final, NamedTuple, TypeVar

import msgspec

from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.store.vault import Vault
from kohaku_daemon.writer import OnDone, Writer
from protocol.errors import Unsupported

T = TypeVar("T")

_LAUNCH: Final = "launch/"
_FENCES: Final = "fences/"
_IDENTITY: Final = "identity"

_encode: Final = msgspec.msgpack.Encoder().encode


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
        self._writer = Writer("vault")
        #: Known once the vault has been read.
        self._fences: _FenceRows | None = None

    def launches(self) -> list[LaunchRecord]:
        """Give every launch that is kept, settled ones too.

        Raises:
            Unsupported: One cannot be read. Going on without it could launch it twice.
            Unavailable: The disk failed or the file is damaged.
        """
        rows, found = _FenceRows(), list[LaunchRecord]()
        for key, value in self._vault.items(_FENCES):
            group = _read(key, value, list[LaunchRecord])
            rows.found(key, len(group))
            found += group
        for key, value in self._vault.items(_LAUNCH):
            record = _read(key, value, LaunchRecord)
            found.append(record)
            if record.settled:  # as an earlier version kept it
                rows.found(key, 1)
        if self._fences is None:
            self._fences = rows
        return found

    def identity(self) -> Identity | None:
        """Give who the runner is, if it has been decided.

        Raises:
            Unsupported: It cannot be read.
            Unavailable: The disk failed or the file is damaged.
        """
        value = self._vault.get(_IDENTITY)
        return None if value is None else _read(_IDENTITY, value, Identity)

    def credential(self) -> str:
        """Give what the runner shows the host; empty before it has one. Raises as ``identity``."""
        identity = self.identity()
        return identity.credential if identity is not None else ""

    async def keep_identity(self, identity: Identity) -> None:
        """Keep who the runner is; on return it is on the disk.

        Raises:
            Unavailable: The disk is full or failed.
        """
        row = {_IDENTITY: msgspec.msgpack.encode(identity)}
        await self._writer.run(partial(self._vault.write, row))

    def keep_launches(
        self,
        launches: Mapping[str, LaunchRecord],
        on_done: OnDone,
        gone: Iterable[str] = (),
        then: Callable[[], None] | None = None,
        *,
        void: Iterable[str] = (),
    ) -> None:
        """Keep launches as they are now, and forget settled ones, all at once.

        ``gone`` are the keys of the oldest fences, ``void`` those of launches of which nothing
        may stay unless they are among ``launches``. ``then`` is called by the writing thread
        once all is on the disk, and ``on_done`` after it on the event loop, with None or why it
        failed: Unavailable if the disk is full or failed, and nothing of it was kept. Repeating
        it after a failure is right.
        """
        if self._fences is None:
            self.launches()
        assert self._fences is not None
        puts: dict[str, bytes] = {}
        settled = []
        for key, record in launches.items():
            if record.settled:
                settled.append(record)
            else:
                puts[_LAUNCH + key] = _encode(record)
        drops = [_LAUNCH + record.key for record in settled] + [_LAUNCH + key for key in void]
        change = self._fences.plan(settled, sum(1 for _ in gone))
        puts |= change.puts
        work = partial(self._write_launches, puts, drops + change.drops, then)
        self._writer.put(work, partial(self._take_note, change, on_done))

    def close(self) -> None:
        """Finish the write under way, and close the vault."""
        self._writer.close()
        self._vault.close()

    def _write_launches(
        self, puts: Mapping[str, bytes], drops: Iterable[str], then: Callable[[], None] | None
    ) -> None:
        self._vault.write(puts, drops)
        if then is not None:
            then()

    def _take_note(
        self, change: _FenceChange, on_done: OnDone, error: BaseException | None
    ) -> None:
        if error is None and self._fences is not None:
            self._fences.apply(change)
        on_done(error)


class _FenceChange(NamedTuple):
    """What one commit does to the rows of fences."""

    puts: dict[str, bytes]
    drops: list[str]
    #: Fences in the new row, and how many of the oldest are forgotten.
    added: int
    forgotten: int


class _FenceRows:
    """Which rows hold fences, the oldest first, and how many each has left.

    A row goes when as many as it held have been forgotten: they are forgotten in the order
    they came.
    """

    def __init__(self) -> None:
        self._rows: deque[tuple[str, int]] = deque()
        self._next = 0
        #: Fences of the first row that are forgotten.
        self._forgotten = 0

    def found(self, key: str, count: int) -> None:
        """Take note of a row that is in the vault."""
        self._rows.append((key, count))
        if key.startswith(_FENCES):
            self._next = int(key.removeprefix(_FENCES), 16) + 1

    def plan(self, records: list[LaunchRecord], forgotten: int) -> _FenceChange:
        """Say what is to be written. Changes nothing."""
        puts = {f"{_FENCES}{self._next:016x}": _encode(records)} if records else {}
        drops, left = [], self._forgotten + forgotten
        for key, count in self._rows:
            if left < count:
                break
            drops.append(key)
            left -= count
        return _FenceChange(puts, drops, len(records), forgotten)

    def apply(self, change: _FenceChange) -> None:
        """Take note that it was written."""
        self._forgotten += change.forgotten
        for _ in change.drops:
            self._forgotten -= self._rows.popleft()[1]
        for key in change.puts:
            self.found(key, change.added)


def _read(key: str, value: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        raise Unsupported(
            f"the vault's entry {key} cannot be read: {error}",
            hint="was it written by a newer version? then start that one",
        ) from error
