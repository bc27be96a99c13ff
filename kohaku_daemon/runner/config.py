"""Settings of a runner.

Knows: every key, its default and its meaning. Does not know: who acts on them.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from kohaku_daemon.backends.docker.settings import DockerSettings
from kohaku_daemon.backends.process.settings import ProcessSettings
from kohaku_daemon.backends.registry import DEFAULT_BACKENDS
from kohaku_daemon.core.task.validation import check_labels
from kohaku_daemon.plaintext import check_plaintext
from kohaku_daemon.setting_kinds import Between, Cores, FileOrNone, Size
from kohaku_daemon.settings import Sources, collect, render
from protocol.client import parse_url
from protocol.errors import BadRequest
from protocol.home import config_dir, data_dir
from protocol.ids import NodeName, parse_node_name

#: Of the environment variables that set a key of a runner.
PREFIX: Final = "KOHAKU_RUNNER_"

_DAY: Final = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """How one runner runs."""

    #: Name of this node in the cluster.
    name: NodeName
    #: Folder of everything the runner keeps: vault, output and scratch folders of tasks,
    #: runner-NAME.pid. Only the runner's own user may read it.
    data: Path
    #: Where the host is: HOST, HOST:PORT or http://HOST:PORT.
    host: str = "http://127.0.0.1:8000"
    #: Lets this runner join the cluster the first time; made with "kohaku node join-token".
    #: Afterwards the runner has a credential of its own.
    join_token: str = field(default="", repr=False)
    #: File with the join token; better than a setting that others might read.
    join_token_file: FileOrNone = None
    #: Send tokens and output unencrypted to a host on another machine.
    insecure_plaintext: bool = False
    #: What tasks may run in, such as "process"; "auto" for all that this machine can.
    backends: tuple[str, ...] = ("auto",)
    #: Backend of tasks that name none; empty for the first of the list that works.
    default_backend: str = ""
    #: Told to the host when this node joins; afterwards "kohaku node label" changes them.
    labels: dict[str, str] = field(default_factory=dict)
    #: How many tasks may be on this node at once, whatever they claim.
    max_tasks: Annotated[int, Between(1, 100_000)] = 256
    #: Cores that tasks may use; "auto" for all that the runner itself may use.
    cores: Cores | None = None
    #: Memory that tasks may claim together; "auto" for the machine's less 5 %.
    memory: Size | None = None
    #: Largest file for each output of a task. What exceeds it is dropped, and the log says so.
    log_cap: Size = 64 * 2**20
    #: Folder of the storage that all machines share, as this one mounts it; "" for none. Tasks
    #: find it by KOHAKU_SHARED_DIR, in containers at /shared. Packed environments are taken from
    #: its subfolder "environments"; else the host sends them.
    shared_dir: FileOrNone = None
    #: How long the output of an ended task is kept. Its scratch folder goes with its end.
    log_keep_s: float = 30 * _DAY
    #: What the output of all tasks may take of this node's disk; above it that of ended tasks
    #: goes, oldest first, however long it would have been kept.
    log_total: Size = 10 * 2**30
    #: Longest wait between two tries to reach the host.
    reconnect_max_s: Annotated[float, Between(0.1)] = 30.0
    #: What is logged: this level and worse.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: Write log lines as JSON objects.
    log_json: bool = False
    #: Of the backend "process".
    process: ProcessSettings = field(default_factory=ProcessSettings)
    #: Of the backend "docker".
    docker: DockerSettings = field(default_factory=DockerSettings)

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            BadRequest: A name no node can have, a label no node can carry, a host's address
                no one can dial, or a default backend that is not among the backends.
        """
        parse_node_name(self.name)
        _check_host(self.host, insecure=self.insecure_plaintext)
        if not self.backends:
            raise BadRequest("backends is empty, so no task could run", hint='try ["auto"]')
        there = [
            name
            for named in self.backends
            for name in (DEFAULT_BACKENDS if named == "auto" else (named,))
        ]
        if self.default_backend not in (*there, ""):
            raise BadRequest(
                f"default_backend {self.default_backend} is not among backends "
                f"({', '.join(there)})",
                hint="name one of them, or leave it out for the first that works",
            )
        _check_labels(self.labels)

    def read_join_token(self) -> str:
        """Give the join token, empty if there is none. Read when needed: the file may be gone.

        Raises:
            BadRequest: ``join_token_file`` cannot be read.
        """
        if self.join_token or self.join_token_file is None:
            return self.join_token
        try:
            return self.join_token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"cannot read the join token in {self.join_token_file}") from error


def load(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> RunnerConfig:
    """Read a runner's settings. Without ``file``, ``runner.toml`` is read if it is there.

    Raises:
        BadRequest: A setting is unknown, wrong, or contradicts another.
    """
    arguments = collect(RunnerConfig, Sources(file or default_file(), environ, PREFIX, flags))
    arguments.setdefault("name", name_of_machine())
    arguments.setdefault("data", default_data(arguments["name"]))
    return RunnerConfig(**arguments)


def template() -> str:
    """Write runner.toml with every key at its default, commented out."""
    name = name_of_machine()
    return render(RunnerConfig, "runner", PREFIX, {"name": name, "data": default_data(name)})


def config_file() -> Path:
    """Give the file that is read where none is named."""
    return config_dir() / "runner.toml"


def default_file() -> Path | None:
    """Give the file that is read where none is named, if it exists."""
    return config_file() if config_file().exists() else None


def default_data(name: NodeName) -> Path:
    """Give the folder a runner keeps its data in unless told otherwise."""
    return data_dir() / "runners" / name


def name_of_machine() -> NodeName:
    """Make a valid node name of the machine's host name."""
    label = socket.gethostname().partition(".")[0].lower()
    name = re.sub(r"[^a-z0-9]+", "-", label)[:63].strip("-")
    return parse_node_name(name or "node")


def _check_labels(labels: Mapping[str, str]) -> None:
    try:
        check_labels(labels)
    except BadRequest as error:
        raise BadRequest(f"labels: {error.message}", hint=error.hint) from None


def _check_host(text: str, *, insecure: bool) -> None:
    parts = urlsplit(parse_url(text))
    if parts.scheme == "http":
        check_plaintext(parts.hostname or "", "dialling", accepted=insecure)
