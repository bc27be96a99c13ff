"""The command ``kohakud``: arguments in, one daemon or one chore out.

Knows: the commands and their flags. Does not know: how any of it is done; each command
imports what it needs when it is asked for, so that ``kohakud --help`` loads nothing.

Exit statuses: 0 done, 1 it failed, 2 the command line or a setting is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from protocol.errors import BadRequest, KohakuError

_STARTS: Final = """\
a cluster on this machine:   kohakud up --detach
a cluster of several:        kohakud host       on one machine
                             kohakud runner     on each of the others
"""


def run() -> NoReturn:
    """Be the command ``kohakud``."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Carry out one command line and give its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except _Helped:
        return 0
    except KohakuError as error:
        say(f"kohakud: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
        return 2 if isinstance(error, BadRequest) else 1
    except OSError as error:
        if error.filename is None:
            raise
        # A disk that is full, read-only or gone, under one of the small files of a home.
        say(f"kohakud: cannot use {error.filename}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130


def say(text: str) -> None:
    """Tell the person who watches."""
    sys.stderr.write(text + "\n")


# --- the commands ---------------------------------------------------------------------------


def _host(arguments: argparse.Namespace) -> int:
    from kohaku_daemon import logs
    from kohaku_daemon.host.config import load
    from kohaku_daemon.local.serving import serve

    flags = _given(arguments, "data", "log_level", "insecure_plaintext")
    config = load(flags | _listen(arguments.listen), file=arguments.config)
    logs.set_up(config.log_level, as_json=config.log_json)
    from kohaku_daemon.host.daemon import run_host  # large; a wrong setting is told before

    serve(partial(run_host, config), data=config.data, name="host", publishes_url=True)
    return 0


def _runner(arguments: argparse.Namespace) -> int:
    from kohaku_daemon import logs
    from kohaku_daemon.local.serving import serve
    from kohaku_daemon.runner.config import load

    flags = _given(
        arguments, "name", "host", "data", "join_token", "join_token_file", "log_level",
        "insecure_plaintext", "labels", "backends",
    )  # fmt: skip
    config = load(flags, file=arguments.config)
    logs.set_up(config.log_level, as_json=config.log_json)
    from kohaku_daemon.runner.daemon import run_runner

    serve(partial(run_runner, config), data=config.data, name=f"runner-{config.name}")
    return 0


def _up(arguments: argparse.Namespace) -> int:
    from kohaku_daemon.local.address import Asked
    from kohaku_daemon.local.up import Wanted, up

    where = _listen(arguments.listen)
    asked = Asked(where["listen"], where["port"]) if where else None
    return up(Wanted(arguments.runners, arguments.backend, asked), detach=arguments.detach)


def _down(arguments: argparse.Namespace) -> int:
    from kohaku_daemon.local.down import down

    return down(tasks=arguments.tasks)


def _init(arguments: argparse.Namespace) -> int:
    from kohaku_daemon.local.init import init

    return init(arguments.what, systemd=arguments.systemd, force=arguments.force)


def _check(arguments: argparse.Namespace) -> int:
    from kohaku_daemon.local.check import check

    return check(as_json=arguments.json)


def _backup(arguments: argparse.Namespace) -> int:
    from kohaku_daemon.local.backup import backup

    return backup(arguments.target, _given(arguments, "data"), config=arguments.config)


def _restore(arguments: argparse.Namespace) -> int:
    from kohaku_daemon.local.restore import restore

    return restore(
        arguments.file,
        _given(arguments, "data"),
        config=arguments.config,
        resume=arguments.resume,
    )


# --- the command line -----------------------------------------------------------------------


class _Helped(Exception):
    """Help was asked for and given."""


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as the daemons do: what is wrong, then what to do."""

    def parse_known_args(  # type: ignore[override]  # the overloads only relate the namespaces
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse, and refuse what is left over here, where the options of a command are known."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            raise self._left_over(left)
        return found, left

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise BadRequest(message, hint=f"see: {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End after --help; mistakes come by ``error``."""
        raise _Helped

    def _left_over(self, left: Sequence[str]) -> BadRequest:
        from difflib import get_close_matches

        option = next((part.partition("=")[0] for part in left if part.startswith("-")), "")
        if not option:
            return BadRequest(f"unexpected argument {left[0]!r}", hint=f"see: {self.prog} --help")
        near = get_close_matches(option, self._option_string_actions, n=1)
        start = f"did you mean {near[0]}? " if near else ""
        return BadRequest(f"unknown option {option}", hint=f"{start}see: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kohakud",
        description="The daemons of KohakuRiver.",
        epilog=_STARTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    host = _add(commands, "host", _host, "Run the host: one a cluster.")
    _add_daemon_flags(host)
    host.add_argument("--listen", metavar="ADDR:PORT", help="port 0 picks a free one")

    runner = _add(commands, "runner", _runner, "Run a runner: one on each machine with tasks.")
    _add_daemon_flags(runner)
    runner.add_argument("--name", help="of this node; by default the machine's")
    runner.add_argument("--host", metavar="URL", help="where the host is")
    runner.add_argument(
        "--join-token-file", metavar="FILE", help="token of: kohaku node join-token"
    )
    runner.add_argument(
        "--join-token", metavar="TOKEN", help="the same; others on this machine may see it"
    )
    runner.add_argument(
        "--backend", dest="backends", metavar="NAME", action="append",
        help="what tasks may run in; may be repeated; the first is the default",
    )  # fmt: skip
    runner.add_argument(
        "--label", dest="labels", metavar="NAME=VALUE", action="append", type=_label,
        help="may be repeated",
    )  # fmt: skip

    up = _add(commands, "up", _up, "Start a whole cluster on this machine.")
    up.add_argument("--detach", action="store_true", help="return when it is ready")
    up.add_argument("--runners", metavar="N", type=_whole, help="node1 to nodeN; 1 by default")
    up.add_argument("--listen", metavar="ADDR:PORT", help="port 0 picks a free one")
    up.add_argument("--backend", metavar="NAME", help="what tasks run in")

    down = _add(commands, "down", _down, "Stop the cluster of this machine; tasks go on.")
    down.add_argument("--tasks", action="store_true", help="end all tasks first")

    init = _add(commands, "init", _init, "Write settings files that explain every key.")
    init.add_argument("what", nargs="?", choices=("host", "runner", "all"), default="all")
    init.add_argument("--systemd", action="store_true", help="write systemd units too")
    init.add_argument("--force", action="store_true", help="replace files that are there")

    check = _add(commands, "check", _check, "Say what this machine can do, and what it lacks.")
    check.add_argument("--json", action="store_true", help="one JSON document")

    backup = _add(commands, "backup", _backup, "Save the host of this machine in one file.")
    backup.add_argument(
        "target", nargs="?", metavar="FILE|FOLDER", type=Path,
        help="a new file, or a folder for it; by default the present folder",
    )  # fmt: skip
    _add_place_flags(backup)

    restore = _add(commands, "restore", _restore, "Bring a host back from a backup.")
    restore.add_argument("file", metavar="FILE", type=Path, help="from kohakud backup")
    _add_place_flags(restore)
    restore.add_argument(
        "--resume", action="store_true",
        help="launch at once what waited: the host was stopped before the backup, and since",
    )  # fmt: skip
    return parser


def _add(
    commands: Any, name: str, command: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, allow_abbrev=False
    )
    parser.set_defaults(command=command)
    return parser


def _add_place_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings; see kohakud init")
    parser.add_argument("--data", metavar="FOLDER", help="everything it keeps")


def _add_daemon_flags(parser: argparse.ArgumentParser) -> None:
    _add_place_flags(parser)
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    parser.add_argument(
        "--insecure-plaintext", action="store_true", default=None,
        help="accept unencrypted connections to other machines",
    )  # fmt: skip


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Give the flags that were used; those left out are for the file and the environment."""
    values = {name: getattr(arguments, name) for name in names}
    if values.get("labels"):
        values["labels"] = dict(values["labels"])
    return {name: value for name, value in values.items() if value is not None}


def _listen(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    address, colon, port = text.rpartition(":")
    if not colon or not address or not port.isascii() or not port.isdigit():
        raise BadRequest(
            f"{text!r} is no address to listen on", hint="write ADDR:PORT, such as 127.0.0.1:8000"
        )
    return {"listen": address.strip("[]"), "port": int(port)}


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no label; write NAME=VALUE")
    return name, value
