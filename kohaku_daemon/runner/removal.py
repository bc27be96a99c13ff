"""Removes what ended launches leave behind, their output excepted.

Knows: in which order, how much at once, that it is tried again: once a backend that was away
is back, and all else after the next start.
Does not know: when a launch is settled (``core.node``), how a backend removes anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Final

from kohaku_daemon.backends.base import Backend, BackendAway
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle
from kohaku_daemon.runner.logs import TaskLogs
from kohaku_daemon.runner.patience import Patience
from kohaku_daemon.runner.reasons import about, explain
from kohaku_daemon.runner.scratch import ScratchFolders
from protocol.errors import KohakuError

_log = logging.getLogger(__name__)

#: Seconds that ended launches gather before what is left of them is removed, by how many jobs
#: at most, and how many folders one of those clears in one go.
_GATHER_S: Final = 0.05
_JOBS: Final = 4
_AT_ONCE: Final = 256


class Removal:
    """What is left of launches, on its way out."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        *,
        node: str,
        scratch: ScratchFolders,
        logs: TaskLogs,
        patience: Patience,
        begin: Callable[[Coroutine[Any, Any, None], str], None],
    ) -> None:
        """``begin`` runs a job of a name in the background."""
        self._backends = backends
        self._node = node
        self._scratch = scratch
        self._logs = logs
        self._patience = patience
        self._begin = begin
        self._waiting: deque[tuple[str, Handle]] = deque()
        #: What is being removed, and what waits for its backend.
        self._under_way: dict[str, Handle] = {}
        self._put_off: dict[str, Handle] = {}
        #: Rounds in a row that met a backend that was away, by its name.
        self._rounds: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def put(self, key: str, handle: Handle) -> None:
        """Remove what is left of a launch, soon: what ends soon after is removed along with it."""
        self._waiting.append((key, handle))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_GATHER_S, self.begin)

    def pending(self) -> list[Handle]:
        """Give the handles of what is still to be removed."""
        waiting = [handle for _, handle in self._waiting]
        return [*waiting, *self._under_way.values(), *self._put_off.values()]

    def put_left(self, records: Iterable[LaunchRecord]) -> None:
        """Remove what an earlier run did not come to remove of launches that are settled."""
        left = set(self._scratch.list_keys())
        for record in records:
            if record.settled and record.handle is not None and record.key in left:
                self.put(record.key, record.handle)

    def begin(self) -> None:
        """Begin with what has gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for number in range(min(-(-len(self._waiting) // _AT_ONCE), _JOBS)):
            self._begin(self._remove_all(), f"remove {number}")

    async def _remove_all(self) -> None:
        while self._waiting:
            keys: list[str] = []
            while self._waiting and len(keys) < _AT_ONCE:
                key, handle = self._waiting.popleft()
                self._under_way[key] = handle
                try:
                    if await self._remove(key, handle):
                        keys.append(key)
                finally:
                    del self._under_way[key]
            # The scratch folder goes last: it is the mark that there is something to remove.
            await asyncio.to_thread(self._clear_folders, keys)

    async def _remove(self, key: str, handle: Handle) -> bool:
        """Have a backend remove what it keeps of a launch; say whether it has."""
        backend = self._backends.get(handle.backend)
        try:
            if backend is not None:
                await backend.remove(handle)
        except BackendAway as error:
            self._put_off_one(key, handle, error)
            return False
        except Exception as error:  # a backend's bug, which must cost its own launch at most
            self._tell_left(key, error)
            return False
        self._rounds.pop(handle.backend, None)
        return True

    def _put_off_one(self, key: str, handle: Handle, error: BackendAway) -> None:
        if handle.backend not in self._rounds:
            _log.warning("ended launches are removed later: %s", error)
            self._rounds[handle.backend] = 1
        if not self._put_off:
            self._begin(self._try_again(), "remove later")
        self._put_off[key] = handle

    async def _try_again(self) -> None:
        await self._patience.wait(max(self._rounds.values(), default=1))
        for name in {handle.backend for handle in self._put_off.values()}:
            self._rounds[name] = self._rounds.get(name, 0) + 1
        self._waiting.extend(self._put_off.items())
        self._put_off.clear()
        self.begin()

    def _clear_folders(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self._logs.finish(key)
                self._scratch.remove(key)
            except OSError as error:
                self._tell_left(key, error)

    def _tell_left(self, key: str, error: Exception) -> None:
        if isinstance(error, KohakuError | OSError):
            _log.warning("cannot remove what is left: %s", error, extra=about(key, self._node))
        else:
            explain(error, "removing", key, self._node)
