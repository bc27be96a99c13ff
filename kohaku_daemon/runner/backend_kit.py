"""The backends of a runner: opened at its start, and again for as long as one does not work.

Knows: which ones the configuration wants, which is the default, when another try is due.
Does not know: what makes one work, what else the runner does with them.

What keeps a backend from working may pass, like a full disk. Nobody should have to restart a
runner for it, as its node takes no task until then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kohaku_daemon.backends.base import Backend
from kohaku_daemon.backends.registry import DEFAULT_BACKENDS, BackendPlace, make_backend
from protocol.models.node import BackendInfo

_log = logging.getLogger(__name__)

#: Seconds between tries of a backend that does not work: each starts a process or two.
_AGAIN_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class BackendKit:
    """The open backends of a runner, by name."""

    backends: Mapping[str, Backend]
    #: In the order of ``backends``.
    infos: tuple[BackendInfo, ...]
    #: Of tasks that name none.
    default: str


async def open_backends(
    names: Iterable[str], wanted_default: str, place: BackendPlace
) -> BackendKit:
    """Open each backend once, in the given order; ``auto`` stands for the usual ones.

    Raises:
        Unsupported: There is none of that name.
    """
    backends = {name: make_backend(name, place) for name in _expand(names)}
    infos = []
    for backend in backends.values():
        info = await backend.open()
        _tell(info)
        infos.append(info)
    return BackendKit(backends, tuple(infos), choose_default(wanted_default, infos))


class Reopening:
    """Opens backends again that do not work."""

    def __init__(
        self,
        kit: BackendKit,
        wanted_default: str,
        on_change: Callable[[tuple[BackendInfo, ...], str], None],
    ) -> None:
        """``on_change`` gets what all backends are like now, and the default."""
        self._kit = kit
        self._wanted = wanted_default
        self._infos = kit.infos
        self._on_change = on_change
        self._due = asyncio.Event()

    def hurry(self) -> None:
        """Try now: something has become better."""
        self._due.set()

    async def run(self) -> None:
        """Try from time to time until all work."""
        while not all(info.healthy for info in self._infos):
            with suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S):
                    await self._due.wait()
            self._due.clear()
            await self._try()

    async def _try(self) -> None:
        before = self._infos
        pairs = zip(before, self._kit.backends.values(), strict=True)
        self._infos = tuple([await self._open(info, backend) for info, backend in pairs])
        if self._infos != before:
            self._on_change(self._infos, choose_default(self._wanted, self._infos))

    async def _open(self, before: BackendInfo, backend: Backend) -> BackendInfo:
        if before.healthy:
            return before
        try:
            info = await backend.open()
        except Exception as bug:  # of the backend: it goes on as it was
            _log.error("cannot open backend %s again", before.name, exc_info=bug)
            return before
        if info != before:
            _tell(info)
        return info


def choose_default(wanted: str, infos: Iterable[BackendInfo]) -> str:
    """Give the one that was chosen, or the first that works; none working, the first there is."""
    by_health = sorted(infos, key=lambda info: not info.healthy)
    return wanted or (by_health[0].name if by_health else "")


def _expand(wanted: Iterable[str]) -> list[str]:
    """Give each backend once, in the order of the configuration."""
    names: dict[str, None] = {}
    for name in wanted:
        names.update(dict.fromkeys(DEFAULT_BACKENDS if name == "auto" else (name,)))
    return list(names)


def _tell(info: BackendInfo) -> None:
    facts = {
        "backend": info.name,
        "isolation": info.isolation,
        "enforces": ", ".join(info.enforces),
    }
    if info.healthy:
        _log.info("backend ready", extra=facts)
    else:
        _log.error("backend unusable: %s", info.message, extra=facts)
