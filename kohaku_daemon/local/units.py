"""systemd units for a host and a runner that start with the machine.

Knows: systemd's words, and which of its walls would fall on tasks. Does not know: settings.
Why each line of a unit is there is said in the unit, where its reader is.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from protocol.home import config_dir

HOST: Final = "kohaku-host.service"
RUNNER: Final = "kohaku-runner.service"

_HOST: Final = """\
# Written by: kohakud init --systemd
[Unit]
Description=KohakuRiver host
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
ExecStart={command} host --config {config} --data {data}
Restart=on-failure
RestartSec=2
# One connection for each runner and client, and files of its own.
LimitNOFILE=65536
UMask=0077

# The host coordinates and starts no program: it needs its folder and the network.
ReadWritePaths={data}
ProtectSystem=strict
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
{capabilities}
[Install]
WantedBy={target}
"""

_NO_CAPABILITIES: Final = """\
# None at all. Without them root passes only through folders open to it like to anybody: Python
# and this package must not lie in the home of somebody, mode 0700.
CapabilityBoundingSet=
"""

_RUNNER: Final = """\
# Written by: kohakud init --systemd
[Unit]
Description=KohakuRiver runner
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
ExecStart={command} runner --config {config} --data {data}
# A host that is away is no failure: the runner dials until it answers.
Restart=on-failure
RestartSec=2

# Tasks outlive the runner: a stop or an upgrade ends the runner's own process and no other.
KillMode=process
# The runner limits each task in a cgroup below its own.
Delegate=yes
# A group with limits below it may hold no process itself, not even ours (systemd 254 and
# newer; before that the runner moves itself).
DelegateSubgroup=kohaku-daemons
# A task killed for its memory is that task's end, not the runner's.
OOMPolicy=continue
# Tasks count here too.
TasksMax=infinity
LimitNOFILE=1048576
UMask=0077

# No ProtectSystem, PrivateTmp, NoNewPrivileges, Restrict...: tasks are started from here, so
# every such wall would stand around them too, and a private /tmp would go with the runner.
# What keeps tasks apart from this machine is the backend's business; see: kohakud check

[Install]
WantedBy={target}
"""


def folder() -> Path:
    """Give the folder the units go to: systemd's, or our own where everything is under one."""
    if os.environ.get("KOHAKU_HOME"):
        return config_dir() / "systemd"
    if os.geteuid() == 0:
        return Path("/etc/systemd/system")
    return Path("~/.config/systemd/user").expanduser()


def host(config: Path, data: Path) -> str:
    """Write the host's unit."""
    # Where there is a set to give up: a user's systemd has none.
    capabilities = _NO_CAPABILITIES if os.geteuid() == 0 else ""
    return _HOST.format(
        command=_command(),
        config=_quoted(config),
        data=_quoted(data),
        capabilities=capabilities,
        target=_target(),
    )


def runner(config: Path, data: Path) -> str:
    """Write the runner's unit."""
    return _RUNNER.format(
        command=_command(), config=_quoted(config), data=_quoted(data), target=_target()
    )


def next_steps(made: Mapping[Path, str]) -> str:
    """Say how the units are put to use."""
    names = " ".join(path.name for path in made)
    systemctl = "systemctl" if os.geteuid() == 0 else "systemctl --user"
    lines = []
    if os.geteuid() == 0 and any(path.name == HOST for path in made) and (shut := find_shut()):
        lines += [
            f"warning: {shut} is closed to root without capabilities, so {HOST} cannot start",
            f"  install KohakuRiver outside of it, in /opt say, or: chmod o+x {shut}",
        ]
    lines.append("next:")
    if os.environ.get("KOHAKU_HOME"):
        lines.append(f"  {systemctl} link {' '.join(str(path) for path in made)}")
    lines.append(f"  {systemctl} daemon-reload")
    if any(path.name == RUNNER for path in made):
        lines.append(
            "  write host and join_token_file into runner.toml, see: kohaku node join-token"
        )
    lines.append(f"  {systemctl} enable --now {names}")
    if os.geteuid() != 0:
        lines.append("  loginctl enable-linger     # so that they run while you are logged out")
    return "\n".join(lines) + "\n"


def find_shut() -> Path | None:
    """Find a folder on the way to Python or to this package that root may not pass by its modes.

    A host under systemd has no capability to pass all the same. None if there is no such folder.
    """
    python = Path(sys.executable)
    for goal in (python, python.resolve(), Path(__file__).resolve()):
        for folder in reversed(goal.parents):
            if not _lets_root_pass(folder.stat()):
                return folder
    return None


def _lets_root_pass(status: os.stat_result) -> bool:
    """Apply the one class of mode bits that root's: owner, group or others, path_resolution(7)."""
    if status.st_uid == 0:
        bit = stat.S_IXUSR
    elif status.st_gid == 0:
        bit = stat.S_IXGRP
    else:
        bit = stat.S_IXOTH
    return bool(status.st_mode & bit)


def _command() -> str:
    return f"{_quoted(sys.executable)} -P -m kohaku_daemon"


def _target() -> str:
    return "multi-user.target" if os.geteuid() == 0 else "default.target"


def _quoted(path: Path | str) -> str:
    # systemd.service(5), systemd.unit(5): quotes hold spaces, % and $ mean something.
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("%", "%%").replace("$", "$$") + '"'
