"""Many runners that only beat, and many clients that only watch."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from frame import Row, interleave, percentile
from loads import Nulls, Watchers
from stage import Stage, stage

from protocol.client import Cluster
from protocol.messages.task import ListTasks
from protocol.methods import TASK_LIST
from protocol.models.task import TaskSpec

_WATCHED_S: Final = 6.0
#: Other calls, each second, while runners beat.
_CALLS_A_SECOND: Final = 50
_AT_ONCE: Final = 100
_WATCHERS: Final = 200
#: Null tasks, each second, that make the topic ``tasks`` busy; each changes two or three times.
_TASKS_A_SECOND: Final = 10
#: Nodes that make the topic ``readings`` busy, a heartbeat a second each.
_NODES_WATCHED: Final = 20
_SETTINGS: Final = {
    "KOHAKU_HOSTD_HEARTBEAT": "1s",
    # One address is all runners here: they dial at the same moment.
    "KOHAKU_HOSTD_MAX_STRANGERS_PER_ADDRESS": "4000",
}
_MACHINE: Final = {"gpus": 8, "tasks_shown": 10}
_SPEC: Final = TaskSpec(command=("/bin/true",), cores=0)


@dataclass(slots=True)
class _Calls:
    """How the callers of one host fare."""

    place: Stage
    #: Milliseconds of the last round, by method.
    took: dict[str, list[float]] = field(default_factory=dict)

    def p99_ms(self) -> float:
        """Make calls for a while."""
        self.took = asyncio.run(_call_for(self.place, _WATCHED_S))
        return percentile([ms for times in self.took.values() for ms in times], 0.99)

    @property
    def note(self) -> str:
        """Say which calls are slow."""
        told = (
            f"{name} {percentile(times, 0.5):.1f}/{percentile(times, 0.99):.1f}"
            for name, times in self.took.items()
        )
        return f"p50/p99 {', '.join(told)}"


def heartbeats(rounds: int) -> list[Row]:
    """1,000 and 200 simulated runners at 1 Hz: a share of a core, and p99 of other calls."""
    return [*_beating(rounds, 1000, "<= 20 %"), *_beating(rounds, 200, "<= 5 %")]


def _beating(rounds: int, nodes: int, goal: str) -> list[Row]:
    """Interleave the calls with the same on a host with one runner: what the machine adds."""
    with stage() as place, stage() as quiet:
        for there, count in ((place, nodes), (quiet, 1)):
            there.start_host(**_SETTINGS)
            Nulls(there, count, **_MACHINE)
        crowd, alone = _Calls(place), _Calls(quiet)
        share, busy_ms, quiet_ms = interleave(
            rounds, lambda: _share_of_beats(place), crowd.p99_ms, alone.p99_ms
        )
    note = f"{crowd.note}; one runner: {alone.note}"
    return [
        Row(
            f"heartbeats.{nodes}", f"host CPU, {nodes:,} runners at 1 Hz", "%", share,
            goal=goal, note="a heartbeat of 8 GPUs and 10 tasks has 2.1 kB",
        ),
        Row(
            f"heartbeats.{nodes}_p99", f"{_CALLS_A_SECOND} other calls a second meanwhile, p99",
            "ms", busy_ms, "one runner", quiet_ms, "<= 20 ms", note,
        ),
    ]  # fmt: skip


def watchers(rounds: int) -> list[Row]:
    """200 watchers of one busy topic: a share of a core."""
    with stage() as place:
        place.start_host(**_SETTINGS)
        Nulls(place, _NODES_WATCHED, **_MACHINE)
        return [
            _watched(rounds, place, "tasks", f"{_TASKS_A_SECOND} tasks come and end each second"),
            _watched(rounds, place, "readings", f"{_NODES_WATCHED} nodes beat at 1 Hz"),
        ]


def _watched(rounds: int, place: Stage, topic: str, busy: str) -> Row:
    """Interleaved with the same work that nobody watches."""
    told: list[float] = []

    def seen() -> float:
        crowd = Watchers(place, _WATCHERS, topic)
        share = asyncio.run(_share(place, busy=topic == "tasks"))
        told.append(crowd.stop()["updates"] / _WATCHERS)
        return share

    ours, unseen = interleave(
        rounds, seen, lambda: asyncio.run(_share(place, busy=topic == "tasks"))
    )
    note = f"{busy}; {told[-1]:.0f} updates to each watcher in {_WATCHED_S:g} s"
    what = f"host CPU, {_WATCHERS} watchers of {topic}"
    return Row(f"watchers.{topic}", what, "%", ours, "nobody watching", unseen, "<= 30 %", note)


def _share_of_beats(place: Stage) -> float:
    before, began = place.cpu_s("host"), time.perf_counter()
    time.sleep(_WATCHED_S)
    return (place.cpu_s("host") - before) / (time.perf_counter() - began) * 100


async def _share(place: Stage, *, busy: bool) -> float:
    async with place.connect() as there:
        before, began = place.cpu_s("host"), time.perf_counter()
        for number in range(int(_WATCHED_S * _TASKS_A_SECOND) if busy else 0):
            await _until(began + number / _TASKS_A_SECOND)
            await there.submit(_SPEC)
        await _until(began + _WATCHED_S)
        return (place.cpu_s("host") - before) / (time.perf_counter() - began) * 100


async def _call_for(place: Stage, seconds: float) -> dict[str, list[float]]:
    """Make calls at fixed moments, whatever those before took; give the ms of each by method."""
    # A connection takes 256 calls at once. Those that wait for their turn here are late too.
    turn = asyncio.Semaphore(_AT_ONCE)
    async with place.connect() as there, asyncio.TaskGroup() as calls:
        began = time.perf_counter()
        jobs = []
        for number in range(int(seconds * _CALLS_A_SECOND)):
            due = began + number / _CALLS_A_SECOND
            await _until(due)
            jobs.append(calls.create_task(_call(there, turn, number, due)))
    took: dict[str, list[float]] = {}
    for job in jobs:
        name, ms = job.result()
        took.setdefault(name, []).append(ms)
    return took


async def _call(
    there: Cluster, turn: asyncio.Semaphore, number: int, due: float
) -> tuple[str, float]:
    async with turn:
        match number % 3:
            case 0:
                name = "cluster.status"
                await there.status()
            case 1:
                name = "task.list"
                await there.call(TASK_LIST, ListTasks())
            case _:
                name = "task.submit"
                await there.submit(_SPEC)
    return name, (time.perf_counter() - due) * 1e3


async def _until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))
