"""A real cluster that is about to be attacked, and what shows how it bears it.

Knows: real daemons in a home of their own; tokens of an honest and a dishonest user; the
credential of a node that belongs to an attacker; memory and CPU of the host from /proc.
Does not know: the attacks (``tests.support.attacks``).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kohaku_daemon.clock import SystemClock
from kohaku_daemon.core.access.tokens import TokenKind, make_token
from protocol.connection import Connection
from protocol.ids import NodeName
from protocol.messages.runner import Join
from protocol.methods import RUNNER_JOIN
from protocol.models.access import Role
from tests.support.attacks.target import Target
from tests.support.host import a_token_record, give_tokens
from tests.system.homes import Home, is_running, wait_for

_ATTACKER: Final = make_token(TokenKind.API, b"a" * 32)
_HONEST: Final = make_token(TokenKind.API, b"h" * 32)
_CREDENTIAL: Final = make_token(TokenKind.RUNNER, b"m" * 32)
_NODE: Final = "mallory"


@dataclass(frozen=True, slots=True)
class Siege:
    """A running cluster with one honest node, ``node1``, and one that is not."""

    home: Home
    target: Target
    #: API token of somebody who does nothing wrong.
    honest: str
    #: API token of the admin.
    admin: str
    #: Process id of the host.
    pid: int

    def cpu_s(self) -> float:
        """Give the CPU seconds the host has used (man 5 proc)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        """Give the host's resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def set_apart(self) -> None:
        """Give the host a core that nobody else of a siege uses: the others are other machines.

        With one core there is none to give.
        """
        mine, _ = divided_cores()
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), mine)

    def log(self) -> str:
        """Give what the host wrote to its log."""
        (file,) = self.home.folder.rglob("host.log")
        return file.read_text()


def divided_cores() -> tuple[set[int], set[int]]:
    """Give the core of the host, and those of everybody else; both all if there is but one."""
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others) or {first}


@contextmanager
def besieged(folder: Path, backend: str = "mock", **settings: str) -> Iterator[Siege]:
    """Run a cluster of one node, and let the attacker's node join it."""
    home = Home(folder)
    arguments = ["up", "--detach", "--listen", "127.0.0.1:0", "--backend", backend]
    try:
        _start(home, arguments, settings)  # which makes the admin's token
        # Tokens are given to a host that does not run.
        _stop(home)
        (book,) = folder.rglob("cluster.json")
        now = SystemClock().now()
        give_tokens(
            book.parent,
            a_token_record(_ATTACKER, Role.USER, user="mallory", created_at=now),
            a_token_record(_HONEST, Role.USER, user="ann", created_at=now),
        )
        _start(home, arguments, settings)
        (url,) = (file.read_text().strip() for file in folder.rglob("host.url"))
        join_token = home.kohaku("node", "join-token").split()[0]
        asyncio.run(_join(url, join_token))
        address, _, port = url.removeprefix("http://").rpartition(":")
        target = Target((address, int(port)), _ATTACKER, _CREDENTIAL, _NODE, "node1")
        (admin,) = (file.read_text().strip() for file in folder.rglob("admin.token"))
        yield Siege(home, target, _HONEST, admin, home.pid("host"))
    finally:
        home.down()


def _start(home: Home, arguments: list[str], settings: dict[str, str]) -> None:
    done = home.run("kohakud", *arguments, **settings)
    assert done.code == 0, done


def _stop(home: Home) -> None:
    for name in ("host", "runner-node1"):
        pid = home.pid(name)
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda pid=pid: not is_running(pid), f"{name} to stop")  # type: ignore[misc]


async def _join(url: str, token: str) -> None:
    async with await Connection.dial(url, path="/v1/runner") as connection:
        asked = Join(token=token, node=NodeName(_NODE), credential=_CREDENTIAL)
        await connection.call(RUNNER_JOIN, asked)
