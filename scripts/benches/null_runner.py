"""Runners whose tasks end the moment they are ordered: a load for the host, over the real wire.

One process is as many nodes as wanted. Each joins with a join token, gets a credential of its
own, registers, takes orders in groups with credit, reports in groups and forgets a report only
once the host has committed it, sends heartbeats, and dials again when the host was away: the
daemon's own ``Uplink`` and ``Outbox`` do that. What is missing is what a runner does between
order and report: no vault, no process. A task whose command is ``hold`` runs until it is
killed.

On stdout: a line of JSON once all nodes are registered, and one with counts at SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import signal
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Final, NoReturn, cast

from readings import inventory, readings

from kohaku_daemon.runner.config import RunnerConfig
from kohaku_daemon.runner.memory import Identity, Memory
from kohaku_daemon.runner.outbox import Outbox, pages
from kohaku_daemon.runner.uplink import Uplink
from kohaku_daemon.supervise import spawn, until_one_fails
from protocol.connection import Connection, ItemStream
from protocol.errors import KohakuError, Unavailable
from protocol.ids import TaskId, parse_node_name
from protocol.messages.runner import (
    AttemptReport,
    AttemptState,
    Order,
    OrderKill,
    Orders,
    OrdersEnded,
    OrderStart,
    Register,
    Registered,
    Report,
    TakeOrders,
)
from protocol.methods import RUNNER_HEARTBEAT, RUNNER_ORDERS, RUNNER_REGISTER, RUNNER_REPORT
from protocol.models.task import Cause, Exit

#: As the daemon's link has them.
_WINDOW: Final = 8
_COMMIT_S: Final = 60.0
HOLD: Final = "hold"

Key = tuple[int, int]


class _Everything(Outbox):
    """An outbox that replaces nothing: the host is told every state of every launch."""

    def __init__(self) -> None:
        self._all: deque[AttemptReport] = deque()
        self._more = asyncio.Event()

    def put(self, report: AttemptReport) -> None:
        self._all.append(report)
        self._more.set()

    def clear(self) -> None:
        self._all.clear()
        self._more.clear()

    async def take(self) -> tuple[AttemptReport, ...]:
        await self._more.wait()
        group = next(pages(self._all))
        for _ in group:
            self._all.popleft()
        if not self._all:
            self._more.clear()
        return group


class NullNode:
    """One node: what its runner says on a link."""

    def __init__(self, name: str, args: argparse.Namespace, counts: Counter[str]) -> None:
        self.name = name
        self.registered = asyncio.Event()
        self._args = args
        self._counts = counts
        self._instance = f"null-{random.getrandbits(64):016x}"
        self._outbox = _Everything() if args.every_state else Outbox()
        #: Launches the host may not know the end of, as they were last reported.
        self._open: dict[Key, AttemptReport] = {}
        #: Launches that were ordered, so that none is launched twice.
        self._seen: set[Key] = set()
        #: Those that run until they are killed.
        self._held: set[Key] = set()

    async def register(self, connection: Connection) -> Registered:
        """Say what this node has and every launch it knows."""
        self._outbox.clear()
        attempts = tuple(self._open.values())
        groups = list(pages(attempts)) or [()]
        for group in groups[:-1]:
            await self._register(connection, group, more=True)
        registered = await self._register(connection, groups[-1], more=False)
        self._settle(attempts)
        self.registered.set()
        return registered

    async def serve(self, connection: Connection, registered: Registered) -> KohakuError:
        """Take orders and report until the link ends; give why it did."""
        async with connection.stream(RUNNER_ORDERS, TakeOrders(), window=_WINDOW) as orders:
            return await until_one_fails(
                self._take_orders(orders),
                self._report(connection),
                self._beat(connection, registered.heartbeat_s),
                _wait_closed(connection),
                name="null link",
            )

    async def _register(
        self, connection: Connection, attempts: tuple[AttemptReport, ...], *, more: bool
    ) -> Registered:
        params = Register(
            instance=self._instance,
            inventory=inventory(self.name, max_tasks=self._args.max_tasks, gpus=self._args.gpus),
            attempts=attempts,
            more=more,
            node=self.name,
        )
        return await connection.call(RUNNER_REGISTER, params, timeout_s=_COMMIT_S)

    async def _take_orders(self, orders: ItemStream[Orders, OrdersEnded]) -> NoReturn:
        async for group in orders:
            starts = [key for order in group.orders if (key := self._take(order)) is not None]
            # A pass of the loop for each state, as if a disk and a process had been between
            # them: what the link has not taken by then is replaced by the newer state, as a
            # daemon's outbox does it.
            self._say(starts, AttemptState.ACCEPTED)
            await asyncio.sleep(0)
            self._say(starts, AttemptState.RUNNING)
            await asyncio.sleep(0)
            ends = [key for key in starts if key not in self._held]
            self._say(ends, AttemptState.ENDED, Exit(Cause.EXITED, code=0))
        raise Unavailable("the host let go of the link")

    def _take(self, order: Order) -> Key | None:
        """Take one order; give what is to be launched."""
        if isinstance(order, OrderStart):
            key = (int(order.task), order.attempt)
            if key in self._seen:
                # At most once: an order that is repeated is answered with what became of it.
                self._counts["repeated"] += 1
                if (known := self._open.get(key)) is not None:
                    self._outbox.put(known)
                return None
            self._seen.add(key)
            self._counts["launches"] += 1
            if order.spec.command[0] == HOLD:
                self._held.add(key)
            return key
        if isinstance(order, OrderKill):
            key = (int(order.task), order.attempt)
            self._held.discard(key)
            self._say([key], AttemptState.ENDED, Exit(Cause.KILLED))
        return None

    def _say(self, keys: list[Key], state: AttemptState, exit_: Exit | None = None) -> None:
        now = time.time()
        started_at = 0.0 if state is AttemptState.ACCEPTED else now
        for task, attempt in keys:
            report = AttemptReport(
                task=TaskId(task),
                attempt=attempt,
                state=state,
                at=now,
                started_at=started_at,
                exit=exit_,
            )
            self._open[task, attempt] = report
            self._outbox.put(report)

    async def _report(self, connection: Connection) -> NoReturn:
        while True:
            group = await self._outbox.take()
            self._counts["calls"] += 1
            self._counts["reports"] += len(group)
            await connection.call(RUNNER_REPORT, Report(group), timeout_s=_COMMIT_S)
            self._settle(group)

    def _settle(self, reports: tuple[AttemptReport, ...]) -> None:
        """Forget launches whose end the host has committed."""
        for report in reports:
            if report.state is AttemptState.ENDED:
                self._open.pop((int(report.task), report.attempt), None)

    async def _beat(self, connection: Connection, period_s: float) -> NoReturn:
        clock = asyncio.get_running_loop()
        due = clock.time() + random.random() * period_s  # as machines that started one by one
        while True:
            await asyncio.sleep(due - clock.time())
            said = readings(gpus=self._args.gpus, tasks=self._args.tasks_shown)
            await connection.call(RUNNER_HEARTBEAT, said, timeout_s=_COMMIT_S)
            self._counts["beats"] += 1
            due = max(due + period_s, clock.time())


async def _wait_closed(connection: Connection) -> NoReturn:
    await asyncio.wait({connection.closed})
    raise Unavailable(f"the link ended: {connection.closed.result()}")


class _Remembered:
    """What of the daemon's ``Memory`` an ``Uplink`` uses, without a disk."""

    def __init__(self) -> None:
        self._identity: Identity | None = None

    def identity(self) -> Identity | None:
        return self._identity

    async def keep_identity(self, identity: Identity) -> None:
        self._identity = identity


