"""What process tasks are told, to behave as the conformance suite names it, and who may run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kohaku_daemon.backends.process.backend import ProcessBackend
from kohaku_daemon.backends.process.settings import Isolation, ProcessSettings
from protocol.models.task import TaskSpec

#: A Python that every user may run: the test's own may lie below /root.
_PYTHON = Path("/usr/bin/python3")
PYTHON = str(_PYTHON if _PYTHON.exists() else sys.executable)
NOWHERE = Path("/nonexistent")


def sh(script: str, *arguments: str) -> TaskSpec:
    """Run a shell script."""
    return TaskSpec(command=("/bin/sh", "-c", script, "sh", *arguments))


class ShellPrograms:
    """See ``conformance.Programs``."""

    def exits(self, code: int) -> TaskSpec:
        return sh(f"exit {code}")

    def dies(self, number: int) -> TaskSpec:
        return sh(f"kill -{int(number)} $$")

    def prints(self, out: str, err: str) -> TaskSpec:
        return sh('printf %s "$1"; printf %s "$2" >&2', out, err)

    def works(self) -> TaskSpec:
        return sh("while :; do :; done")

    def runs(self, seconds: float) -> TaskSpec:
        return sh(f"exec sleep {seconds}")

    def refuses_term(self) -> TaskSpec:
        # The second one leaves the first one's session and is nobody's child any more.
        refuse = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
        return sh(f'(setsid sh -c "{refuse}" &) ; {refuse}')

    def handles_term(self, code: int) -> TaskSpec:
        return sh(f"trap 'exit {code}' TERM; echo ready; while :; do sleep 0.05; done")

    def cannot_start(self) -> tuple[TaskSpec, str]:
        return TaskSpec(command=("no-such-program", "x")), "command not found: no-such-program"

    def exceeds_memory(self, limit: int) -> TaskSpec:
        return TaskSpec(command=(PYTHON, "-c", f"x = b'x' * {4 * limit}"))


def make_maker(
    root: Path, isolation: Isolation, *, cgroups: bool, node: str = "test"
) -> Callable[[], ProcessBackend]:
    """Make what makes a backend with its state below ``root``, which it hides from its tasks."""
    settings = ProcessSettings(isolation=isolation)
    if not cgroups:
        settings = replace(settings, cgroup_root=NOWHERE)

    def make() -> ProcessBackend:
        return ProcessBackend(
            state_root=root / "state", node=node, hidden=[root], settings=settings
        )

    return make
