"""The link to the host: how it is won, and that it is always won again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from protocol.messages.runner import AttemptState
from tests.kohaku_daemon.runner.fake_host import JOIN_TOKEN, FakeHost
from tests.kohaku_daemon.runner.machine import Machine, a_start
from tests.kohaku_daemon.runner.waiting import until

OTHER_TOKEN = "khj_" + "2" * 64


async def test_a_join_whose_answer_is_lost_is_joined_again_for_nothing(
    host: FakeHost, machine: Machine
) -> None:
    host.loses_join_answer = True
    await machine.start()
    await until(lambda: host.registers)
    first, second = host.joins
    assert first == second
    assert (first.node, first.labels) == ("gpu-01", {"rack": "1"})
    assert list(host.nodes.values()) == ["gpu-01"]

    host.cut()
    await until(lambda: len(host.registers) == 2)
    assert host.hellos == ["", "", first.credential]
    assert host.registers[0].instance == host.registers[1].instance


async def test_a_runner_that_dies_while_joining_joins_as_the_same_one(
    host: FakeHost, machine: Machine
) -> None:
    host.loses_join_answer = True
    await machine.start()
    await until(lambda: host.joins)
    await machine.crash()
    await machine.start()
    await until(lambda: host.registers)
    assert len({join.credential for join in host.joins}) == 1


async def test_a_refused_join_goes_well_once_there_is_another_token(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    host.tokens = {OTHER_TOKEN}
    await machine.start()
    await until(lambda: len(host.joins) >= 3)
    told = [record.getMessage() for record in caplog.records if "join" in record.getMessage()]
    assert told == ["the host does not let this runner join: the join token is unknown or used up"]

    machine.token_file.write_text(OTHER_TOKEN + "\n")
    await until(lambda: host.registers)


async def test_no_token_is_told_with_what_to_do(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.token_file.write_text("")
    await machine.start()
    await until(lambda: len(host.hellos) >= 2)
    assert "kohaku node join-token" in caplog.text
    assert host.joins == []


async def test_a_host_that_is_away_at_first_is_found_when_it_comes(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    await host.leave()
    await machine.start()
    await until(lambda: machine.ready)
    await until(lambda: "cannot connect" in caplog.text)
    await host.arrive()
    await until(lambda: host.registers)


async def test_a_night_without_the_host_leaves_few_lines(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    await machine.start()
    await until(lambda: host.registers)
    caplog.clear()
    dials = 0

    def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dials
        dials += 1
        writer.close()

    await host.leave()
    refuser = await asyncio.start_server(refuse, "127.0.0.1", host.port)
    await until(lambda: dials >= 5)
    refuser.close()
    await refuser.wait_closed()
    told = [record for record in caplog.records if record.name.endswith("uplink")]
    assert 1 <= len(told) <= 3


async def test_a_revoked_runner_says_so_and_its_tasks_go_on(
    host: FakeHost,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.uplink._STRANGER_RETRY_S", 0.01)
    await machine.start()
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is AttemptState.RUNNING)
    (credential,) = host.nodes

    host.remove_nodes()
    await until(lambda: host.hellos.count(credential) >= 2)
    assert "does not know this runner's credential" in caplog.text
    assert credential not in caplog.text
    assert len(host.joins) == 1  # the token it joined with is no leave to join again
    assert machine.launches()["1-1"].state is not AttemptState.ENDED

    host.tokens = {OTHER_TOKEN}
    caplog.clear()
    machine.token_file.write_text(OTHER_TOKEN)
    await until(lambda: host.nodes)
    await until(lambda: len(host.registers) >= 2)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        "the host no longer knows this runner; joining anew with the join token "
        f"{OTHER_TOKEN[:10]}..."
    ]
    assert host.joins[-1].credential != credential
    assert [report.state for report in host.registers[-1].attempts] == [AttemptState.RUNNING]


async def test_no_secret_is_ever_logged(
    host: FakeHost, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await machine.start()
    await until(lambda: host.registers)
    host.remove_nodes()
    await until(lambda: "does not know" in caplog.text)
    (join,) = host.joins
    assert join.credential not in caplog.text
    assert JOIN_TOKEN not in caplog.text
