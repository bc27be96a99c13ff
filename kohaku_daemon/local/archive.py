"""The file a backup is: a tar archive with a manifest, written whole and read with suspicion.

Knows: the layout, the checksums, which names may be in it.
Does not know: what the files mean, where they come from or go to.

The first member is ``manifest.json``; the others are those it lists, in its order. Any tar can
list and unpack it by hand.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, BinaryIO, Final

import msgspec

from protocol.errors import BadRequest, NotFound, Unavailable, Unsupported

#: Of the layout. Raised when an older program could not restore what is in it.
FORMAT: Final = 1
_MANIFEST: Final = "manifest.json"
#: Names of files that a backup may lack.
SETTINGS: Final = "config/host.toml"
HOME: Final = "home/up.json"
#: Bytes. One line a file, and there are few.
_LONGEST_MANIFEST: Final = 2**20
#: Bytes read at once.
_BLOCK: Final = 2**20
#: A section and one plain name: never a path that leads elsewhere.
_NAME: Final = re.compile(r"(host|config|home)/[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


class Entry(msgspec.Struct, frozen=True):
    """One file of a backup."""

    #: ``host/tasks.sqlite``, ``config/host.toml``.
    name: str
    #: Bytes.
    size: int
    #: SHA-256, hexadecimal.
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup says of itself. Fields are added with defaults, never renamed."""

    format: int = FORMAT
    #: UTC seconds.
    made_at: float
    #: Version of the program that made it.
    program: str
    #: Snowflake id of the cluster, as text.
    cluster: str
    #: The host ran meanwhile, and so went on afterwards.
    host_ran: bool
    #: Version of each file's schema, by file.
    schemas: dict[str, int]
    #: Names in the data folder that are not in the backup.
    left_out: tuple[str, ...] = ()
    files: tuple[Entry, ...] = ()


def is_name(name: str) -> bool:
    """Say whether a file may be called so in a backup."""
    return _NAME.fullmatch(name) is not None


