"""Watch a cluster: a line for every task that changes and every line of the diary.

    python scripts/examples/watcher.py [--until-idle]

Nothing is polled. If the connection breaks, the watch goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from protocol.client import connect
from protocol.errors import KohakuError
from protocol.ids import TaskId
from protocol.messages.cluster import Topic, Update


async def main() -> None:
    """Print changes until interrupted, or until nothing is left to do."""
    arguments = parse_arguments()
    live: set[TaskId] = set()
    async with connect() as cluster:
        async for update in cluster.watch([Topic.TASKS, Topic.NODES, Topic.EVENTS]):
            if update.start:
                live.clear()
            print_update(update)
            for task in update.tasks:
                (live.discard if task.state.is_over else live.add)(task.id)
            if arguments.until_idle and update.ready and not live:
                return


def print_update(update: Update) -> None:
    """Print one line for each thing in an update."""
    now = time.strftime("%H:%M:%S")
    for node in update.nodes:
        held = node.claimed
        cores = len(node.inventory.cores)
        print(f"{now} node {node.name}: {node.state}, {held.cores} of {cores} cores held")
    for name in update.gone_nodes:
        print(f"{now} node {name}: gone")
    for task in update.tasks:
        print(f"{now} task {task.id}: {task.state} {task.node} {task.reason}".rstrip())
    for event in update.events:
        print(f"{now} {event.kind}: {event.text}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until-idle", action="store_true", help="end when no task is left")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)  # a fine way to end
    except KohakuError as error:
        sys.exit(f"error: {error.message}\n{error.hint}".rstrip())
