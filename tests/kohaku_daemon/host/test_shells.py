"""Commands in environments: what is typed and said, and that none outlives its reader."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kohaku_daemon.host import shells
from protocol import blocking
from protocol.errors import Forbidden, NotFound, Unauthenticated
from protocol.messages.environment import (
    CreateEnvironment,
    ListRegistries,
    OneEnvironment,
    OneRegistry,
    OpenShell,
    SetRegistry,
    ShellEnd,
    ShellOutput,
)
from protocol.methods import (
    ENVIRONMENT_CREATE,
    ENVIRONMENT_DELETE,
    ENVIRONMENT_SHELL,
    REGISTRY_LIST,
    REGISTRY_REMOVE,
    REGISTRY_SET,
)
from protocol.models.access import Role
from protocol.shell import Shell
from tests.support.dockerds import Dockerd
from tests.support.environments import LONGEST_S, an_operator, create, host_with_engine, run
from tests.support.host import TOKENS, RunningHost, until


@pytest.fixture
async def host(tmp_path: Path, dockerd: Dockerd) -> AsyncIterator[RunningHost]:
    """A host with an environment ``torch``."""
    async with host_with_engine(tmp_path / "data", dockerd) as running:
        async with an_operator(running) as cluster:
            await create(cluster, "torch")
        yield running


async def read_until(shell: Shell, words: bytes) -> bytes:
    """Read what is said until these words come."""
    said = b""
    async with asyncio.timeout(LONGEST_S):
        while words not in said:
            item = await anext(shell)
            assert not isinstance(item, ShellEnd), (said, item)
            said += item.data
    return said


async def end_of(shell: Shell) -> ShellEnd:
    async with asyncio.timeout(LONGEST_S):
        async for item in shell:
            if isinstance(item, ShellEnd):
                return item
    raise AssertionError("it never ended")


def processes(words: str) -> list[int]:
    """Give the processes of this machine that have these words on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def test_both_outputs_input_and_code_are_passed_on_as_they_are(host: RunningHost) -> None:
    typed = bytes(range(256)) * 4000
    async with an_operator(host) as cluster:
        code, out, err = await run(
            cluster, "torch", "sh", "-c", "cat; echo wrong >&2; exit 7", typed=typed
        )
        assert (code, out == typed, err) == (7, True, b"wrong\n")
        assert await run(cluster, "torch", "id", "-u") == (0, b"0\n", b"")
        code, out, err = await run(cluster, "torch", "nosuch")
        assert code in {126, 127}
        assert b"nosuch" in out + err


async def test_a_script_without_asyncio_runs_one_too(host: RunningHost) -> None:
    def script() -> list[ShellOutput | ShellEnd]:
        with (
            blocking.connect(host.url, TOKENS[Role.OPERATOR]) as cluster,
            cluster.shell("torch", ("cat",)) as shell,
        ):
            assert cluster.environment("torch") == cluster.environments()[0]
            shell.type(b"typed")
            shell.end_input()
            return list(shell)

    assert await asyncio.to_thread(script) == [ShellOutput(b"typed"), ShellEnd(0)]


async def test_a_terminal_has_its_size_and_its_keys(host: RunningHost) -> None:
    async with (
        an_operator(host) as cluster,
        cluster.shell("torch", terminal=True, columns=97, rows=31) as shell,
    ):
        await shell.type(b"stty size\r")
        await read_until(shell, b"31 97")
        await shell.resize(120, 40)
        await shell.type(b"sleep 87654\r")
        await until(lambda: processes("87654"), "it runs")
        await shell.type(b"\x03")
        await until(lambda: not processes("87654"), "Ctrl-C ended it")
        await shell.type(b"echo code $?\r")
        await read_until(shell, b"code 130")
        await shell.type(b"stty size\r")
        await read_until(shell, b"40 120")
        # Docker's own engine would keep these two for itself and let go of the terminal.
        await shell.type(b"\x10\x11echo still there\r")
        await read_until(shell, b"still there\r\n")
        await shell.type(b"exit 5\r")
        assert (await end_of(shell)).code == 5