def write_archive(path: Path, manifest: Manifest, files: Mapping[str, Path]) -> Manifest:
    """Write an archive with these files by their names in it; give the manifest it has.

    The file is new, for our user only, and on the disk on return.

    Raises:
        OSError: It cannot be written, or a file not be read.
    """
    entries = tuple(_entry(name, file) for name, file in files.items())
    manifest = msgspec.structs.replace(manifest, files=entries)
    with open(path, "xb", opener=_open_for_us) as raw:
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
            text = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
            _add(tar, _MANIFEST, len(text), manifest.made_at, io.BytesIO(text))
            for entry in entries:
                with files[entry.name].open("rb") as file:
                    _add(tar, entry.name, entry.size, manifest.made_at, file)
        raw.flush()
        os.fsync(raw.fileno())
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read what a backup says of itself.

    Raises:
        NotFound: There is no such file.
        BadRequest: It is no backup.
        Unavailable: It cannot be read, or is damaged.
        Unsupported: A newer version of the program made it.
    """
    with _opened(path) as tar:
        return _manifest(tar, path)


def read_file(path: Path, name: str) -> bytes | None:
    """Read one small file of a backup; None if it has none of that name. Raises as ``unpack``."""
    with _opened(path) as tar:
        entries = {entry.name: entry for entry in _manifest(tar, path).files}
        entry = entries.get(name)
        if entry is None or entry.size > _LONGEST_MANIFEST:
            return None
        for before in entries.values():
            if before.name == name:
                break
            tar.next()
        out = io.BytesIO()
        _copy(tar, _find(tar, entry, path), entry, out, path)
        return out.getvalue()


def unpack(path: Path, folder: Path) -> Manifest:
    """Put a backup's files below an empty folder, as ``folder/host/tasks.sqlite``; all or error.

    Every file is compared with its checksum, and is on the disk on return.

    Raises:
        NotFound: There is no such backup.
        BadRequest: It is no backup, or has a member that none may have.
        Unavailable: It is damaged, or the folder cannot be written.
        Unsupported: A newer version of the program made it.
    """
    with _opened(path) as tar:
        manifest = _manifest(tar, path)
        for entry in manifest.files:
            member = _find(tar, entry, path)
            with _made(folder / entry.name) as out:
                _copy(tar, member, entry, out, path)
        _refuse_more(tar, path)
    return manifest


def verify(path: Path) -> Manifest:
    """Read all of a backup and compare it with its checksums. Raises as ``unpack``."""
    with _opened(path) as tar:
        manifest = _manifest(tar, path)
        for entry in manifest.files:
            _copy(tar, _find(tar, entry, path), entry, None, path)
        _refuse_more(tar, path)
    return manifest


# --- writing --------------------------------------------------------------------------------


def _entry(name: str, path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(name, file.tell(), digest)


def _add(tar: tarfile.TarFile, name: str, size: int, at: float, file: BinaryIO) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(at)
    tar.addfile(member, file)


# --- reading --------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    began = False
    try:
        with tarfile.open(path, "r:") as tar:
            began = True
            yield tar
    except FileNotFoundError:
        raise NotFound(f"there is no backup {path}") from None
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from error
    except (tarfile.TarError, EOFError) as error:
        if began:
            raise _damaged(path, str(error)) from error
        raise BadRequest(
            f"{path} is no backup: it is no tar archive",
            hint="backups come from: kohakud backup; one that was compressed is to be unpacked",
        ) from None


def _manifest(tar: tarfile.TarFile, path: Path) -> Manifest:
    """Read the first member, and refuse names and versions that are not for us."""
    first = tar.next()
    if first is None or first.name != _MANIFEST or not _is_plain(first):
        raise BadRequest(f"{path} is no backup: {_MANIFEST} is not its first file")
    text = _content(tar, first).read(_LONGEST_MANIFEST)
    try:
        version = msgspec.json.decode(text, type=dict[str, msgspec.Raw]).get("format")
        found = msgspec.json.decode(version, type=int) if version is not None else 0
        if found > FORMAT:
            raise Unsupported(
                f"{path} has format {found}; this program knows formats up to {FORMAT}",
                hint="restore it with the version of KohakuRiver that made it, or a newer one",
                details={"found": found, "known": FORMAT},
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except msgspec.MsgspecError as error:
        raise _damaged(path, f"its manifest: {error}") from error
    names = [entry.name for entry in manifest.files]
    for name in names:
        if not is_name(name) or names.count(name) > 1:
            raise _foreign(path, name)
    return manifest


def _find(tar: tarfile.TarFile, entry: Entry, path: Path) -> tarfile.TarInfo:
    """Go on to the next member, which must be this one."""
    member = tar.next()
    if member is None:
        raise _damaged(path, f"{entry.name} is missing")
    if member.name != entry.name or not _is_plain(member):
        raise _foreign(path, member.name)
    if member.size != entry.size:
        raise _damaged(path, f"{entry.name} has {member.size} bytes and should have {entry.size}")
    return member


def _copy(
    tar: tarfile.TarFile, member: tarfile.TarInfo, entry: Entry, out: IO[bytes] | FileIO | None,
    path: Path,
) -> None:  # fmt: skip
    """Pass a member's bytes on, and compare them with what was written."""
    digest = hashlib.sha256()
    content = _content(tar, member)
    while block := content.read(_BLOCK):
        digest.update(block)
        if out is not None:
            _write(out, block)
    if digest.hexdigest() != entry.sha256:
        raise _damaged(path, f"{entry.name} is not what was written")


def _refuse_more(tar: tarfile.TarFile, path: Path) -> None:
    extra = tar.next()
    if extra is not None:
        raise _foreign(path, extra.name)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None, "of plain files it gives one"
    return content


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether it is a file as we write it: no link, device, folder, or file with holes."""
    return member.type == tarfile.REGTYPE and not member.issparse()


@contextmanager
def _made(path: Path) -> Iterator[FileIO]:
    """Make a new file for our user only; it is on the disk at the end."""
    with _create(path) as file:
        yield file
        try:
            os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(path.parent, error) from error


def _create(path: Path) -> FileIO:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return open(path, "xb", buffering=0, opener=_open_for_us)
    except OSError as error:
        raise _cannot_write(path.parent, error) from error


def _open_for_us(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(out: IO[bytes] | FileIO, block: bytes) -> None:
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[out.write(rest) :]
    except OSError as error:
        raise _cannot_write(Path(out.name).parent, error) from error


def _cannot_write(folder: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot write below {folder}: {error.strerror}",
        hint="nothing was put in place; free some space or choose another folder with --data",
    )


def _damaged(path: Path, what: str) -> Unavailable:
    return Unavailable(
        f"the backup {path} is damaged: {what}",
        hint="nothing was put in place; take an older backup, or another copy of this one",
    )


def _foreign(path: Path, name: str) -> BadRequest:
    return BadRequest(
        f"{path} is refused: no backup of kohakud has a member {name!r} there",
        hint="nothing was put in place; who made this file?",
    )
