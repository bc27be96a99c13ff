"""``kohaku environment`` and ``kohaku registry`` as people and scripts run them."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protocol.models.access import Role
from tests.kohaku_tui.cli.conftest import ROOT
from tests.support.docker_fixtures import TEST_IMAGE
from tests.support.dockerds import Dockerd
from tests.support.environments import LONGEST_S, an_operator, create, host_with_engine
from tests.support.host import TOKENS, RunningHost, running_host, until


@dataclass
class Ran:
    """What came of a command line."""

    status: int
    out: bytes
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
async def host(tmp_path: Path, dockerd: Dockerd) -> AsyncIterator[RunningHost]:
    """A host that makes environments."""
    async with host_with_engine(tmp_path / "data", dockerd) as running:
        yield running


def variables(host: RunningHost) -> dict[str, str]:
    return {
        **os.environ,
        "KOHAKU_HOST": host.url,
        "KOHAKU_TOKEN": TOKENS[Role.OPERATOR],
        "KOHAKU_HOME": str(host.data.parent / "home"),
        "TERM": "xterm",
    }


async def kohaku(host: RunningHost, *words: str, typed: bytes = b"") -> Ran:
    """Run a command line without a terminal."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kohaku_tui", *words, cwd=ROOT, env=variables(host),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(LONGEST_S):
        out, err = await process.communicate(typed)
    assert process.returncode is not None
    return Ran(process.returncode, out, err.decode())


@dataclass
class Terminal:
    """A terminal on which a command runs."""

    fd: int
    slave: int
    process: asyncio.subprocess.Process
    said: bytes = b""

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def read(self) -> None:
        self.said += os.read(self.fd, 4096)

    async def shows(self, words: bytes) -> None:
        """Wait until these words are shown; they count once."""
        await until(lambda: words in self.said, f"{words!r} in {self.said!r}")
        self.said = self.said.partition(words)[2]

    async def ended(self) -> int:
        async with asyncio.timeout(LONGEST_S):
            return await self.process.wait()

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.slave)


@asynccontextmanager
async def on_terminal(host: RunningHost, *words: str) -> AsyncIterator[Terminal]:
    """Run a command line on a terminal of 101 columns and 33 rows."""
    fd, slave = pty.openpty()
    termios.tcsetwinsize(slave, (33, 101))
    loop = asyncio.get_running_loop()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kohaku_tui", *words, cwd=ROOT, env=variables(host),
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    terminal = Terminal(fd, slave, process)
    loop.add_reader(fd, terminal.read)
    try:
        yield terminal
    finally:
        loop.remove_reader(fd)
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(fd)
        os.close(slave)


async def test_a_script_makes_packs_and_removes_an_environment(host: RunningHost) -> None:
    made = await kohaku(host, "environment", "create", "torch", "--from", TEST_IMAGE)
    assert (made.status, made.out, made.err) == (0, b"torch\n", "")

    typed = bytes(range(256)) * 1000
    command = ("sh", "-c", "cat > /typed; cat /typed; echo wrong >&2; exit 7")
    ran = await kohaku(host, "env", "exec", "torch", "--", *command, typed=typed)
    assert (ran.status, ran.out == typed, ran.err) == (7, True, "wrong\n")

    packed = await kohaku(host, "env", "pack", "torch")
    digest = packed.out.decode().strip()
    assert (packed.status, len(digest), packed.err) == (0, 12, "")

    shown = (await kohaku(host, "env", "show", "torch", "--json")).document
    assert [version["digest"][:12] for version in shown["versions"]] == [digest]
    assert (shown["state"], shown["nodes"], shown["progress"]) == ("ready", [], "")
    assert digest in (await kohaku(host, "env", "show", "torch")).out.decode()
    listed = (await kohaku(host, "env", "list")).out.decode()
    assert [line.split()[:3] for line in listed.splitlines()] == [
        ["ENVIRONMENT", "STATE", "VERSION"],
        ["torch", "ready", digest],
    ]

    refused = await kohaku(host, "env", "delete", "torch")
    assert (refused.status, "add --yes" in refused.err) == (2, True)
    assert (await kohaku(host, "env", "delete", "torch", "--yes")).status == 0
    assert (await kohaku(host, "env", "list", "--json")).document == {
        "environments": [], "more": False
    }  # fmt: skip


async def test_stdin_may_be_a_file(host: RunningHost, tmp_path: Path) -> None:
    async with an_operator(host) as cluster:
        await create(cluster, "torch")
    file = tmp_path / "typed"
    file.write_bytes(os.urandom(300_000))
    with file.open("rb") as opened:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kohaku_tui", "env", "exec", "torch", "--", "cat",
            cwd=ROOT, env=variables(host), stdin=opened, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
    assert out == file.read_bytes()


