"""Saved hosts: found again, in use or not, and never readable by others."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol import contexts
from protocol.contexts import Context
from protocol.errors import BadRequest, NotFound

LAB = Context("lab", "http://lab:8000", "kht_1234567890", "ann", "77")
HOME = Context("home", "http://127.0.0.1:8000", "kht_abcdef")


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))


def mode() -> int:
    return contexts.file_path().stat().st_mode & 0o777


def test_nothing_is_saved_at_first() -> None:
    assert contexts.load() == contexts.Contexts()
    assert contexts.current() is None


def test_what_is_saved_is_found_and_in_use() -> None:
    contexts.save(LAB)
    contexts.save(HOME, use=False)
    assert contexts.current() == LAB
    assert contexts.load().find("home") == HOME
    assert contexts.use("home") == HOME
    assert contexts.current() == HOME


def test_saving_again_replaces() -> None:
    contexts.save(LAB)
    newer = Context("lab", "http://lab:9000", "kht_new")
    contexts.save(newer)
    assert contexts.load().contexts == (newer,)


def test_forgetting_the_one_in_use_leaves_none_in_use() -> None:
    contexts.save(HOME)
    contexts.save(LAB)
    contexts.remove("lab")
    assert contexts.current() is None
    assert contexts.load().contexts == (HOME,)


def test_unknown_names_are_told_with_the_known_ones() -> None:
    contexts.save(LAB)
    for action in (contexts.use, contexts.remove):
        with pytest.raises(NotFound, match="'lap'") as caught:
            action("lap")
        assert "lab" in caught.value.hint


def test_the_file_is_its_owners_only() -> None:
    contexts.save(LAB)
    assert mode() == 0o600
    assert [entry.name for entry in contexts.file_path().parent.iterdir()] == ["contexts.json"]
    contexts.file_path().chmod(0o644)
    assert contexts.current() == LAB
    assert mode() == 0o600


def test_a_damaged_file_is_named() -> None:
    contexts.save(LAB)
    contexts.file_path().write_text("{")
    with pytest.raises(BadRequest, match=r"contexts\.json is damaged"):
        contexts.load()


def test_a_token_is_not_shown() -> None:
    assert LAB.token not in repr(LAB)
    assert "kht_12" in repr(LAB)
