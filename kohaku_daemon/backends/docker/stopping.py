"""Ends containers: asks them to end, and sees to it if they do not.

Knows: grace, that who asks again may be in more of a hurry. Does not know: how an end is heard of.
"""

from __future__ import annotations

import asyncio
from typing import Final

from kohaku_daemon.backends.base import BackendAway
from kohaku_daemon.backends.docker.engine import Containers
from kohaku_daemon.backends.docker.kept import KeptContainer
from kohaku_daemon.supervise import spawn

#: Seconds that a caller waits for a SIGKILL to be sent. The engine answers when it has worked,
#: which takes long where a process waits for a disk that does not answer.
_TELL_S: Final = 0.3
#: Seconds between tries to kill while the engine is away.
_AGAIN_S: Final = 0.5


async def stop_container(containers: Containers, kept: KeptContainer, grace_s: float) -> None:
    """Send SIGTERM to all of it, and SIGKILL after the grace. Returns at once.

    Raises:
        BackendAway: The engine may not have been told.
    """
    kill_at = asyncio.get_running_loop().time() + grace_s
    if kept.exit is not None or (kept.kill_at is not None and kill_at >= kept.kill_at):
        return
    is_first, kept.kill_at = kept.kill_at is None, kill_at
    if kept.killer is not None:
        kept.killer.cancel()
        kept.killer = None
    try:
        if grace_s > 0 and is_first:
            await containers.signal(kept.id, "SIGTERM")
        killer = spawn(_kill_at(containers, kept, kill_at), name=f"kill {kept.plan}")
        kept.killer = killer
        if grace_s <= 0:
            await asyncio.wait({killer}, timeout=_TELL_S)
    except BaseException:  # whoever is cancelled here has asked for nothing either
        if kept.kill_at == kill_at:
            kept.kill_at = None  # whoever asks again is the first
        raise


async def _kill_at(containers: Containers, kept: KeptContainer, kill_at: float) -> None:
    await asyncio.sleep(kill_at - asyncio.get_running_loop().time())
    while kept.exit is None:
        try:
            await containers.signal(kept.id, "SIGKILL")
        except BackendAway:
            await asyncio.sleep(_AGAIN_S)
        else:
            return
