"""The process backend of a runner that is not root, tried by root as somebody else."""

from __future__ import annotations

import asyncio
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kohaku_daemon.backends.conformance import DEADLINE_S, open_folder, until

REPOSITORY = Path(__file__).resolve().parents[4]
USER = 54321
PYTHON_PATH = os.pathsep.join([str(REPOSITORY), *site.getsitepackages()])


def find_python() -> str:
    """Find a Python that the user may run and that knows our libraries."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run(
                [python, "-c", "import msgspec, pytest"],
                user=USER, group=USER, extra_groups=[], cwd="/", capture_output=True,
                env={"PYTHONPATH": PYTHON_PATH, "PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip
        except OSError:
            continue
        if done.returncode == 0:
            return python
    pytest.skip(f"another user may not read {REPOSITORY} or run a Python that has its packages")


def may_make_user_namespaces() -> bool:
    """Ask the kernel, not us, whether an ordinary user may."""
    done = subprocess.run(
        ["unshare", "--user", "--pid", "--mount", "--fork", "true"],
        user=USER, group=USER, extra_groups=[], cwd="/", capture_output=True,
    )  # fmt: skip
    return done.returncode == 0


async def run_as_user(root: Path, script: str) -> list[str]:
    """Run a script as a task of the user's own runner; give the lines of its output."""
    process = await asyncio.create_subprocess_exec(
        find_python(), "-m", "tests.kohaku_daemon.backends.process.driver",
        str(root), "auto", "False", f"{script}; echo done",
        user=USER, group=USER, extra_groups=[], cwd="/", stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": PYTHON_PATH, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            assert await process.stdout.readline(), "the driver could not start the task"

        def read() -> str:
            return "".join(path.read_text() for path in (root / "tasks").glob("*/stdout"))

        await until(lambda: "done\n" in read())
        return read().splitlines()
    finally:
        process.kill()
        await process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.skipif(
    os.geteuid() == 0 and not may_make_user_namespaces(),
    reason="an ordinary user may not make user namespaces here",
)
async def test_an_ordinary_users_tasks_are_walled_off_by_a_user_namespace() -> None:
    with open_folder() as root:
        os.chown(root, USER, USER)
        (root / "vault").write_text("secret")
        lines = await run_as_user(
            root,
            f"exec 2>&1; id -u; cat {root}/vault; ls /proc/1/root; hostname;"
            "grep -E 'Cap(Prm|Eff)|NoNew' /proc/self/status; touch /etc/x;"
            "ls /proc | grep -c '^[0-9]'; umount /tmp",
        )
    text = "\n".join(lines)
    assert lines[0] == str(USER)
    assert any(line.startswith("task-") for line in lines)
    assert "secret" not in text
    assert "/proc/1/root': Permission denied" in text
    assert "Read-only file system" in text or "touch: cannot touch '/etc/x'" in text
    assert "CapPrm:\t0000000000000000" in lines
    assert "CapEff:\t0000000000000000" in lines
    assert "NoNewPrivs:\t1" in lines
    assert int(lines[-3]) <= 4
    assert "umount" in lines[-2]
