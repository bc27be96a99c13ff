"""The command line of ``kohakud``: exit statuses, and mistakes told before anything starts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kohaku_daemon.cli import main

_ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "command", ["", "host", "runner", "up", "down", "init", "check", "backup", "restore"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"usage: kohakud {command}".strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "required: COMMAND"),
        ("serve", "invalid choice: 'serve'"),
        ("host --listen 8000", "'8000' is no address to listen on"),
        ("host --listen 127.0.0.1:99999", "port in the command line must be a whole number"),
        ("host --listen 0.0.0.0:0", "listening on 0.0.0.0 would send tokens"),
        ("host --log-level loud", 'log_level in the command line must be one of "debug"'),
        ("host --config absent.toml", "cannot read the settings in absent.toml"),
        ("runner --name Node_1", "'Node_1' cannot be a node's name"),
        ("runner --label gpu", "'gpu' is no label"),
        ("runner --host http://10.0.0.1:8000", "dialling 10.0.0.1 would send tokens"),
        ("up --runners 65", "65 runners on one machine are not possible"),
        ("up --runners two", "'two' is not a whole number"),
        ("up --runners ٣", "'٣' is not a whole number"),
        ("up --listen a..b:0", "listen in the command line must be an IP address or the name"),
        ("host --listen a..b:80", 'such as "127.0.0.1", not "a..b"'),
        (
            "host --lisen x",
            "kohakud: unknown option --lisen\n  did you mean --listen? see: kohakud",
        ),
        ("up --runer=2", "unknown option --runer\n  did you mean --runners?"),
        ("up --run 2", "unknown option --run\n"),  # a shortening of today is ambiguous tomorrow
        ("down now", "unexpected argument 'now'\n  see: kohakud down --help"),
        ("restore", "required: FILE"),
        ("restore b.tar --resum", "unknown option --resum\n  did you mean --resume?"),
        ("init cluster", "invalid choice: 'cluster'"),
    ],
)
def test_a_mistake_is_told_and_exits_2(
    line: str, words: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert list(home.iterdir()) in ([], [home / "data"])  # up takes its turn there


def test_a_mistake_in_the_settings_file_names_its_line(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "config/host.toml"
    file.parent.mkdir()
    file.write_text("\nprot = 8000\n")
    assert main(["host"]) == 2
    assert capsys.readouterr().err == (
        f"kohakud: unknown setting prot in {file}, line 2\n  did you mean port?\n"
    )


def test_down_where_nothing_runs_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down"]) == 0
    assert main(["down", "--tasks"]) == 0
    assert capsys.readouterr().out == "nothing was running\n" * 2


def test_a_daemon_that_fails_exits_1_without_a_traceback(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "kohaku_daemon", "host", "--listen", f"127.0.0.1:{port}"],
            capture_output=True,
            text=True,
            cwd=_ROOT,
            timeout=60,
        )
    assert done.returncode == 1
    assert f"kohakud: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "data/host/host.pid").exists()
