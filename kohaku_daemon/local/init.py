"""``kohakud init``: settings files that explain every key, and systemd units.

Knows: which files go where. Does not know: any setting; the files are written from the
settings classes themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from kohaku_daemon.host import config as host_config
from kohaku_daemon.local import units
from kohaku_daemon.runner import config as runner_config
from protocol.errors import Conflict, KohakuError


def init(what: str, *, systemd: bool, force: bool) -> int:
    """Write the files for ``what``: host, runner or all. Gives the exit status.

    Raises:
        Conflict: A file is there already, and ``force`` is not given. Nothing is written.
        KohakuError: A file cannot be written.
    """
    files: dict[Path, str] = {}
    if what in ("host", "all"):
        files[host_config.config_file()] = host_config.template()
    if what in ("runner", "all"):
        files[runner_config.config_file()] = runner_config.template()
    made = _units(what) if systemd else {}
    if not force:
        _refuse_to_replace([*files, *made])
    for path, text in (files | made).items():
        _write(path, text)
        sys.stdout.write(f"{path}\n")
    if made:
        sys.stderr.write(units.next_steps(made))
    return 0


def _units(what: str) -> dict[Path, str]:
    folder = units.folder()
    made = {}
    if what in ("host", "all"):
        host = host_config.load({})
        # systemd opens the way to this folder before the host could make it.
        host.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        made[folder / units.HOST] = units.host(host_config.config_file(), host.data)
    if what in ("runner", "all"):
        runner = runner_config.load({})
        made[folder / units.RUNNER] = units.runner(runner_config.config_file(), runner.data)
    return made


def _refuse_to_replace(paths: Iterable[Path]) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there:
        raise Conflict(
            f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} there already",
            hint="--force replaces; nothing has been written",
        )


def _write(path: Path, text: str) -> None:
    """Write in one step, for its owner only: a settings file may come to hold a join token."""
    aside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        mode = 0o644 if path.suffix == ".service" else 0o600
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        aside.replace(path)
    except OSError as error:
        raise KohakuError(f"cannot write {path}: {error.strerror}") from error
