"""Backends by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from kohaku_daemon.backends.registry import DEFAULT_BACKENDS, BackendPlace, make_backend
from protocol.errors import Unsupported


def test_every_name_makes_a_backend_of_that_name(tmp_path: Path) -> None:
    place = BackendPlace(node="node1", state_root=tmp_path)
    for name in ("docker", "mock", "process"):
        assert make_backend(name, place).name == name


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="'dokcer'") as caught:
        make_backend("dokcer", BackendPlace(node="node1", state_root=tmp_path))
    assert caught.value.hint == "backends are: docker, mock, process"


def test_nobody_gets_the_mock_unasked() -> None:
    assert "mock" not in DEFAULT_BACKENDS


def test_a_backend_is_loaded_when_it_is_asked_for() -> None:
    script = (
        "import sys, kohaku_daemon.backends.registry as r\n"
        "assert 'kohaku_daemon.backends.mock' not in sys.modules\n"
        "assert 'kohaku_daemon.backends.process.backend' not in sys.modules\n"
        "assert 'kohaku_daemon.backends.docker.backend' not in sys.modules\n"
        "assert 'aiodocker' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
