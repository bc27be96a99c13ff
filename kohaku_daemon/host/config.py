"""Settings of the host.

Knows: every key, its default and its meaning. Does not know: who acts on them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from kohaku_daemon.packing.pieces import ENVIRONMENTS
from kohaku_daemon.plaintext import check_plaintext
from kohaku_daemon.setting_kinds import Address, Between, FileOrNone, Port
from kohaku_daemon.settings import Sources, collect, render
from protocol.errors import BadRequest
from protocol.home import config_dir, data_dir

#: Of the environment variables that set a key of the host.
PREFIX: Final = "KOHAKU_HOSTD_"

_DAY: Final = 86400.0

Wait = Annotated[float, Between(0.1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """How one host runs."""

    #: Folder of everything the host keeps: tasks.sqlite, cluster.json, host.pid, host.url and
    #: admin.token. Only the host's own user may read it.
    data: Path
    #: Address to listen on; "0.0.0.0" or "::" for all of the machine's.
    listen: Address = "127.0.0.1"
    #: Port to listen on; 0 for any free one.
    port: Port = 8000
    #: Let clients and runners on other machines connect without encryption: whoever can read
    #: the network then reads tokens and output. Loopback needs no leave.
    insecure_plaintext: bool = False
    #: How long a node may be silent before its tasks are counted as lost. They come back if it
    #: does.
    lost_after_s: Wait = 120.0
    #: How often each runner sends its readings.
    heartbeat_s: Wait = 2.0
    #: A connection that is silent for this long is asked whether it is still there, and closed
    #: after twice as long.
    keep_alive_s: Wait = 20.0
    #: Connections one address may hold that have not shown a token, credential or ticket; the
    #: next one is refused. Those that have are not counted, so this is also how many tools of
    #: one machine may begin at the same moment.
    max_strangers_per_address: Annotated[int, Between(1)] = 256
    #: What an answered submission survives: "full" also a power cut, "normal" only the end of
    #: the host. "normal" saves one wait for the disk on each group of changes.
    synchronous: Literal["full", "normal"] = "full"
    #: Folder that this machine and the nodes mount, each where it likes: packed environments go
    #: into its subfolder "environments", and nodes that mount it take them from there. "" for
    #: none: they stay with the rest of the host's data, and nodes are sent them.
    shared_dir: FileOrNone = None
    #: Socket of this machine's Docker engine, in which environments are made.
    docker_socket: Path = Path("/var/run/docker.sock")
    #: How many packed versions of each environment are kept. An older one stays as long as
    #: tasks that have not ended run in it.
    environment_versions: Annotated[int, Between(1)] = 3
    #: How long ended tasks are kept.
    task_keep_s: Annotated[float, Between(60)] = 90 * _DAY
    #: How long the lines of "kohaku events" are kept.
    event_keep_s: Annotated[float, Between(60)] = 30 * _DAY
    #: How long it is kept who changed what.
    audit_keep_s: Annotated[float, Between(60)] = 365 * _DAY
    #: What is logged: this level and worse.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: Write log lines as JSON objects.
    log_json: bool = False

    @property
    def environments(self) -> Path:
        """Give the folder of packed environments."""
        return (self.shared_dir or self.data) / ENVIRONMENTS

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            BadRequest: Plain text to other machines without leave, or a grace too short.
        """
        check_plaintext(self.listen, "listening on", accepted=self.insecure_plaintext)
        if self.lost_after_s < 3 * self.heartbeat_s:
            raise BadRequest(
                f"lost_after ({self.lost_after_s:g}s) must be at least three times "
                f"heartbeat ({self.heartbeat_s:g}s)",
                hint="else one late heartbeat loses a node",
            )


def load(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> HostConfig:
    """Read the host's settings. Without ``file``, ``host.toml`` is read if it is there.

    Raises:
        BadRequest: A setting is unknown, wrong, or contradicts another.
    """
    arguments = collect(HostConfig, Sources(file or default_file(), environ, PREFIX, flags))
    return HostConfig(**{"data": default_data(), **arguments})


def template() -> str:
    """Write host.toml with every key at its default, commented out."""
    return render(HostConfig, "host", PREFIX, {"data": default_data()})


def config_file() -> Path:
    """Give the file that is read where none is named."""
    return config_dir() / "host.toml"


def default_file() -> Path | None:
    """Give the file that is read where none is named, if it exists."""
    return config_file() if config_file().exists() else None


def default_data() -> Path:
    """Give the folder a host keeps its data in unless told otherwise."""
    return data_dir() / "host"
