"""A pid file means the process that holds it, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kohaku_daemon.local import pidfiles
from protocol.errors import Conflict

_ROOT = Path(__file__).parents[3]
_HOLD = """
import os, signal, sys
from pathlib import Path
from kohaku_daemon.local import pidfiles
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with pidfiles.hold(Path(sys.argv[1]), "the other"):
    child = 0
    if "forks" in sys.argv and (child := os.fork()) == 0:
        signal.pause()
    print(child, flush=True)
    signal.pause()
"""


@contextmanager
def another(path: Path, *how: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Have another process hold ``path``; give it, and the child it forked if it ``forks``."""
    command = [sys.executable, "-c", _HOLD, str(path), *how]
    child = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        try:
            child = int(process.stdout.readline())
            yield process, child
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def test_the_file_has_the_number_alone_and_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "host.pid"
    with pidfiles.hold(path, "host"):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()
    assert pidfiles.holder(path) is None


def test_only_one_process_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "host.pid"
    with another(path) as (process, _):
        assert pidfiles.holder(path) == process.pid
        with (
            pytest.raises(Conflict, match=f"host of x already runs as process {process.pid}"),
            pidfiles.hold(path, "host of x"),
        ):
            pass
        assert path.read_text() == f"{process.pid}\n"


def test_what_a_killed_process_left_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "host.pid"
    with another(path) as (process, _):
        process.kill()
        process.wait()
    assert path.read_text() == f"{process.pid}\n"
    assert pidfiles.holder(path) is None
    with pidfiles.hold(path, "host"):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_number_that_another_process_has_now_means_nobody(tmp_path: Path) -> None:
    path = tmp_path / "host.pid"
    path.write_text("1\n")
    assert pidfiles.holder(path) is None
    assert pidfiles.Ending.begin(path) is None


def test_a_child_that_outlives_its_parent_does_not_pass_for_it(tmp_path: Path) -> None:
    path = tmp_path / "runner.pid"
    with another(path, "forks") as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)
        assert pidfiles.holder(path) is None


def test_an_ending_is_asked_for_and_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "host.pid"
    with another(path) as (process, _):
        ending = pidfiles.Ending.begin(path)
        assert ending is not None
        assert ending.finish(10)
        assert process.wait() == -signal.SIGTERM


def test_who_does_not_end_is_killed_after_its_time(tmp_path: Path) -> None:
    path = tmp_path / "host.pid"
    with another(path, "stubborn") as (process, _):
        ending = pidfiles.Ending.begin(path)
        assert ending is not None
        assert not ending.finish(0.1)
        assert process.wait() == -signal.SIGKILL
