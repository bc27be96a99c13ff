"""``scripts/bench faults``: kill -9 of the daemons while tasks run, then every promise counted.

Knows: when who is killed, all of it drawn from one seed; how submissions go on meanwhile; what
is asked of the cluster once all is quiet. Does not know: how a daemon is started again
(``fault_daemons``), what a task must have done (``fault_work``).

    scripts/bench faults [--seed N] [--kills 200] [--tasks 500] [--runners 3] [--json]

Exit status 1 if any promise was broken. The seed repeats who is killed, in which order and
after which pauses; where exactly a kill meets a program is up to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from fault_daemons import Victims, victims
from fault_work import CRASH, KINDS, LOST, SCRIPT, TWICE, Seen, Violation, Work, judge, make_work

from protocol.client import Cluster
from protocol.errors import NotFound, TimedOut, Unavailable
from protocol.messages.stream import LogChunk, Source
from protocol.messages.task import Submitted
from protocol.models.node import NodeState
from protocol.models.task import Task

#: Seconds between two strikes, on average: about what a daemon takes to be at work again.
_GAP_S: Final = 2.0
#: Tasks at once on a node: so few that work lasts as long as the strikes do.
_AT_ONCE: Final = "6"
#: Seconds until a silent node's tasks count as lost: longer outages are among the strikes, so
#: that tasks are given up and come back.
_LOST_AFTER_S: Final = "0.7"
_HEARTBEAT_S: Final = "0.2"
#: Tasks of one submission at most.
_MOST_AT_ONCE: Final = 8
#: Seconds that a cluster which is left in peace may take to come to rest.
_REST_S: Final = 180.0
#: Seconds between looks for daemons that ended unasked.
_PATROL_S: Final = 1.0
_READS_AT_ONCE: Final = 8
_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    seed: int
    kills: int
    tasks: int
    runners: int


@dataclass(frozen=True, slots=True)
class Strike:
    """Daemons killed at one moment."""

    #: Seconds after the strike before.
    gap_s: float
    #: Who, and for how many seconds each stays down.
    down_s: dict[str, float]


@dataclass(slots=True)
class Order:
    """One submission, made until it is answered."""

    request_id: str
    works: list[Work]
    #: Asked twice at the same moment, by two clients.
    doubled: bool
    #: Seconds after which the client goes away without an answer; None to stay.
    abandoned_s: float | None
    #: Every answer to it, from however many clients.
    answers: list[Submitted] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    plan: Plan
    kills: dict[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    seconds: float = 0.0

    def broken(self) -> dict[str, int]:
        """Count the violations by kind, every kind named."""
        found = Counter(violation.kind for violation in self.violations)
        return {kind: found[kind] for kind in KINDS}


# What happens, drawn from the seed ------------------------------------------------------


def draw_strikes(plan: Plan, draw: random.Random) -> list[Strike]:
    """Draw when who is killed, until there are ``plan.kills`` kills."""
    names = ["host", *(f"node{number}" for number in range(1, plan.runners + 1))]
    strikes, left = [], plan.kills
    while left:
        # Sometimes hardly anything is up again.
        gap_s = draw.uniform(0, 0.3) if draw.random() < 0.3 else draw.expovariate(1 / _GAP_S)
        most = draw.choices((1, 2, len(names)), (70, 20, 10))[0]
        # The host twice as often as any one node.
        struck = draw.sample(names, min(most, left), counts=(2, *[1] * plan.runners))
        strikes.append(Strike(min(gap_s, 3 * _GAP_S), {name: _draw_down(draw) for name in struck}))
        left -= len(set(struck))
    return strikes


def _draw_down(draw: random.Random) -> float:
    chance = draw.random()
    if chance < 0.5:
        return 0.0
    return draw.uniform(0, 0.5) if chance < 0.92 else draw.uniform(2, 6)


def draw_orders(works: Sequence[Work], draw: random.Random) -> list[Order]:
    """Divide the tasks into submissions."""
    orders: list[Order] = []
    at = 0
    while at < len(works):
        count = draw.randint(1, _MOST_AT_ONCE)
        orders.append(
            Order(
                request_id=f"faults-{len(orders)}-{draw.getrandbits(32):08x}",
                works=list(works[at : at + count]),
                doubled=draw.random() < 0.3,
                abandoned_s=draw.expovariate(20) if draw.random() < 0.2 else None,
            )
        )
        at += count
    return orders


# The run ---------------------------------------------------------------------------------


def run(plan: Plan) -> Outcome:
    """Do all of it, and judge."""
    outcome = Outcome(plan)
    began = time.perf_counter()
    with _traces() as folder:
        draw = random.Random(plan.seed)
        works = make_work(plan.tasks, draw, folder)
        orders, strikes = draw_orders(works, draw), draw_strikes(plan, draw)
        settings = {
            "KOHAKU_HOSTD_HEARTBEAT": _HEARTBEAT_S,
            "KOHAKU_HOSTD_LOST_AFTER": _LOST_AFTER_S,
            "KOHAKU_RUNNER_MAX_TASKS": _AT_ONCE,
            "KOHAKU_RUNNER_RECONNECT_MAX": "1",
            "KOHAKU_RUNNER_PROCESS_WRITABLE": str(folder),
        }
        with victims(plan.runners, **settings) as cluster:
            asyncio.run(_strike_and_judge(outcome, cluster, orders, strikes))
    outcome.seconds = time.perf_counter() - began
    return outcome


@contextmanager
def _traces() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kohaku-faults-traces-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _strike_and_judge(
    outcome: Outcome, cluster: Victims, orders: list[Order], strikes: list[Strike]
) -> None:
    async with asyncio.TaskGroup() as jobs:
        patrol = jobs.create_task(_restart_crashed(cluster))
        await _strike(outcome, cluster, orders, strikes)
        _tell("quiet; waiting for everything to end")
        await _rest(cluster, outcome)
        patrol.cancel()
    outcome.kills = {name: daemon.kills for name, daemon in cluster.daemons.items()}
    for daemon in cluster.daemons.values():
        outcome.violations += [Violation(CRASH, text) for text in daemon.crashes]
    for order in orders:
        await _submit_again(cluster, order, outcome)
    await _judge_all(cluster, [order for order in orders if order.answers], outcome)


async def _strike(
    outcome: Outcome, cluster: Victims, orders: list[Order], strikes: list[Strike]
) -> None:
    """Kill and submit; on return every daemon was started again, every submission answered."""
    async with asyncio.TaskGroup() as jobs:
        submitted = 0
        for at, strike in enumerate(strikes):
            due = (at + 1) * len(orders) // len(strikes)
            for order in orders[submitted:due]:
                jobs.create_task(_submit(cluster, order, outcome))
            submitted = due
            await asyncio.sleep(strike.gap_s)
            running = sum(work.is_running() for order in orders[:due] for work in order.works)
            outcome.counts["met while running"] += running
            for name, down_s in strike.down_s.items():
                jobs.create_task(cluster.daemons[name].kill(down_s))
            _tell(f"strike {at + 1} of {len(strikes)}: {', '.join(strike.down_s)}")


async def _restart_crashed(cluster: Victims) -> NoReturn:
    """Start again who ended unasked: that is one violation, and not the end of the run."""
    while True:
        await asyncio.sleep(_PATROL_S)
        for daemon in cluster.daemons.values():
            daemon.check()


async def _submit(cluster: Victims, order: Order, outcome: Outcome) -> None:
    if order.abandoned_s is not None:
        # It may or may not be answered, and may or may not have been done.
        with suppress(TimeoutError):
            async with asyncio.timeout(order.abandoned_s):
                await _ask(cluster, order, outcome)
        outcome.counts["abandoned"] += not order.answers
        return
    asked = 2 if order.doubled else 1
    await asyncio.gather(*(_ask(cluster, order, outcome) for _ in range(asked)))


async def _ask(cluster: Victims, order: Order, outcome: Outcome) -> None:
    """Submit until there is an answer, over as many crashes as it takes, with an end."""
    clock = asyncio.get_running_loop()
    deadline = clock.time() + _REST_S
    while True:
        outcome.counts["tries"] += 1
        try:
            async with cluster.connect(patience_s=10.0) as there:
                order.answers.append(await _submit_over(there, order))
                return
        except (Unavailable, TimedOut) as error:
            if clock.time() > deadline:
                text = f"request {order.request_id} is not answered: {error}"
                outcome.violations.append(Violation(LOST, text))
                return
            await asyncio.sleep(0.1)


async def _submit_over(there: Cluster, order: Order) -> Submitted:
    return await there.submit(
        ["sh", "-c", SCRIPT],
        cores=0,
        rows=[work.row() for work in order.works],
        request_id=order.request_id,
    )


async def _submit_again(cluster: Victims, order: Order, outcome: Outcome) -> None:
    """Ask once more in peace: what was answered must be answered alike."""
    was_answered = bool(order.answers)
    await _ask(cluster, order, outcome)
    batches = {answer.batch for answer in order.answers}
    if len(batches) > 1:
        text = f"request {order.request_id} is the batches {sorted(batches)}"
        outcome.violations.append(Violation(TWICE, text))
    if was_answered and not order.answers[-1].repeated:
        text = f"request {order.request_id} was answered and then forgotten"
        outcome.violations.append(Violation(LOST, text))


async def _rest(cluster: Victims, outcome: Outcome) -> None:
    """Wait until every node is there and every task is over."""
    deadline = asyncio.get_running_loop().time() + _REST_S
    while asyncio.get_running_loop().time() < deadline:
        with suppress(Unavailable, TimedOut):
            async with cluster.connect(patience_s=5.0) as there:
                status = await there.status()
                live = [task async for task in there.tasks() if not task.state.is_final]
                if not live and status.nodes == {NodeState.ONLINE: outcome.plan.runners}:
                    return
        await asyncio.sleep(0.1)
    _tell("the cluster did not come to rest")


# Judging ---------------------------------------------------------------------------------


async def _judge_all(cluster: Victims, orders: list[Order], outcome: Outcome) -> None:
    places = {
        task: work
        for order in orders
        for task, work in zip(order.answers[-1].ids(), order.works, strict=True)
    }
    # What was submitted again only now may still run.
    async with cluster.connect(patience_s=30.0) as there:
        with suppress(TimedOut):
            await there.wait(list(places), timeout_s=60)
        extra = {task.id async for task in there.tasks()} - set(places)
        text = "no answer named task {}: somebody's request was done twice"
        outcome.violations += [Violation(TWICE, text.format(task)) for task in sorted(extra)]
        turns = asyncio.Semaphore(_READS_AT_ONCE)

        async def judge_one(task: int, work: Work) -> None:
            async with turns:
                seen = await _look(there, task, work)
            outcome.violations += judge(work, seen)
            _count(outcome, seen)

        await asyncio.gather(*(judge_one(task, work) for task, work in places.items()))
    outcome.counts["submissions"] = len(orders)
    outcome.counts["answers"] = sum(len(order.answers) for order in orders)
    outcome.counts["tasks"] = len(places)


def _count(outcome: Outcome, seen: Seen) -> None:
    outcome.counts["launches"] += sum(line.startswith("start ") for line in seen.trace)
    if seen.task is None:
        return
    states = [change.state for change in seen.task.history]
    outcome.counts["ends"] += sum(state.is_final for state in states)
    outcome.counts["lost and back"] += "lost" in states and seen.task.state.is_final


async def _look(there: Cluster, task: int, work: Work) -> Seen:
    shown: Task | None = None
    output: dict[Source, bytes] = dict.fromkeys(Source, b"")
    with suppress(NotFound):
        shown = await there.task(task)
        async for item in there.logs(task):
            if isinstance(item, LogChunk):
                output[item.source] += item.data
    trace = work.trace.read_text().splitlines()
    return Seen(shown, trace, output[Source.STDOUT], output[Source.STDERR])


# Words -----------------------------------------------------------------------------------


def render(outcome: Outcome) -> str:
    """Write what happened, then what was broken."""
    plan = outcome.plan
    kills = ", ".join(f"{name} {count}" for name, count in outcome.kills.items())
    counts = outcome.counts
    lines = [
        f"seed         {plan.seed} (repeat with --seed {plan.seed})",
        f"kills        {sum(outcome.kills.values())}: {kills}",
        f"submissions  {counts['submissions']}, answered {counts['answers']} times over "
        f"{counts['tries']} tries, {counts['abandoned']} abandoned first",
        f"tasks        {counts['tasks']}, met by a strike while they ran "
        f"{counts['met while running']} times",
        f"launches     {counts['launches']}",
        f"ends         {counts['ends']}, of them {counts['lost and back']} after being lost",
        *(f"{kind:<18} {count}" for kind, count in outcome.broken().items()),
        f"{outcome.seconds:.0f} s in all",
    ]
    lines += [f"  {violation.text}" for violation in outcome.violations[:_SHOWN]]
    if len(outcome.violations) > _SHOWN:
        lines.append(f"  and {len(outcome.violations) - _SHOWN} more")
    return "\n".join(lines)


def document(outcome: Outcome) -> dict[str, object]:
    """Give the same for programs."""
    plan = outcome.plan
    return {
        "seed": plan.seed,
        "runners": plan.runners,
        "kills": outcome.kills,
        **{key: outcome.counts[key] for key in sorted(outcome.counts)},
        **outcome.broken(),
        "seconds": outcome.seconds,
        "violations": [violation.text for violation in outcome.violations],
    }


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench faults",
        description="kill -9 of the daemons while tasks run; every promise is counted",
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of all chance")
    parser.add_argument("--kills", type=int, default=200, help="in all (%(default)s)")
    parser.add_argument("--tasks", type=int, default=500, help="in all (%(default)s)")
    parser.add_argument("--runners", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="one document instead of text")
    given = parser.parse_args(arguments)
    plan = Plan(given.seed, given.kills, given.tasks, given.runners)
    _tell(f"seed {plan.seed}: {plan.kills} kills, {plan.tasks} tasks, {plan.runners} runners")
    outcome = run(plan)
    print(json.dumps(document(outcome), indent=2) if given.json else render(outcome))
    return 1 if outcome.violations else 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
