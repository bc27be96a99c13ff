"""One variable moves everything; without it the system's folders are used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protocol.home import config_dir, data_dir


def test_kohaku_home_holds_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))
    assert config_dir() == tmp_path / "config"
    assert data_dir() == tmp_path / "data"


def test_kohaku_home_is_absolute_though_written_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOHAKU_HOME", "trial")
    assert data_dir() == tmp_path / "trial" / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KOHAKU_HOME", "~/trial")
    assert data_dir() == tmp_path / "trial" / "data"


@pytest.mark.parametrize("home", [None, ""])
def test_without_it_the_system_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str | None
) -> None:
    monkeypatch.delenv("KOHAKU_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("KOHAKU_HOME", home)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "d"))
    assert config_dir() == tmp_path / "c" / "kohaku"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert data_dir() == tmp_path / "d" / "kohaku"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert data_dir() == Path("/var/lib/kohaku")
