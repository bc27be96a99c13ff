"""What the image of tasks without an image has of the machine."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from kohaku_daemon.backends.docker.images.machine import build_machine_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("usr/bin", "lib32", "etc/ssl/certs", "etc/alternatives"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "etc/ld.so.cache").write_bytes(b"cache")
    (tmp_path / "etc/shadow").write_text("root:secret")
    (tmp_path / "etc/passwd").write_text("alice:x:1000:1000::/home/alice:/bin/sh")
    (tmp_path / "etc/alternatives/awk").symlink_to("/usr/bin/mawk")
    (tmp_path / "etc/ssl/certs/mine.pem").write_text("certificate")
    (tmp_path / "etc/ssl/certs/closed.key").write_text("key")
    (tmp_path / "etc/ssl/certs/closed.key").chmod(0o640)
    return tmp_path


def open_content(content: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(content))


def read(tar: tarfile.TarFile, name: str) -> str:
    file = tar.extractfile(name)
    assert file is not None
    return file.read().decode()


def test_it_has_what_programs_need_and_nothing_that_says_who_is_who(root: Path) -> None:
    tar = open_content(build_machine_image([Path("/usr")], root).content)
    names = tar.getnames()
    assert read(tar, "etc/ld.so.cache") == "cache"
    assert tar.getmember("etc/alternatives/awk").linkname == "/usr/bin/mawk"
    assert "etc/ssl/certs/mine.pem" in names
    assert "etc/shadow" not in names
    assert "etc/ssl/certs/closed.key" not in names, "not what others may not read"
    assert "alice" not in read(tar, "etc/passwd")
    assert tar.getmember("tmp").mode == 0o1777


def test_links_into_usr_are_links_and_folders_of_their_own_are_mounted(root: Path) -> None:
    image = build_machine_image([Path("/usr"), Path("/opt")], root)
    assert open_content(image.content).getmember("bin").linkname == "usr/bin"
    assert image.folders == ("/usr", "/lib32"), "and what is not there is not"


def test_the_same_machine_is_the_same_image_and_another_one_is_not(root: Path) -> None:
    first = build_machine_image([Path("/usr")], root)
    assert build_machine_image([Path("/usr")], root) == first
    (root / "etc/ld.so.cache").write_bytes(b"more")
    assert build_machine_image([Path("/usr")], root).reference != first.reference
