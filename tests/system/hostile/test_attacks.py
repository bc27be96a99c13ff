"""Each attack by itself against a running host: shown out in words, at little cost, and forgotten.

While it goes on somebody honest calls all the time. The bounds on time are wide, for the
machine may be busy: what they catch is a host that stops for everybody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from protocol.connection import Connection
from protocol.messages.cluster import GetStatus
from protocol.messages.hello import WhoAmI
from protocol.methods import STATUS, WHOAMI
from tests.support.attacks import members, runners, strangers
from tests.support.attacks.target import Target
from tests.support.siege import Siege
from tests.system.homes import is_running

Attack = Callable[[Target], Awaitable[None]]

ATTACKS = [*strangers.QUICK, *strangers.SLOW, *members.QUICK, *runners.QUICK]
#: Seconds an honest call may take. Without turns on the loop single attacks took longer.
LONGEST_CALL_S = 1.5
#: MiB the host may grow by: 16 for what is hostile, the rest for what it keeps of any traffic.
MOST_GROWTH_MIB = 32.0


async def call_honestly(siege: Siege, stop: asyncio.Event) -> float:
    """Call until told to stop; give the seconds of the slowest call."""
    slowest = 0.0
    async with await Connection.dial(siege.target.url, token=siege.honest) as connection:
        while not stop.is_set():
            began = time.perf_counter()
            await connection.call(WHOAMI, WhoAmI())
            await connection.call(STATUS, GetStatus())
            slowest = max(slowest, (time.perf_counter() - began) / 2)
            await asyncio.sleep(0.005)
    return slowest


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_an_attack_is_shown_out_and_nobody_else_notices(
    siege: Siege, there: Target, attack: Attack
) -> None:
    before_mib = siege.rss_mib()
    stop = asyncio.Event()
    honest = asyncio.create_task(call_honestly(siege, stop))
    try:
        await asyncio.wait_for(attack(there), 60)
    finally:
        stop.set()
        slowest_s = await asyncio.wait_for(honest, 30)
    assert slowest_s < LONGEST_CALL_S
    assert siege.rss_mib() - before_mib < MOST_GROWTH_MIB
    assert is_running(siege.pid)


def test_after_all_of_it_the_host_is_as_it_was(siege: Siege) -> None:
    home = siege.home
    assert home.pid("host") == siege.pid, "it was started anew"
    assert home.run("kohaku", "task", "submit", "--wait", "--", "true").code == 0
    told = siege.log()
    assert "Traceback" not in told
    assert "incident" not in told
    assert len(told.splitlines()) < 100, "strangers fill the log"
