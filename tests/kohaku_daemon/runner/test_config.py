"""A runner's settings: a name and a folder of its own, and refusals that say what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kohaku_daemon.backends.process.settings import Isolation
from kohaku_daemon.runner.config import load, name_of_machine, template
from protocol.errors import BadRequest


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        ("GPU-01.lab.example", "gpu-01"),
        ("my_box", "my-box"),
        ("-odd-", "odd"),
        ("x" * 70, "x" * 63),
        ("___", "node"),
    ],
)
def test_a_node_is_named_after_its_machine(
    hostname: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: hostname)
    assert name_of_machine() == name


def test_each_runner_of_a_machine_has_its_own_folder(tmp_path: Path) -> None:
    assert load({"name": "node1"}, environ={}).data == tmp_path / "data/runners/node1"
    assert load({}, environ={"KOHAKU_RUNNER_NAME": "b"}).data == tmp_path / "data/runners/b"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "../up", "cannot be a node's name"),
        ("host", "http://", "is not the address of a host"),
        ("host", "ftp://h", "is not the address of a host"),
        ("host", "http://not an address", "'http://not an address' is not the address of a host"),
        ("join_token_file", "auto", 'must be a path, or "" for none, not "auto"'),
        ("host", "http://10.0.0.1:8000", "dialling 10.0.0.1 would send"),
        ("host", "lab", "dialling lab would send"),
        ("backends", [], "backends is empty"),
        ("max_tasks", 0, "from 1 to 100000, not 0"),
        ("process.isolation", "none", 'must be one of "auto", "namespaces", "plain"'),
    ],
)
def test_what_makes_no_sense_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        load({key: value}, environ={})


def test_a_host_elsewhere_is_dialled_encrypted_or_by_leave() -> None:
    assert load({"host": "https://lab.example"}, environ={}).host == "https://lab.example"
    assert load({"host": "lab:8000", "insecure_plaintext": True}, environ={}).host == "lab:8000"


def test_the_default_backend_is_one_of_the_backends() -> None:
    with pytest.raises(BadRequest, match=r"default_backend docker is not among backends \(process"):
        load({"backends": ["process"], "default_backend": "docker"}, environ={})
    with pytest.raises(BadRequest, match=r"x is not among backends \(docker, process\)"):
        load({"default_backend": "x"}, environ={})
    assert load({"default_backend": "process"}, environ={}).default_backend == "process"
    both = load({"backends": ["mock", "auto"], "default_backend": "mock"}, environ={})
    assert both.default_backend == "mock"


def test_a_label_that_no_node_can_carry_is_refused_at_the_start() -> None:
    with pytest.raises(BadRequest, match="labels: a b=c cannot be a label"):
        load({}, environ={"KOHAKU_RUNNER_LABELS": "a b=c"})


def test_settings_of_the_process_backend_have_their_own_table() -> None:
    config = load({}, environ={"KOHAKU_RUNNER_PROCESS_ISOLATION": "plain"})
    assert config.process.isolation is Isolation.PLAIN


def test_the_join_token_comes_from_its_file_when_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "token"
    config = load({"join_token_file": str(file)}, environ={})
    with pytest.raises(BadRequest, match="cannot read the join token in"):
        config.read_join_token()
    file.write_text("khj_abc\n")
    assert config.read_join_token() == "khj_abc"


def test_no_file_of_a_join_token_is_written_as_none() -> None:
    assert '#join_token_file = ""' in template().splitlines()
    assert load({"join_token_file": ""}, environ={}).read_join_token() == ""


def test_a_join_token_is_not_shown(tmp_path: Path) -> None:
    config = load({}, environ={"KOHAKU_RUNNER_JOIN_TOKEN": "khj_secret"})
    assert config.read_join_token() == "khj_secret"
    assert "khj_secret" not in repr(config)


def test_the_written_file_is_read_back_as_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "runner.toml"
    active = re.sub(r"(?m)^#(?=\w)", "", template())
    file.write_text(active)
    assert load({}, file=file, environ={}) == load({}, environ={})