async def test_what_cannot_be_made_ends_with_1_and_the_reason(host: RunningHost) -> None:
    failed = await kohaku(host, "env", "create", "torch", "--from", "127.0.0.1:1/x:1")
    assert (failed.status, failed.out) == (1, b"")
    assert "environment torch could not be made: image 127.0.0.1:1/x:1 cannot be pull" in failed.err
    unknown = await kohaku(host, "env", "exec", "trch", "--", "true")
    assert (unknown.status, "did you mean torch?" in unknown.err) == (1, True)
    packed = await kohaku(host, "env", "pack", "torch", "--json")
    assert (packed.status, json.loads(packed.err)["error"]["code"]) == (1, "conflict")
    nobody = await kohaku(host, "env", "pull", "torch")
    assert (nobody.status, "is not packed yet" in nobody.err) == (1, True)


async def test_a_shell_has_the_terminal_until_it_ends(host: RunningHost) -> None:
    async with an_operator(host) as cluster:
        await create(cluster, "torch")
    async with on_terminal(host, "env", "shell", "torch") as terminal:
        before = terminal.modes()
        await terminal.shows(b"# ")
        assert not terminal.modes()[3] & termios.ECHO
        terminal.type(b"stty size\r")
        await terminal.shows(b"33 101")
        termios.tcsetwinsize(terminal.slave, (20, 60))
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.type(b"sleep 0.3; stty size\r")
        await terminal.shows(b"20 60")
        terminal.type(b"\x03")  # a key as any other
        terminal.type(b"exit 3\r")
        assert await terminal.ended() == 3
        assert terminal.modes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_terminal_is_given_back_whatever_ends_us(host: RunningHost, number: int) -> None:
    async with an_operator(host) as cluster:
        await create(cluster, "torch")
    async with on_terminal(host, "env", "shell", "torch") as terminal:
        before = terminal.modes()
        await terminal.shows(b"# ")
        terminal.process.send_signal(number)
        assert await terminal.ended() == 128 + number
        assert terminal.modes() == before


async def test_a_command_that_is_killed_shows_its_signal(host: RunningHost) -> None:
    async with an_operator(host) as cluster:
        await create(cluster, "torch")
    async with on_terminal(host, "env", "shell", "torch", "--", "sh", "-c", "kill -9 $$") as gone:
        assert await gone.ended() == 137


async def test_a_host_that_stops_gives_the_terminal_back(tmp_path: Path, dockerd: Dockerd) -> None:
    data = tmp_path / "data"
    async with running_host(data, docker_socket=dockerd.socket) as host:
        async with an_operator(host) as cluster:
            await create(cluster, "torch")
        async with on_terminal(host, "env", "shell", "torch") as terminal:
            before = terminal.modes()
            await terminal.shows(b"# ")
            await host.stop()
            assert await terminal.ended() == 3
            assert terminal.modes() == before
            await terminal.shows(b"broke")
    async with host_with_engine(data, dockerd):
        pass  # it removes what the first one made


async def test_a_password_comes_from_where_it_is_not_seen(
    host: RunningHost, tmp_path: Path
) -> None:
    words = ("registry", "set", "https://GHCR.io", "--username", "lab")
    assert (await kohaku(host, *words)).status == 2
    assert (await kohaku(host, *words, "--password-stdin", typed=b"s3cret\n")).status == 0
    stored = json.loads((host.data / "cluster.json").read_text())["registries"]["1"]
    assert (stored["registry"], stored["password"]) == ("ghcr.io", "s3cret")
    assert (host.data / "cluster.json").stat().st_mode & 0o077 == 0

    file = tmp_path / "password"
    file.write_text("other\n")
    answer = await kohaku(host, *words, "--password-file", str(file), "--json")
    assert answer.document["registries"][0]["username"] == "lab"
    assert b"other" not in answer.out
    assert (await kohaku(host, "registry", "list")).out.decode().splitlines()[1].split()[:2] == [
        "ghcr.io", "lab"
    ]  # fmt: skip
    both = await kohaku(host, *words, "--password-file", str(file), "--password-stdin")
    assert (both.status, "choose one" in both.err) == (2, True)
    assert (await kohaku(host, "registry", "remove", "ghcr.io")).status == 0
    assert (await kohaku(host, "registry", "remove", "ghcr.io")).status == 1
