"""Many watchers of one topic: a load for the host, over the real wire.

On stdout: a line of JSON once every watcher has its snapshot, and one with counts at SIGTERM.
The token comes on stdin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections import Counter

from protocol.connection import Connection
from protocol.errors import Unavailable
from protocol.messages.cluster import Topic, Watch
from protocol.methods import WATCH


async def run(args: argparse.Namespace, token: str) -> None:
    """Watch until SIGTERM."""
    counts: Counter[str] = Counter()
    ready: asyncio.Queue[None] = asyncio.Queue()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with asyncio.TaskGroup() as jobs:
        watchers = [
            jobs.create_task(_watch(args, token, counts, ready)) for _ in range(args.watchers)
        ]
        for _ in watchers:
            await ready.get()
        print(json.dumps({"ready": len(watchers)}), flush=True)
        await stop.wait()
        for watcher in watchers:
            watcher.cancel()
    print(json.dumps(dict(counts)), flush=True)


async def _watch(
    args: argparse.Namespace, token: str, counts: Counter[str], ready: asyncio.Queue[None]
) -> None:
    question = Watch(topics=(Topic(args.topic),))
    # The connection and not the client: a watcher that was cut off must not be made up for.
    connection = await Connection.dial(args.host, token=token, agent="bench", timeout_s=60.0)
    async with connection, connection.stream(WATCH, question) as updates:
        async for update in updates:
            counts["updates"] += 1
            counts["rows"] += len(update.tasks) + len(update.nodes) + len(update.events)
            if update.ready:
                ready.put_nowait(None)
    raise Unavailable("the host ended a watch")


def main() -> int:
    """Read the command line and the token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--watchers", type=int, default=200)
    parser.add_argument("--topic", default="tasks")
    args = parser.parse_args()
    asyncio.run(run(args, sys.stdin.readline().strip()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