@pytest.mark.parametrize("terminal", [True, False])
async def test_a_command_ends_with_its_reader(
    host: RunningHost, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shells, "_GRACE_S", 0.2)
    number = f"98765.{int(terminal)}"
    command = ("sh", "-c", f"trap '' HUP; echo begun; sleep {number}; sleep {number}")
    async with an_operator(host) as cluster:
        async with cluster.shell("torch", command, terminal=terminal) as shell:
            await read_until(shell, b"begun")
            await until(lambda: processes(number), "it runs")
        await until(lambda: not processes(number), "it has ended")
        assert (await run(cluster, "torch", "true"))[0] == 0, "and the environment has not"


async def test_a_reader_that_stalls_holds_back_the_command_and_not_the_host(
    host: RunningHost,
) -> None:
    async with an_operator(host) as cluster:
        async with cluster.shell("torch", ("yes",)) as shell:
            await anext(shell)
            (yes,) = processes("yes\0")
            stat = Path(f"/proc/{yes}/stat")

            def used() -> int:
                fields = stat.read_text().rpartition(")")[2].split()
                return int(fields[11]) + int(fields[12])

            async def stands() -> bool:
                before = used()
                await asyncio.sleep(0.3)
                return used() - before <= 1

            async with asyncio.timeout(LONGEST_S):
                while not await stands():
                    pass
        await until(lambda: not processes("yes\0"), "it has ended")


async def test_a_forgotten_one_is_ended(host: RunningHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shells, "_IDLE_S", 0.3)
    async with an_operator(host) as cluster, cluster.shell("torch", ("sleep", "43210")) as shell:
        end = await end_of(shell)
        assert "nothing was typed or said" in end.error[1]
        await until(lambda: not processes("43210"), "it has ended")


async def test_input_of_no_sense_ends_it(host: RunningHost) -> None:
    async with an_operator(host) as cluster:
        ticket = await cluster.call(
            ENVIRONMENT_SHELL, OpenShell(environment="torch", command=("sleep", "54321"))
        )
        async with await host.connect(Role.OPERATOR) as connection:
            data = await connection.open_data(ticket.path, ticket.ticket)
            await until(lambda: processes("54321"), "it runs")
            await data.send(b"\xc1 no message")
            await until(lambda: not processes("54321"), "it has ended")
            await data.close()


async def test_a_ticket_is_for_one_kind_and_one_time(host: RunningHost) -> None:
    async with await host.connect(Role.OPERATOR) as operator:
        wanted = OpenShell(environment="torch", command=("true",))
        ticket = await operator.call(ENVIRONMENT_SHELL, wanted)
        with pytest.raises(Unauthenticated):
            await operator.open_data("/v1/stream/logs", ticket.ticket)
        ticket = await operator.call(ENVIRONMENT_SHELL, wanted)
        async with await operator.open_data(ticket.path, ticket.ticket) as data:
            async for _ in data:
                pass
        with pytest.raises(Unauthenticated):
            await operator.open_data(ticket.path, ticket.ticket)


async def test_only_operators_enter_and_each_time_leaves_a_line(host: RunningHost) -> None:
    async with await host.connect(Role.USER) as user:
        with pytest.raises(Forbidden):
            await user.call(ENVIRONMENT_SHELL, OpenShell(environment="torch"))
        with pytest.raises(Forbidden):
            await user.call(ENVIRONMENT_CREATE, CreateEnvironment(environment="x", image="y"))
        with pytest.raises(Forbidden):
            await user.call(ENVIRONMENT_DELETE, OneEnvironment("torch"))
        with pytest.raises(Forbidden):
            await user.call(REGISTRY_LIST, ListRegistries())
    async with an_operator(host) as cluster:
        await run(cluster, "torch", "echo", "s3cret")
        with pytest.raises(NotFound):
            await run(cluster, "trch", "true")
        account = SetRegistry(registry="ghcr.io", username="lab", password="s3cret")
        await cluster.call(REGISTRY_SET, account)
        await cluster.call(REGISTRY_REMOVE, OneRegistry("ghcr.io"))
        await cluster.events()  # by then all lines are on the disk
    lines = sqlite3.connect(host.data / "tasks.sqlite").execute(
        "SELECT actor, method, subject, outcome FROM audit WHERE actor = 'operator'"
    )
    told = lines.fetchall()
    assert ("operator", "environment.shell", "environment torch", "ok") in told
    assert ("operator", "environment.shell", "environment trch", "not_found") in told
    assert ("operator", "registry.set", "registry ghcr.io as lab", "ok") in told
    assert ("operator", "registry.remove", "registry ghcr.io", "ok") in told
    assert "s3cret" not in str(told)
