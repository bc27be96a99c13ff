"""Whoever started a daemon learns that it is ready, all at once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kohaku_daemon.local.readiness import notify_systemd, url_file


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, *, abstract: bool) -> None:
    path = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("\0" + path[1:] if abstract else path)
        channel.settimeout(5)
        notify_systemd("READY=1", {"NOTIFY_SOCKET": path})
        assert channel.recv(100) == b"READY=1"


def test_nobody_listening_is_no_error(tmp_path: Path) -> None:
    notify_systemd("READY=1", {})
    notify_systemd("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})


def test_the_url_is_there_only_while_the_daemon_is_ready(tmp_path: Path) -> None:
    path = tmp_path / "host.url"
    path.write_text("http://old\n")
    with url_file(path) as file:
        assert not path.exists()
        file.write("http://127.0.0.1:8000")
        assert path.read_text() == "http://127.0.0.1:8000\n"
    assert list(tmp_path.iterdir()) == []
