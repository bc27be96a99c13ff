"""One daemon as a process: one on a folder, stopped by a signal, ready when it says so."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from kohaku_daemon.local import pidfiles

_ROOT = Path(__file__).parents[3]
_DAEMON = """
import asyncio, sys
from pathlib import Path
from kohaku_daemon import logs
from kohaku_daemon.local.serving import serve
from protocol.errors import KohakuError

async def work(*, stop, on_ready):
    on_ready("http://127.0.0.1:1")
    await stop.wait()
    if "hangs" in sys.argv:
        await asyncio.Event().wait()
    print("put in order", flush=True)

logs.set_up("info")
try:
    serve(work, data=Path(sys.argv[1]), name="host", publishes_url=True)
except KohakuError as error:
    sys.exit(error.message)
"""


@contextmanager
def daemon(
    data: Path, *how: str, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a daemon that does nothing until it has said that it is ready."""
    with subprocess.Popen(
        [sys.executable, "-c", _DAEMON, str(data), *how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env=environ,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Read its log until a line has ``words``; an end without them fails."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"ended with {process.wait()} without saying {words!r}")


def test_it_is_found_by_its_files_until_it_stops(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with daemon(data) as process:
        read_until(process, "ready")
        assert pidfiles.holder(data / "host.pid") == process.pid
        assert (data / "host.url").read_text() == "http://127.0.0.1:1\n"
        assert data.stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
        assert (out, process.returncode) == ("put in order\n", 0)
    assert list(data.iterdir()) == []


def test_a_second_one_names_the_first(tmp_path: Path) -> None:
    with daemon(tmp_path) as first:
        read_until(first, "ready")
        with daemon(tmp_path) as second:
            _, said = second.communicate(timeout=10)
            assert second.returncode == 1
            assert f"host of {tmp_path} already runs as process {first.pid}" in said
        assert (tmp_path / "host.url").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_order(tmp_path: Path, number: signal.Signals) -> None:
    with daemon(tmp_path, "hangs") as process:
        read_until(process, "ready")
        process.send_signal(number)
        read_until(process, "asked to stop")
        process.send_signal(number)
        out, said = process.communicate(timeout=10)
        assert out == ""
        assert "stopped before all was put in order" in said
    assert not (tmp_path / "host.pid").exists()


def test_systemd_is_told_of_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(path))
        channel.settimeout(10)
        with daemon(tmp_path / "data", environ={"NOTIFY_SOCKET": str(path)}) as process:
            assert channel.recv(100) == b"READY=1"
            process.send_signal(signal.SIGTERM)
            assert channel.recv(100) == b"STOPPING=1"


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with daemon(tmp_path / "file" / "data") as process:
        _, said = process.communicate(timeout=10)
    assert process.returncode == 1
    assert f"cannot use the data folder {tmp_path}/file/data: Not a directory" in said
