"""Deleting what has been kept for long enough.

Knows: how long tasks, the diary and the audit log are kept, and that it takes its time.
Does not know: what is deleted with what (``store.tasks``).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, NoReturn

from kohaku_daemon.clock import Clock
from kohaku_daemon.host.config import HostConfig
from kohaku_daemon.store.tasks import TaskStore
from protocol.errors import Unavailable

_log = logging.getLogger(__name__)

#: Seconds between two looks; the shortest time that anything can be kept is as long.
_EVERY_S: Final = 60.0
#: Rows of each kind in one go: with FULL some 10 ms, for which a commit may have to wait.
_CHUNK: Final = 500
#: Seconds between two goes, in which commits have the store for themselves.
_PAUSE_S: Final = 0.1


async def keep_house(store: TaskStore, config: HostConfig, clock: Clock) -> NoReturn:
    """Delete what is too old, until cancelled."""
    while True:
        try:
            gone = await _clear(store, config, clock.now())
        except Unavailable as error:
            _log.warning("old tasks and events cannot be deleted: %s", error)
        else:
            if gone:
                _log.info("deleted %d old tasks, events and lines of the audit log", gone)
        await asyncio.sleep(_EVERY_S)


async def _clear(store: TaskStore, config: HostConfig, now: float) -> int:
    gone = 0
    while found := await asyncio.to_thread(
        store.prune,
        tasks_before=now - config.task_keep_s,
        events_before=now - config.event_keep_s,
        audits_before=now - config.audit_keep_s,
        limit=_CHUNK,
    ):
        gone += found
        await asyncio.sleep(_PAUSE_S)
    return gone
