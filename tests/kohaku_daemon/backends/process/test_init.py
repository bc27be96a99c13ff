"""The first process of a namespace: what it is, what it does, and that a fork can stand in."""

from __future__ import annotations

import os
import platform
import signal
import sys

import pytest

from kohaku_daemon.backends.process.init import Seed

needs_seed = pytest.mark.skipif(
    platform.machine() != "x86_64" or os.geteuid() != 0,
    reason="it is written for x86-64, and only root makes namespaces without a user's",
)


def run_apart(script: str) -> list[str]:
    """Run a script as a process that may move into namespaces; give its lines."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    body = (
        f"import os, signal, time; os.dup2({write}, 1)\n"
        "from kohaku_daemon.backends.process import linux\n"
        "from kohaku_daemon.backends.process.init import Seed\n" + script
    )
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-c", body], dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_CLOSE, read)],
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as said:
        lines = said.read().splitlines()
    assert os.waitpid(pid, 0)[1] == 0, lines
    return lines


IN_NAMESPACES = """
seed = Seed()
linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID)
linux.mount("", "/", "", linux.MS_REC | linux.MS_PRIVATE)
first = seed.start()
"""
END = """
os.kill(first, signal.SIGKILL)
print(os.waitpid(first, 0)[1])
"""


@needs_seed
def test_it_is_small_names_itself_and_has_its_proc() -> None:
    script = """
def run(*argv):
    os.waitpid(os.posix_spawnp(argv[0], argv, dict(os.environ)), 0)
run("sh", "-c", "echo $$; cat /proc/1/comm; cat /proc/1/cmdline; echo; grep VmSize /proc/1/status")
run("sh", "-c", "readlink /proc/1/fd/0 || echo closed")
"""
    shell, name, line, size, descriptors, status = run_apart(IN_NAMESPACES + script + END)
    assert shell == "2"
    assert name == "kohaku-init"
    assert line == "kohaku-init\0"
    assert int(size.split()[1]) < 1024
    assert descriptors == "closed"
    assert int(status) == signal.SIGKILL


@needs_seed
def test_orphans_are_waited_for() -> None:
    script = """
script = "(sh -c 'exit 3' &) ; (sleep 0.05 &) ; sleep 0.2; ls /proc | grep -c '^[0-9]'"
os.waitpid(os.posix_spawnp("sh", ["sh", "-c", script], dict(os.environ)), 0)
"""
    seen, _ = run_apart(IN_NAMESPACES + script + END)
    assert int(seen) == 4, "init, the shell, ls and grep"


@needs_seed
def test_what_cannot_be_mounted_is_told_and_nothing_stays() -> None:
    script = """
seed = Seed()
linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID)
linux.clear_capabilities()
try:
    seed.start()
except OSError as error:
    print(error.errno, error.filename)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("none")
"""
    assert run_apart(script) == ["1 /proc", "none"]


def test_it_is_not_there_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert Seed.plant() is None
