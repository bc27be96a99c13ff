"""cluster.json: nodes, tokens, environments and the like: small, and readable by an admin.

Knows: how records become JSON, and how a file is replaced so that there is always a whole one.
Does not know: what these are for. Tasks and what else grows are in ``store.tasks``.

TinyDB's own storage writes in place, and a process killed at the wrong instant leaves a file
that cannot be read. Ours writes a new file beside it, syncs that, and renames it over the old.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from tinydb import TinyDB, where
from tinydb.storages import Storage

from kohaku_daemon.core.cluster.records import (
    Document,
    DocumentChange,
    DropDocument,
    EnvironmentRecord,
    JoinTokenRecord,
    NodeRecord,
    PutDocument,
    RegistryRecord,
    TokenRecord,
)
from kohaku_daemon.store import migrations
from kohaku_daemon.store.migrations import Tables, check_known, migrate_tables
from protocol.errors import Unavailable

R = TypeVar("R", NodeRecord, TokenRecord, JoinTokenRecord, EnvironmentRecord, RegistryRecord)


@dataclass(frozen=True, slots=True)
class _Table:
    """Where records of one kind are kept, and the field that tells them apart."""

    name: str
    key: str


_TABLES: Final[Mapping[type[Document], _Table]] = {
    NodeRecord: _Table("nodes", "name"),
    TokenRecord: _Table("tokens", "digest"),
    JoinTokenRecord: _Table("join_tokens", "digest"),
    EnvironmentRecord: _Table("environments", "name"),
    RegistryRecord: _Table("registries", "registry"),
}


_NUMBERS: Final = re.compile(r"\[\n([\d.,\s-]+)\]")


@dataclass(frozen=True, slots=True)
class Book:
    """All of cluster.json."""

    #: Snowflake id of the cluster, as text.
    cluster: str
    #: How often the cluster came back from a backup: ids made before and after differ in it.
    epoch: int
    #: By name.
    nodes: dict[str, NodeRecord]
    #: By digest.
    tokens: dict[str, TokenRecord]
    #: By digest.
    join_tokens: dict[str, JoinTokenRecord]
    #: By name.
    environments: dict[str, EnvironmentRecord]
    #: By host name and port.
    registries: dict[str, RegistryRecord]


class Glance(NamedTuple):
    """What is seen of a file of any version without opening it for writing."""

    schema: int
    #: Snowflake id of the cluster, as text.
    cluster: str
    has_nodes: bool


class Documents:
    """The open file. One thread at a time."""

    def __init__(self, path: Path, database: TinyDB, storage: _ReplacedFile) -> None:
        self._path = path
        self._database = database
        self._storage = storage

    def __repr__(self) -> str:
        return f"Documents({str(self._path)!r})"

    @classmethod
    def open(cls, path: Path, *, new_cluster: str) -> Documents:
        """Open the file and bring its schema up to date, or make it for ``new_cluster``.

        Raises:
            Unsupported: A newer version of the program wrote the file.
            Unavailable: The file cannot be read or written, or is damaged; it is left as it is.
        """
        tables = _load(path)
        if tables is None:
            tables = {"meta": {"1": {"schema": 0, "cluster": new_cluster}}}
        meta = _meta(tables, path)
        check_known(meta["schema"], migrations.CLUSTER, path)
        found = meta["schema"]
        meta["schema"] = migrate_tables(tables, found, migrations.CLUSTER, path)
        database = TinyDB(storage=_ReplacedFile, path=path, tables=tables)
        storage = database.storage
        assert isinstance(storage, _ReplacedFile)
        documents = cls(path, database, storage)
        documents.read()  # a damaged record is found now, not at the next restart
        if found != meta["schema"]:
            storage.save()
        return documents

    def read(self) -> Book:
        """Give everything, from memory.

        Raises:
            Unavailable: A record cannot be understood, or two have the same key.
        """
        meta = _meta(self._storage.tables, self._path)
        return Book(
            cluster=meta["cluster"],
            epoch=meta.get("epoch", 0),
            nodes=self._records(NodeRecord),
            tokens=self._records(TokenRecord),
            join_tokens=self._records(JoinTokenRecord),
            environments=self._records(EnvironmentRecord),
            registries=self._records(RegistryRecord),
        )

    def apply(self, changes: Iterable[DocumentChange]) -> None:
        """Carry out all changes with one replacement of the file; on return it is on the disk.

        Raises:
            Unavailable: The disk is full or failed. None of the changes was kept.
        """
        with self._storage.held():
            for change in changes:
                match change:
                    case PutDocument(record):
                        self._put(record)
                    case DropDocument(kind, key):
                        table = _TABLES[kind]
                        self._database.table(table.name).remove(where(table.key) == key)

    def raise_epoch(self) -> None:
        """Note that the cluster comes back from a backup. Raises as ``apply``."""
        with self._storage.held():
            meta = _meta(self._storage.tables, self._path)
            meta["epoch"] = meta.get("epoch", 0) + 1

    def _put(self, record: Document) -> None:
        where_kept = _TABLES[type(record)]
        fields = msgspec.to_builtins(record)
        table = self._database.table(where_kept.name)
        # Not upsert: that merges, and fields that now have their default are not written.
        if not table.update(_become(fields), where(where_kept.key) == fields[where_kept.key]):
            table.insert(fields)

    def _records(self, kind: type[R]) -> dict[str, R]:
        table = _TABLES[kind]
        records: dict[str, R] = {}
        for document in self._database.table(table.name):
            try:
                record = msgspec.convert(dict(document), kind)
            except msgspec.ValidationError as error:
                what = f"record {document.doc_id} of {table.name!r} makes no sense: {error}"
                raise _damaged(self._path, what) from error
            key: str = getattr(record, table.key)
            if key in records:
                raise _damaged(self._path, f"two records of {table.name!r} are called {key!r}")
            records[key] = record
        return records


class _ReplacedFile(Storage):
    """TinyDB's storage: all tables in memory, and a file that is replaced as a whole."""

    def __init__(self, path: Path, tables: Tables) -> None:
        self.tables = tables
        self._path = path
        self._saved = _render(tables)
        self._held = False

    def read(self) -> Tables:
        return self.tables

    def write(self, data: Tables) -> None:
        self.tables = data
        if not self._held:
            self.save()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Save once at the end what the block writes, or forget all of it."""
        self._held = True
        try:
            yield
            self.save()
        except BaseException:
            self.tables = json.loads(self._saved)
            raise
        finally:
            self._held = False

    def save(self) -> None:
        """Replace the file.

        Raises:
            Unavailable: The disk is full or failed; the old file is still there.
        """
        text = _render(self.tables)
        try:
            _replace(self._path, text.encode() + b"\n")
        except OSError as error:
            raise Unavailable(
                f"cannot write {self._path}: {error.strerror}",
                hint="free some space or repair the file system; nothing of this change was kept",
                details={"store": str(self._path), "reason": error.strerror or ""},
            ) from error
        self._saved = text


def _become(fields: dict[str, Any]) -> Callable[[MutableMapping[str, Any]], None]:
    def change(document: MutableMapping[str, Any]) -> None:
        document.clear()
        document.update(fields)

    return change


def _render(tables: Tables) -> str:
    """Write JSON for people: indented, but the numbers of a node's cores on one line."""
    text = json.dumps(tables, indent=2, ensure_ascii=False)
    # A line break is always JSON's own: in strings it is escaped.
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def _replace(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of the file so that a crash leaves the old one or the new one.

    The folder is synced too: a rename is durable only then (``man 2 fsync``).
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(os.open(fresh, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def examine(path: Path) -> Glance | None:
    """Look whether the file is whole and of a version we know; None if there is no file.

    Raises:
        Unsupported: A newer version of the program wrote the file.
        Unavailable: The file cannot be read, or is damaged.
    """
    tables = _load(path)
    if tables is None:
        return None
    meta = _meta(tables, path)
    check_known(meta["schema"], migrations.CLUSTER, path)
    return Glance(meta["schema"], meta["cluster"], has_nodes=bool(tables.get("nodes")))


def _load(path: Path) -> Tables | None:
    try:
        tables = msgspec.convert(json.loads(path.read_bytes()), Tables)
        # Half of a surrogate pair can be read, and not be written again.
        _render(tables).encode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(
            f"cannot read {path}: {error.strerror}", hint="let this program read and write it"
        ) from error
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise _damaged(path, str(error)) from error
    if not all(number.isdecimal() for table in tables.values() for number in table):
        raise _damaged(path, "its records are not numbered")
    return tables


def _meta(tables: Tables, path: Path) -> dict[str, Any]:
    match list(tables.get("meta", {}).values()):
        case [{"schema": int(schema), "cluster": str()} as meta] if schema >= 0 and isinstance(
            meta.get("epoch", 0), int
        ):
            return meta
        case _:
            raise _damaged(path, "its table 'meta' has no schema version and cluster id")


def _damaged(path: Path, what: str) -> Unavailable:
    return Unavailable(
        f"{path} is damaged: {what}",
        hint="it was left as it is: repair it by hand, or move the host's data folder aside and "
        "bring a backup back with kohakud restore",
        details={"store": str(path)},
    )
