"""What the log is told of those who are turned away: enough to see it, never a flood."""

from __future__ import annotations

import logging

import pytest

from kohaku_daemon.host.refusals import MOST, QUIET_S, Refusals
from protocol.connection import Connection
from protocol.errors import Conflict, Unauthenticated
from tests.support.host import (
    RunningHost,
    a_credential,
    dial_runner,
    join,
    join_token,
    linked_runner,
)

WHY = Unauthenticated("it is not known")


class Dial:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Give the address and the text of each warning."""
    return [
        (vars(record)["address"], record.getMessage())
        for record in caplog.records
        if record.levelno >= logging.WARNING
    ]


def test_an_address_and_a_reason_are_told_once_and_again_after_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Dial()
    refusals = Refusals(clock)
    for address, reason in [("a", "a token"), ("a", "a join"), ("b", "a token")] * 3:
        refusals.note(address, reason, WHY)
    assert told(caplog) == [
        ("a", "a token refused: it is not known"),
        ("a", "a join refused: it is not known"),
        ("b", "a token refused: it is not known"),
    ]
    clock.now += QUIET_S - 1
    refusals.note("a", "a token", WHY)
    assert len(told(caplog)) == 3
    clock.now += 1
    refusals.note("a", "a token", WHY)
    assert len(told(caplog)) == 4


def test_ever_new_addresses_are_neither_a_flood_nor_a_leak(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Dial()
    refusals = Refusals(clock)
    for number in range(3 * MOST):
        refusals.note(f"10.0.{number // 256}.{number % 256}", "a token", WHY)
    assert len(told(caplog)) == len(refusals._told) == MOST
    clock.now += QUIET_S
    refusals.note("a", "a token", WHY)
    assert told(caplog)[-1][0] == "a"
    assert len(refusals._told) == 1


def test_nobody_chooses_how_long_a_line_is(caplog: pytest.LogCaptureFixture) -> None:
    Refusals(Dial()).note("a", "a join", Conflict("x" * 100_000))
    assert len(caplog.records[0].getMessage()) < 400


async def test_the_doors_tell_whom_they_refuse_and_never_a_secret(
    host: RunningHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong_token, wrong_join = "kht_" + "1" * 64, "khj_" + "2" * 64
    async with linked_runner(host):
        for _ in range(2):
            with pytest.raises(Unauthenticated):
                await Connection.dial(host.url, token=wrong_token)
            with pytest.raises(Unauthenticated):
                await dial_runner(host, credential=a_credential("nobody"))
            stranger = await dial_runner(host, is_node=False, credential=a_credential("other"))
            with pytest.raises(Unauthenticated):
                await join(stranger, wrong_join)
            await stranger.close()
            copy = await dial_runner(host)
            with pytest.raises(Conflict):
                await copy.register(instance="another")
            await copy.close()
    lines = told(caplog)
    assert {address for address, _ in lines} == {"127.0.0.1"}
    assert [text.partition(":")[0] for _, text in lines] == [
        "a token refused",
        "a runner refused",
        "a join refused",
        "a second runner of node n1 refused",
    ]
    joined = [record for record in caplog.records if record.getMessage() == "a runner joined"]
    assert [vars(record)["node"] for record in joined] == ["n1"]
    for secret in (wrong_token, wrong_join, a_credential("nobody"), a_credential("n1")):
        assert secret not in repr([vars(record) for record in caplog.records])


async def test_a_name_that_is_taken_is_told(
    host: RunningHost, caplog: pytest.LogCaptureFixture
) -> None:
    async with linked_runner(host):
        other = await dial_runner(host, is_node=False, credential=a_credential("other"))
        with pytest.raises(Conflict):
            await join(other, await join_token(host))
        await other.close()
    ((address, text),) = told(caplog)
    assert (address, text) == (
        "127.0.0.1",
        "a join refused: a node called n1 is in the cluster already",
    )
