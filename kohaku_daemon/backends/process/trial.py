"""Finding out what a machine allows by really running something with it.

Knows: which combinations to try, in which order, and when one has worked.
Does not know: why one fails: what the kernel or a security module forbids is only told by
asking it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import BackendFailed, TaskFolders
from kohaku_daemon.backends.process.launching import STARTED
from kohaku_daemon.backends.process.link import VANISHED
from kohaku_daemon.backends.process.planning import Means, Planner
from kohaku_daemon.backends.process.record import LaunchPlan, make_record, read_record
from kohaku_daemon.backends.process.settings import Isolation
from kohaku_daemon.core.workload import Launch
from protocol.ids import BatchId, TaskId
from protocol.models.task import Claim, TaskSpec

#: Gives a plan to a keeper and waits for its recorded end.
RunPlan = Callable[[LaunchPlan], Awaitable[tuple[str, str]]]

#: Writes where a task may, so that a scratch folder nobody can reach is noticed.
_COMMAND: Final = ("/bin/sh", "-c", ": > here")
#: Bytes; enough for any shell, and a limit that must be accepted.
_MEMORY: Final = 64 << 20


async def choose_means(
    planner: Planner, wanted: Isolation, root: Path, run: RunPlan
) -> tuple[Means | None, str]:
    """Choose the best means that work; None if none do.

    Args:
        planner: With the means that one may hope for.
        wanted: What an administrator allows.
        root: Folder for the state of trials.
        run: Runs a plan to its end.

    Returns:
        The means, and what did not work and why, in one line, or nothing.
    """
    failures: dict[str, None] = {}
    for means in _list_candidates(planner.means, wanted):
        failure = await _try(replace(planner, means=means), root, run)
        if not failure:
            return means, "; ".join(failures)
        walls = "namespaces" if means.namespaces else "plain processes"
        limits = " with cgroups" if means.site is not None else ""
        failures[f"no {walls}{limits}: {failure}"] = None
    return None, "; ".join(failures)


def _list_candidates(best: Means, wanted: Isolation) -> list[Means]:
    walls = {
        Isolation.AUTO: (True, False),
        Isolation.NAMESPACES: (True,),
        Isolation.PLAIN: (False,),
    }[wanted]
    sites = (best.site, None) if best.site is not None else (None,)
    return [replace(best, namespaces=wall, site=site) for wall in walls for site in sites]


async def _try(planner: Planner, root: Path, run: RunPlan) -> str:
    """Run a trial; say why it failed, if it did."""
    folder = root / f".trial-{os.getpid()}"
    folders = TaskFolders(folder / "scratch", folder / "stdout", folder / "stderr")
    cores = tuple(sorted(os.sched_getaffinity(0)))[:1]
    launch = Launch(
        task=TaskId(os.getpid()),
        attempt=0,
        batch=BatchId(0),
        spec=TaskSpec(command=_COMMAND),
        claim=Claim(cores=cores, memory=_MEMORY),
    )
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a killed runner that had our pid
        folder.mkdir()
        # Whatever the umask says: the trial's own user passes through it.
        folder.chmod(0o711)
        folders.scratch.mkdir()
        path = folder / f"{launch.key}-0"
        make_record(str(path))
        kind, text = await run(planner.plan(launch, str(path), folders))
        if kind != STARTED:
            return text or ("its keeper was killed" if kind == VANISHED else kind)
        ending = read_record(str(path)).ending
        if ending is None or ending.status != 0:
            return _read_words(folders.stderr) or "a trial did not end well"
        return ""
    except (OSError, BackendFailed) as error:
        return str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_words(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:  # it said nothing
        return ""
