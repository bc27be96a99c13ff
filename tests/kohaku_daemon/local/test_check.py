"""``kohakud check`` tells the truth about this machine, in words and as a document."""

from __future__ import annotations

import json
import os
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kohaku_daemon.backends.process.backend import ProcessBackend
from kohaku_daemon.backends.process.settings import Isolation, ProcessSettings
from kohaku_daemon.local import check as checking
from kohaku_daemon.local.check import Part, Verdict, check
from protocol.models.node import BackendInfo


class _Engine(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.rfile.readline()
        body = b'{"Version": "28.1"}'
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "docker.sock"
    with socketserver.UnixStreamServer(str(path), _Engine) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield path
        thread.join()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")


def part(name: str) -> Part:
    (found,) = (part for part in checking.look() if part.name == name)
    return found


def test_a_machine_that_runs_these_tests_can_run_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["can_run_tasks"]
    by_name = {part["name"]: part for part in document["parts"]}
    assert by_name["process backend"]["says"] == "a trial task ran"
    assert all(part["says"] and part["verdict"] in set(Verdict) for part in document["parts"])


def test_a_machine_whose_trial_fails_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> BackendInfo:
        return BackendInfo("process", healthy=False, message="no shell here")

    monkeypatch.setattr(checking, "_try_process", fail)
    assert check(as_json=False) == 1
    said = capsys.readouterr().out
    assert "no shell here" in said
    assert said.endswith("no task can run here\n")


def test_what_is_not_isolated_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def plain() -> BackendInfo:
        return BackendInfo(
            "process",
            isolation="plain process",
            message="no namespaces: EPERM",
            enforces=("pause",),
        )

    monkeypatch.setattr(checking, "_try_process", plain)
    isolation = part("isolation")
    assert isolation.verdict is Verdict.LIMITED
    assert "EPERM" in isolation.advice
    limits = part("limits")
    assert limits.verdict is Verdict.LIMITED
    assert limits.says == "enforced for a whole task: pause"
    assert limits.advice


def test_what_it_means_for_memory_to_have_no_cgroups_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ProcessSettings(cgroup_root=tmp_path / "none")
    monkeypatch.setattr(checking, "ProcessBackend", partial(ProcessBackend, settings=settings))
    assert part("limits").verdict is Verdict.LIMITED
    memory = part("memory limits")
    assert memory.verdict is Verdict.LIMITED
    assert memory.says == "hold for each process only; -m hogs end failed, not oom_killed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's tasks are users of their own")
def test_the_trial_meets_what_tasks_would_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain tasks of root cannot pass a folder that is closed to other users."""
    with tempfile.TemporaryDirectory(prefix="kohaku-check-") as shut:
        monkeypatch.setenv("KOHAKU_HOME", str(Path(shut) / "home"))
        settings = ProcessSettings(isolation=Isolation.PLAIN)
        monkeypatch.setattr(checking, "ProcessBackend", partial(ProcessBackend, settings=settings))
        found = part("process backend")
        assert found.verdict is Verdict.MISSING
        assert "Permission denied" in found.says
        Path(shut).chmod(0o711)
        assert part("process backend").verdict is Verdict.OK
        assert list(Path(shut).iterdir()) == []


def test_an_engine_is_asked_for_its_version(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{engine}")
    assert part("docker").says.startswith("engine 28.1")


def test_no_engine_is_told_with_what_to_do() -> None:
    docker = part("docker")
    assert docker.verdict is Verdict.MISSING
    assert "none.sock" in docker.says
    assert docker.advice
