"""Has backends remove what an earlier run, or a crash, left of launches that nobody wants.

Knows: how often.
Does not know: what a backend leaves behind, which launches there are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NoReturn

from kohaku_daemon.backends.base import Backend, BackendAway
from kohaku_daemon.core.workload import Handle

_log = logging.getLogger(__name__)

_PERIOD_S: Final = 60.0


class Tidying:
    """Keeps the machine free of what nobody wants."""

    def __init__(
        self, backends: Mapping[str, Backend], wanted: Callable[[], Iterable[Handle]]
    ) -> None:
        """``wanted`` gives the handle of every launch that is planned and not removed."""
        self._backends = backends
        self._wanted = wanted
        #: By backend, why it could not tidy up the last time.
        self._troubles: dict[str, str] = {}

    async def run(self) -> NoReturn:
        """Tidy up until cancelled. Begun once the host has taken this run of the runner in."""
        while True:
            for name, backend in self._backends.items():
                await self._tidy(name, backend)
            await asyncio.sleep(_PERIOD_S)

    async def _tidy(self, name: str, backend: Backend) -> None:
        wanted = [handle for handle in self._wanted() if handle.backend == name]
        try:
            await backend.tidy(wanted)
        except BackendAway:
            pass  # it is told as unwell, and there is a next time
        except Exception as error:
            # It refused, or has a bug: what is left takes room, and is no reason to end a runner.
            if repr(error) != self._troubles.get(name):
                _log.warning("backend %s cannot tidy up", name, exc_info=error)
            self._troubles[name] = repr(error)
        else:
            self._troubles.pop(name, None)
