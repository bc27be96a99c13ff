"""All attacks at once, over and over, against one host; and somebody honest who calls meanwhile.

Each side is a process of its own (``python -m tests.support.chaos attack|honest ...``), so
that neither holds up the other. All but the host are other machines, and what they cost
themselves is not the host's to pay: it has a core to itself, and where there is one, both
sides share the others. There attackers are ``nice``, in a session of their own too: Linux
shares a core among sessions first, where niceness within one does not count (man 7 sched,
"The autogroup feature").

Knows: how both run and what they tell, as one line of JSON.
Does not know: what is an attack (``tests.support.attacks``), how a host is started (``siege``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from protocol.client import Cluster, connect
from protocol.messages.cluster import GetStatus
from protocol.messages.task import ListTasks
from protocol.methods import STATUS, TASK_LIST
from tests.support.attacks import members, runners, strangers
from tests.support.attacks.target import Target
from tests.support.siege import Siege, divided_cores

ROOT: Final = Path(__file__).parents[2]
_NICE: Final = 19
_ATTACKS: Final = (*strangers.QUICK, *strangers.SLOW, *members.QUICK, *runners.QUICK)


@dataclass(frozen=True, slots=True)
class Calls:
    """What somebody honest saw. Milliseconds."""

    count: int
    failed: list[str]
    p50: float
    p99: float
    worst: float
    #: The 99th percentile of each kind of call.
    kinds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of time with or without attacks."""

    calls: Calls
    #: CPU seconds of the host for each second.
    cpu: float
    #: MiB of the host at its end.
    rss_mib: float
    #: How often each attack was carried out to its end.
    attacks: dict[str, int]
    #: Attacks that the host did not answer as it should.
    missed: list[str]


def run_phase(siege: Siege, seconds: float, *, attacked: bool) -> Phase:
    """Let somebody honest call for some seconds, with all attacks going on or with none."""
    siege.set_apart()
    attackers = _start("attack", json.dumps(asdict(siege.target)), seconds) if attacked else None
    cpu_before, began = siege.cpu_s(), time.monotonic()
    honest = _start("honest", siege.target.url, siege.honest, seconds)
    calls = Calls(**_finish(honest))
    cpu = (siege.cpu_s() - cpu_before) / (time.monotonic() - began)
    told = _finish(attackers) if attackers is not None else {"done": {}, "missed": []}
    return Phase(calls, cpu, siege.rss_mib(), told["done"], told["missed"])


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.chaos", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, f"a side ended with {process.returncode}"
    return json.loads(out)


async def attack(target: Target, seconds: float) -> dict[str, Any]:
    """Carry out every attack, each over and over from an address of its own."""
    done, missed = Counter[str](), []
    until = time.monotonic() + seconds

    async def repeat(number: int, one: Callable[[Target], Awaitable[None]]) -> None:
        there = replace(target, source=f"127.0.1.{number + 1}")
        while time.monotonic() < until:
            try:
                await one(there)
            except Exception as reason:
                missed.append(f"{one.__name__}: {type(reason).__name__} {reason}"[:300])
                await asyncio.sleep(0.1)
            else:
                done[one.__name__] += 1

    await asyncio.gather(*(repeat(number, one) for number, one in enumerate(_ATTACKS)))
    return {"done": done, "missed": missed}


async def call_honestly(url: str, token: str, seconds: float) -> Calls:
    """Make the calls that people's tools make, one after the other, each as soon as it may."""
    times: dict[str, list[float]] = {}
    failed: list[str] = []
    until = time.monotonic() + seconds

    async def timed(kind: str, call: Awaitable[object]) -> None:
        began = time.perf_counter()
        try:
            await call
        except Exception as reason:
            failed.append(f"{kind}: {reason}")
        times.setdefault(kind, []).append((time.perf_counter() - began) * 1e3)

    async with connect(url, token=token) as there:
        while time.monotonic() < until:
            await timed("status", there.call(STATUS, GetStatus()))
            await timed("page", there.call(TASK_LIST, ListTasks(limit=50)))
            made: list[Any] = []
            await timed("submit", _submit(there, made))
            if made:
                await timed("wait", there.wait(made[0]))
            await timed("dial", _dial(url, token))
            await asyncio.sleep(0.01)
    every = sorted(duration for kind in times.values() for duration in kind)
    kinds = {kind: _percentile(sorted(one), 0.99) for kind, one in times.items()}
    return Calls(
        len(every), failed, statistics.median(every), _percentile(every, 0.99), every[-1], kinds
    )


async def _submit(there: Cluster, made: list[Any]) -> None:
    made.append(await there.submit(["true"], cores=0))


async def _dial(url: str, token: str) -> None:
    async with connect(url, token=token) as there:
        await there.call(STATUS, GetStatus())


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def main() -> None:
    """Be one of the two sides."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.chaos")
    sides = parser.add_subparsers(dest="side", required=True)
    bad = sides.add_parser("attack")
    bad.add_argument("target", type=json.loads)
    good = sides.add_parser("honest")
    good.add_argument("url")
    good.add_argument("token")
    for side in (bad, good):
        side.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, divided_cores()[1])
    if arguments.side == "attack":
        os.nice(_NICE)
        with suppress(OSError):  # a kernel without autogroups
            Path("/proc/self/autogroup").write_text(str(_NICE))
        where = tuple(arguments.target.pop("authority"))
        told = asyncio.run(attack(Target(where, **arguments.target), arguments.seconds))
    else:
        calls = call_honestly(arguments.url, arguments.token, arguments.seconds)
        told = asdict(asyncio.run(calls))
    print(json.dumps(told))  # noqa: T201  that is how it tells


if __name__ == "__main__":
    main()
