"""Reading nodes and the cluster: nothing is told that a crash could still undo."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from protocol.messages.cluster import GetStatus, Topic, Watch
from protocol.messages.node import ListNodes, OneNode
from protocol.methods import NODE_DRAIN, NODE_LIST, NODE_SHOW, STATUS, WATCH
from protocol.models.node import Node
from tests.support.host import RunningHost, linked_runner


async def test_reads_of_nodes_wait_for_the_commit_they_would_be_ahead_of(
    host: RunningHost, hold_writes: Callable[[], threading.Event]
) -> None:
    async def watched() -> Node:
        async with other.stream(WATCH, Watch(topics=(Topic.NODES,))) as updates:
            async for update in updates:
                if update.nodes:
                    return update.nodes[0]
        raise AssertionError("the watch ended")

    async with linked_runner(host), await host.connect() as admin, await host.connect() as other:
        release = hold_writes()
        draining = asyncio.create_task(admin.call(NODE_DRAIN, OneNode("n1")))
        await asyncio.sleep(0.05)  # the engine knows of it, and the disk does not
        listing = asyncio.create_task(other.call(NODE_LIST, ListNodes()))
        showing = asyncio.create_task(other.call(NODE_SHOW, OneNode("n1")))
        counting = asyncio.create_task(other.call(STATUS, GetStatus()))
        watching = asyncio.create_task(watched())
        await asyncio.sleep(0.1)
        asked = (draining, listing, showing, counting, watching)
        assert [job.done() for job in asked] == [False] * 5
        release.set()
        await draining
        assert (await listing).nodes[0].draining
        assert (await showing).node.draining
        assert (await counting).draining == 1
        assert (await watching).draining
