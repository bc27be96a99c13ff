"""A parameter sweep: one batch, a task for each combination, a table of what came out.

    python scripts/examples/sweep.py [--rates 0.1 0.01 0.001] [--seeds 1 2]

Every task sees its parameters as variables. Here it only prints a number made of them; put
your training program in its place.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys

from protocol.client import Cluster, connect
from protocol.errors import KohakuError
from protocol.messages.stream import LogChunk, Source
from protocol.models.task import Task, TaskState

PROGRAM = 'echo "training with rate $RATE, seed $SEED" >&2; awk "BEGIN {print $RATE * $SEED}"'


async def main() -> None:
    """Submit, wait, collect."""
    arguments = parse_arguments()
    rows = [
        {"RATE": str(rate), "SEED": str(seed)}
        for rate, seed in itertools.product(arguments.rates, arguments.seeds)
    ]
    async with connect() as cluster:
        submitted = await cluster.submit(["sh", "-c", PROGRAM], name="sweep", rows=rows)
        print(f"batch {submitted.batch}: {len(rows)} tasks")
        tasks = await cluster.wait(submitted, timeout_s=300)
        print(f"{'RATE':>8} {'SEED':>6} {'STATE':<12} {'NODE':<12} RESULT")
        for task in sorted(tasks, key=lambda task: task.index):
            row = rows[task.index]
            result = await read_stdout(cluster, task) if task.attempt else task.reason
            print(f"{row['RATE']:>8} {row['SEED']:>6} {task.state:<12} {task.node:<12} {result}")
    if any(task.state is not TaskState.COMPLETED for task in tasks):
        raise SystemExit(1)


async def read_stdout(cluster: Cluster, task: Task) -> str:
    """Give a task's standard output as text."""
    chunks = [
        item.data
        async for item in cluster.logs(task.id, sources=[Source.STDOUT])
        if isinstance(item, LogChunk)
    ]
    return b"".join(chunks).decode(errors="replace").strip()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.01, 0.001])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KohakuError as error:
        sys.exit(f"error: {error.message}\n{error.hint}".rstrip())
