"""What is written is read again byte by byte, and everything else is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kohaku_daemon.local.archive import (
    Manifest,
    is_name,
    read_file,
    read_manifest,
    unpack,
    verify,
    write_archive,
)
from protocol.errors import BadRequest, KohakuError, NotFound, Unavailable, Unsupported

PLAIN = Manifest(
    made_at=1_800_000_000.0, program="0.1", cluster="77", host_ran=True, schemas={"a": 1}
)
FILES = {
    "host/tasks.sqlite": os.urandom(3_000_000),
    "host/empty": b"",
    "config/host.toml": b"port = 8000\n",
}


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    made = {}
    for name, data in FILES.items():
        path = tmp_path / name.replace("/", "-")
        path.write_bytes(data)
        made[name] = path
    write_archive(tmp_path / "b.tar", PLAIN, made)
    return tmp_path / "b.tar"


def unpacked(backup: Path) -> dict[str, bytes]:
    folder = backup.parent / "out"
    folder.mkdir()
    unpack(backup, folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_backup_holds_what_was_put_in(backup: Path) -> None:
    assert backup.stat().st_mode & 0o777 == 0o600
    assert read_manifest(backup) == verify(backup)
    assert msgspec.structs.replace(read_manifest(backup), files=()) == PLAIN
    assert unpacked(backup) == FILES
    out = backup.parent / "out"
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o700}
    assert read_file(backup, "config/host.toml") == FILES["config/host.toml"]
    assert read_file(backup, "home/up.json") is None


def test_any_tar_can_list_it(backup: Path) -> None:
    with tarfile.open(backup) as tar:
        assert tar.getnames() == ["manifest.json", *FILES]


def test_nothing_is_overwritten(backup: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        write_archive(backup, PLAIN, {})
    (tmp_path / "out/host").mkdir(parents=True)
    (tmp_path / "out/host/empty").write_text("mine")
    with pytest.raises(Unavailable, match=r"cannot write below .*: File exists"):
        unpack(backup, tmp_path / "out")
    assert (tmp_path / "out/host/empty").read_text() == "mine"


def test_each_turned_bit_and_each_cut_is_noticed(backup: Path) -> None:
    data = backup.read_bytes()
    # In the middle of a file's content, of its header and of the manifest.
    for place in (len(data) // 2, 700, data.index(b'"made_at"') + 3, data.index(b"host/empty")):
        torn = bytearray(data)
        torn[place] ^= 4
        backup.write_bytes(torn)
        with pytest.raises(KohakuError, match=r"b\.tar"):
            verify(backup)
    for cut in (0, 100, 513, 2000, len(data) // 2, len(data) - 20_000):
        backup.write_bytes(data[:cut])
        with pytest.raises(KohakuError, match=r"b\.tar"):
            verify(backup)
    backup.write_bytes(data)
    verify(backup)


def test_what_is_no_backup_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no backup"):
        read_manifest(tmp_path / "absent.tar")
    other = tmp_path / "other.tar"
    other.write_bytes(b"\x1f\x8b something compressed" * 100)
    with pytest.raises(BadRequest, match="no tar archive"):
        read_manifest(other)
    with tarfile.open(other, "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.txt"))
    with pytest.raises(BadRequest, match=r"manifest\.json is not its first file"):
        read_manifest(other)
    with pytest.raises(Unavailable, match=r"cannot read .*Is a directory"):
        read_manifest(tmp_path)


def test_a_newer_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    later = {"format": 9, "made_at": "written in another way"}
    path = hostile(tmp_path, [], manifest=later)
    with pytest.raises(Unsupported, match="has format 9; this program knows formats up to 1"):
        read_manifest(path)


def hostile(
    folder: Path, members: list[tarfile.TarInfo], manifest: dict[str, Any] | None = None
) -> Path:
    """Make an archive that lists each of these as if all were well."""
    path = folder / "hostile.tar"
    listed = [{"name": member.name, "size": 0, "sha256": EMPTY} for member in members]
    text = json.dumps(manifest or msgspec.to_builtins(PLAIN) | {"files": listed}).encode()
    with tarfile.open(path, "w") as tar:
        first = tarfile.TarInfo("manifest.json")
        first.size = len(text)
        tar.addfile(first, io.BytesIO(text))
        for member in members:
            tar.addfile(member)
    return path


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def test_a_plain_member_of_the_kind_used_below_is_taken(tmp_path: Path) -> None:
    verify(hostile(tmp_path, [member("host/a")]))


@pytest.mark.parametrize(
    "members",
    [
        [member("../evil")],
        [member("host/../../evil")],
        [member("/etc/evil")],
        [member("host/..")],
        [member("host/.hidden")],
        [member("host/a/b")],
        [member("elsewhere/a")],
        [member("host/a\nb")],
        [member("host/a"), member("host/a")],
        [member("host/a", tarfile.SYMTYPE, "/etc/passwd")],
        [member("host/a", tarfile.LNKTYPE, "../../etc/passwd")],
        [member("host/a", tarfile.DIRTYPE)],
        [member("host/a", tarfile.FIFOTYPE)],
        [member("host/a", tarfile.CHRTYPE)],
        [member("host/a", tarfile.GNUTYPE_SPARSE)],
    ],
    ids=lambda members: f"{members[0].name!r} {members[0].type.decode()}",
)
def test_members_that_lead_elsewhere_are_refused(
    members: list[tarfile.TarInfo], tmp_path: Path
) -> None:
    path = hostile(tmp_path, members)
    out = tmp_path / "deep/out"
    out.mkdir(parents=True)
    with pytest.raises(KohakuError, match=r"hostile\.tar"):
        unpack(path, out)
    left = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert left == [path], "nothing was written anywhere"


def swapped(listed: list[str], there: list[str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        files = [{"name": name, "size": 0, "sha256": EMPTY} for name in listed]
        return hostile(
            folder,
            [member(name) for name in there],
            manifest=msgspec.to_builtins(PLAIN) | {"files": files},
        )

    return make


@pytest.mark.parametrize(
    "make",
    [
        swapped(["host/a"], ["host/b"]),
        swapped(["host/a"], []),
        swapped(["host/a"], ["host/a", "host/b"]),
        swapped([], ["../evil"]),
    ],
)
def test_members_are_those_the_manifest_lists(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(KohakuError, match=r"hostile\.tar"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["host/tasks.sqlite", "home/up.json", "host/ssh_host_key.pub"])
def test_names_of_files_that_hosts_have(name: str) -> None:
    assert is_name(name)
