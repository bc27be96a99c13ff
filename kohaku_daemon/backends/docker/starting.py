"""Starts a container so that it is always known whether its program may have run.

Knows: the order of things, and what each failure leaves behind.
Does not know: what is started (``container``), what becomes of it later.

The container is made; then a mark is on the disk for certain; then the container is started; then
``init`` says that the program runs, or why it does not. Whoever finds a container that was made and
not started removes it, and the engine lets only one of removal and start succeed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.docker.engine import Containers
from kohaku_daemon.backends.docker.init import Stage
from kohaku_daemon.backends.docker.kept import KeptContainer
from kohaku_daemon.backends.docker.verdict import explain_start
from kohaku_daemon.core.workload import Started

#: Between two looks at what ``init`` has said: it says so within a millisecond of its start.
_SOON_S: Final = 0.001
_LATER_S: Final = 0.05
#: Looks until the engine is asked whether it is still there.
_LOOKS: Final = 50
#: Seconds that a program may take to be executed, as from a disk that has gone to sleep. Then it
#: counts as running, which is all that is known.
_LONGEST_S: Final = 60.0


async def start_container(
    containers: Containers,
    kept: KeptContainer,
    body: Mapping[str, Any],
    note: str,
    on_made: Callable[[KeptContainer, str], None],
) -> Started:
    """Make and start the container of a launch whose record is made.

    ``on_made`` gets the container's id as soon as there is one.

    Raises:
        BackendFailed: It did not start; nothing is left of it but the record that says so.
        BackendAway: It may have started.
    """
    try:
        on_made(kept, await containers.create(f"kohaku-{kept.plan}", body))
        await asyncio.to_thread(kept.record.mark_begun)
        await containers.start(kept.id)
    except (BackendFailed, OSError) as error:
        if not await _may_run(containers, kept):
            why = error.message if isinstance(error, BackendFailed) else _explain_disk(error)
            await give_up(containers, kept, why)
            raise BackendFailed(why) from error
    return await _wait_begun(containers, kept, note)


async def _may_run(containers: Containers, kept: KeptContainer) -> bool:
    """Say whether a program runs, or ran, although its start was refused.

    An engine that starts it and then fails at something else, or that gave up waiting, refuses
    too; the program would go on unseen while its task counts as failed.
    """
    if not kept.id:
        return False
    if (status := kept.record.read_status()) is not None and status.errno is None:
        return True
    facts = await containers.inspect(kept.id)
    return facts is not None and facts.is_alive


async def give_up(containers: Containers, kept: KeptContainer, why: str) -> None:
    """Decide that a launch never starts, and remove what there is of it.

    Raises:
        BackendFailed: The disk does not take the decision.
        BackendAway: The engine does not answer, and may still have it.
    """
    try:
        await asyncio.to_thread(kept.record.fail, why)
    except OSError as error:
        raise BackendFailed(_explain_disk(error)) from error
    if kept.id:
        # What cannot be removed now is when somebody tidies up; it runs nothing.
        with contextlib.suppress(BackendFailed):
            await containers.remove(kept.id)


async def _wait_begun(containers: Containers, kept: KeptContainer, note: str) -> Started:
    clock = asyncio.get_running_loop().time
    deadline, looks = clock() + _LONGEST_S, 0
    while True:
        status = kept.record.read_status()
        if status is not None and status.errno is not None:
            why = explain_start(status, kept.command, kept.where)
            await give_up(containers, kept, why)
            raise BackendFailed(why)
        if status is not None:
            assert status.stage in {Stage.BEGUN, Stage.ENDED}
            kept.started_at = (status.began_at_ns or status.ended_at_ns or 0) / 1e9
            break
        looks += 1
        if looks % _LOOKS == 0 or kept.has_died or clock() > deadline:
            facts = await containers.inspect(kept.id)
            is_alive = facts is not None and facts.is_alive
            if not is_alive or clock() > deadline:
                # Without a word of init's: it ran, or was just about to. If it has ended, its
                # end is told like any other.
                kept.started_at = facts.started_at if facts is not None else 0.0
                kept.has_died = not is_alive
                break
        await asyncio.sleep(_SOON_S if looks < _LOOKS else _LATER_S)
    return Started(started_at=kept.started_at, note=note)


def _explain_disk(error: OSError) -> str:
    return f"cannot keep what it starts on this node: {(error.strerror or str(error)).lower()}"