async def run(args: argparse.Namespace, token: str) -> None:
    """Run all nodes until SIGTERM."""
    counts: Counter[str] = Counter()
    nodes = [NullNode(f"{args.prefix}{number}", args, counts) for number in range(args.nodes)]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    links = [
        spawn(_uplink(node, args.host, token).run(), name=f"uplink {node.name}") for node in nodes
    ]
    for node in nodes:
        await node.registered.wait()
    _print({"ready": len(nodes)})
    await stop.wait()
    for link in links:
        link.cancel()
    await asyncio.gather(*links, return_exceptions=True)
    _print(dict(counts))


def _uplink(node: NullNode, host: str, token: str) -> Uplink:
    config = RunnerConfig(
        name=parse_node_name(node.name),
        data=Path("/nonexistent"),  # an Uplink writes through its memory only
        host=host,
        join_token=token,
    )
    return Uplink(config, cast("Memory", _Remembered()), node)


def _print(facts: dict[str, int]) -> None:
    print(json.dumps(facts), flush=True)


def main() -> int:
    """Read the command line and a join token from stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True, help="URL of the host")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--prefix", default="null", help="of the nodes' names")
    parser.add_argument("--max-tasks", type=int, default=1024, help="at once on each node")
    parser.add_argument("--gpus", type=int, default=0, help="of each node")
    parser.add_argument("--every-state", action="store_true", help="replace no report by a newer")
    parser.add_argument("--tasks-shown", type=int, default=0, help="tasks in each heartbeat")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(run(args, sys.stdin.readline().strip()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
