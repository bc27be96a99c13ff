"""Logging in and out, and what is saved of it."""

from __future__ import annotations

import io
import json
import stat
import sys
from pathlib import Path

import pytest

from protocol import contexts
from protocol.methods import WHOAMI
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import TOKEN, ScriptedHost


@pytest.fixture
def stranger(host: ScriptedHost, monkeypatch: pytest.MonkeyPatch) -> ScriptedHost:
    """A host that nothing in the environment names."""
    monkeypatch.delenv("KOHAKU_HOST")
    monkeypatch.delenv("KOHAKU_TOKEN")
    return host


def test_login_checks_saves_and_uses(
    stranger: ScriptedHost, kohaku: Kohaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f" {TOKEN}\n"))
    ran = kohaku("login", stranger.url, "--token", "-", "--name", "lab")
    assert (ran.status, ran.out) == (0, "")
    assert "as ada (admin)" in ran.err
    assert TOKEN not in ran.err
    assert stat.S_IMODE(contexts.file_path().stat().st_mode) == 0o600
    saved = contexts.load()
    assert saved.current == "lab"
    assert saved.find("lab") == contexts.Context("lab", stranger.url, TOKEN, "ada", "77")

    document = json.loads(kohaku("whoami", "--json").out)
    assert (document["user"], document["role"], document["url"]) == ("ada", "admin", stranger.url)
    assert TOKEN not in kohaku("whoami").out


def test_a_wrong_token_saves_nothing(stranger: ScriptedHost, kohaku: Kohaku) -> None:
    ran = kohaku("login", stranger.url, "--token", "kht_wrong")
    assert ran.status == 1
    assert "does not know this token" in ran.err
    assert contexts.load().contexts == ()


def test_login_takes_the_token_of_the_environment(
    stranger: ScriptedHost, kohaku: Kohaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKU_TOKEN", TOKEN)
    assert kohaku("login", stranger.url).status == 0
    (saved,) = contexts.load().contexts
    assert saved.name == stranger.url.removeprefix("http://")


def test_without_a_token_nothing_is_asked_of_a_pipe(
    stranger: ScriptedHost, kohaku: Kohaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    ran = kohaku("login", stranger.url)
    assert ran.status == 2
    assert "--token -" in ran.err
    assert stranger.calls == []


def test_contexts_are_listed_chosen_and_forgotten(stranger: ScriptedHost, kohaku: Kohaku) -> None:
    contexts.save(contexts.Context("away", "http://127.0.0.1:1", "kht_a"))
    contexts.save(contexts.Context("lab", stranger.url, TOKEN, "ada", "77"))
    ran = kohaku("context", "list")
    assert "kht_" not in ran.out
    assert ran.out.splitlines()[2].split() == ["*", "lab", stranger.url, "ada", "77"]
    listed = json.loads(kohaku("context", "list", "--json").out)["contexts"]
    assert [(context["name"], context["in_use"]) for context in listed] == [
        ("away", False),
        ("lab", True),
    ]

    assert kohaku("context", "use", "away").status == 0
    assert json.loads(kohaku("context", "show", "--json").out)["name"] == "away"
    assert kohaku("whoami").status == 3
    assert kohaku("whoami", "--context", "lab").status == 0
    assert len(stranger.asked(WHOAMI)) == 1

    assert kohaku("logout").status == 0
    assert [context.name for context in contexts.load().contexts] == ["lab"]
    assert kohaku("logout").status == 3
    ran = kohaku("context", "use", "lb")
    assert (ran.status, ran.err) == (1, "error: there is no context 'lb'\nthere are: lab\n")


def test_logging_out_says_which_contexts_are_left(stranger: ScriptedHost, kohaku: Kohaku) -> None:
    contexts.save(contexts.Context("local", stranger.url, TOKEN))
    contexts.save(contexts.Context("lab", stranger.url, TOKEN))
    told = kohaku("logout").err.splitlines()
    assert told[1] == "none is in use now; choose it with: kohaku context use local"
    for words in ([], ["logout"], ["context", "show"]):
        ran = kohaku(*words)
        assert (ran.status, ran.err) == (
            3,
            "error: no context is in use\nchoose it with: kohaku context use local\n",
        )
    assert len(kohaku("logout", "--context", "local").err.splitlines()) == 1
    assert "kohaku login URL" in kohaku("context", "show").err


def test_changes_of_contexts_are_documents_too(stranger: ScriptedHost, kohaku: Kohaku) -> None:
    ran = kohaku("login", stranger.url, "--token", TOKEN, "--name", "lab", "--json")
    wanted = {"name": "lab", "url": stranger.url, "user": "ada", "cluster": "77", "in_use": True}
    assert (json.loads(ran.out), ran.err) == (wanted, "")
    assert json.loads(kohaku("context", "use", "lab", "--json").out) == wanted
    assert json.loads(kohaku("logout", "--json").out) == {**wanted, "in_use": False}


def test_a_damaged_file_is_named(stranger: ScriptedHost, kohaku: Kohaku, tmp_path: Path) -> None:
    contexts.file_path().parent.mkdir(parents=True)
    contexts.file_path().write_text("{")
    ran = kohaku("status")
    assert ran.status == 2
    assert "contexts.json is damaged" in ran.err
