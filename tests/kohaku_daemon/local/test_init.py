"""``kohakud init`` writes files that are good as they are, and replaces none unasked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kohaku_daemon.host import config as host_config
from kohaku_daemon.local import units
from kohaku_daemon.local.init import init
from kohaku_daemon.runner import config as runner_config
from protocol.errors import Conflict


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path / "a home"))
    return tmp_path / "a home"


def test_the_files_are_listed_on_stdout_and_read_by_the_daemons(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init("all", systemd=False, force=False) == 0
    files = [home / "config/host.toml", home / "config/runner.toml"]
    assert capsys.readouterr().out.splitlines() == [str(file) for file in files]
    assert host_config.default_file() == files[0]
    host_config.load({})
    runner_config.load({})
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)


@pytest.mark.parametrize("text", [host_config.template(), runner_config.template()])
def test_every_key_is_explained(text: str) -> None:
    keys = re.findall(r"(?m)^((?:# .*\n)*)#(\w+) = ", text)
    assert len(keys) > 10
    # The line "Here ..." says what is taken, not what it means.
    assert [key for comment, key in keys if comment.count("\n") < 2] == []


def test_what_is_there_is_replaced_only_by_force(home: Path) -> None:
    init("host", systemd=False, force=False)
    edited = home / "config/host.toml"
    edited.write_text("port = 8123\n")
    with pytest.raises(Conflict, match=r"host\.toml is there already"):
        init("all", systemd=False, force=False)
    assert edited.read_text() == "port = 8123\n"
    assert not (home / "config/runner.toml").exists()
    init("host", systemd=False, force=True)
    assert "#port = 8000" in edited.read_text()


def test_the_units_are_what_systemd_takes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init("all", systemd=True, force=False)
    made = sorted((home / "config/systemd").iterdir())
    assert [path.name for path in made] == [units.HOST, units.RUNNER]
    assert "systemctl" in capsys.readouterr().err
    runner = made[1].read_text()
    for line in ("KillMode=process", "Delegate=yes", "OOMPolicy=continue", "Type=notify"):
        assert f"\n{line}\n" in runner
    # Walls around the runner would stand around its tasks, and go with it.
    for wall in ("ProtectSystem=", "PrivateTmp=", "NoNewPrivileges=", "Restrict"):
        assert f"\n{wall}" not in runner
    if analyze := shutil.which("systemd-analyze"):
        said = subprocess.run(
            [analyze, "verify", *map(str, made)], capture_output=True, text=True, timeout=60
        ).stderr
        # Newer than some systemds, which say that they ignore it.
        ours = [line for line in said.splitlines() if "a home" in line]
        assert [line for line in ours if "DelegateSubgroup" not in line] == []


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root has what is given up"
)
@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_python_that_the_host_could_not_reach_is_told(
    mode: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(prefix="kohaku-init-") as root:
        Path(root).chmod(0o755)
        somebodys = Path(root) / "home"
        somebodys.mkdir()
        python = somebodys / "python"
        python.write_text("")
        os.chown(somebodys, 12345, 12345)
        somebodys.chmod(mode)
        monkeypatch.setattr(sys, "executable", str(python))
        init("host", systemd=True, force=False)
        # As systemd starts it: root by its number alone.
        alone = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--clear-groups"]
        reached = subprocess.run([*alone, "test", "-e", python], timeout=60).returncode == 0
    assert (f"warning: {somebodys} is closed to root" in capsys.readouterr().err) is not reached


@pytest.mark.parametrize(
    ("text", "quoted"),
    [("/a b", '"/a b"'), ("/100%", '"/100%%"'), ("/$x", '"/$$x"'), ('/"\\', '"/\\"\\\\"')],
)
def test_a_path_means_itself_in_a_unit(text: str, quoted: str) -> None:
    unit = units.runner(Path(text), Path("/data"))
    assert f"--config {quoted} --data" in unit
