"""The backends of a runner: opened at its start, and watched from then on.

Knows: which ones the configuration wants, which is the default, when one counts as unwell and
when another try is due.
Does not know: what makes one work, what else the runner does with them.

What keeps a backend from working may pass, like a full disk or a daemon that is restarted.
Nobody should have to restart a runner for it, as its node takes no task there until then.

Of those that ``auto`` stands for, one that finds nothing on this machine to work with is left
out until it does: a machine without Docker is as good as any other. Once a backend was there,
it stays: gone, it is one that is unwell.

The default is chosen when the runner starts, and stays with the first that works: what works
for a moment only must not send tasks that name no backend to another one, where they would see
another machine. It changes only while it has never worked in this run of the runner. Whoever
wants one and no other, whichever comes up first, names it in the configuration.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

from msgspec.structs import replace

from kohaku_daemon.backends.base import Backend, BackendAbsent
from kohaku_daemon.backends.registry import DEFAULT_BACKENDS, BackendPlace, make_backend
from protocol.errors import KohakuError
from protocol.models.node import BackendInfo

_log = logging.getLogger(__name__)

#: Seconds between tries of a backend that does not work: each starts a process or two.
_AGAIN_S: Final = 30.0
#: Seconds between looks at those that do.
_LOOK_S: Final = 1.0
#: Seconds of trouble until the host is told: a daemon that is restarted is back by then, and
#: what it is asked meanwhile waits for it.
_PATIENCE_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class BackendKit:
    """The backends of a runner, by name, also such as are left out."""

    backends: Mapping[str, Backend]
    #: Of those that are not left out, in the order of ``backends``.
    infos: tuple[BackendInfo, ...]
    #: Of tasks that name none.
    default: str
    #: Those that may be left out.
    optional: frozenset[str] = frozenset()


async def open_backends(
    names: Iterable[str], wanted_default: str, place: BackendPlace
) -> BackendKit:
    """Open each backend once, in the given order; ``auto`` stands for the usual ones.

    Raises:
        Unsupported: There is none of that name.
    """
    names = list(names)
    backends = {name: make_backend(name, place) for name in _expand(names)}
    optional = frozenset(DEFAULT_BACKENDS).difference(names)
    opened = [await _open(one, may_lack=name in optional) for name, one in backends.items()]
    infos = tuple(info for info in opened if info is not None)
    for info in infos:
        _tell(info)
    return BackendKit(backends, infos, choose_default(wanted_default, infos), optional)


class BackendWatch:
    """Sees how backends are, and opens those again that do not work."""

    def __init__(
        self,
        kit: BackendKit,
        wanted_default: str,
        on_change: Callable[[tuple[BackendInfo, ...], str], None],
        on_back: Callable[[], None],
    ) -> None:
        """Watch the backends of a kit, once ``run`` is called.

        Args:
            kit: As they are at the start.
            wanted_default: The default that was chosen; empty for the first that works.
            on_change: Gets what all backends are like now that are not left out, and the default.
            on_back: Called when one works again, whether or not anybody was told that it did not.
        """
        infos = {info.name: info for info in kit.infos}
        self._watched = [
            _Watched(backend, infos.get(name), may_lack=name in kit.optional)
            for name, backend in kit.backends.items()
        ]
        self._wanted = wanted_default
        self._default = kit.default
        self._told = kit.infos
        self._on_change = on_change
        self._on_back = on_back
        self._due = asyncio.Event()

    def hurry(self) -> None:
        """Try now: something has become better."""
        self._due.set()

    async def run(self) -> NoReturn:
        """Look, and try, until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._due.wait()
            is_urgent = self._due.is_set()
            self._due.clear()
            back = [await one.look(clock(), is_urgent=is_urgent) for one in self._watched]
            if any(back):
                self._on_back()
            self._tell_change()

    def _tell_change(self) -> None:
        infos = tuple(one.info for one in self._watched if one.info is not None)
        if infos == self._told:
            return
        self._told = infos
        if not any(one.has_worked and one.name == self._default for one in self._watched):
            self._default = choose_default(self._wanted, infos)
        self._on_change(infos, self._default)


class _Watched:
    """One backend under watch."""

    def __init__(self, backend: Backend, info: BackendInfo | None, *, may_lack: bool) -> None:
        self._backend = backend
        #: What is said of it; None while it is left out.
        self.info = info
        self._may_lack = may_lack
        self.name = backend.name
        self.has_worked = self._is_well
        #: By the loop's clock: since when it is in trouble, and when it was tried last.
        self._since: float | None = None
        self._tried = asyncio.get_running_loop().time()

    async def look(self, now: float, *, is_urgent: bool) -> bool:
        """See how it is, try it if that is due, and say whether it works again just now."""
        if not (self._see(now) or (is_urgent and not self._is_well)):
            return False
        self._tried = now
        await self._open_again()
        if self._is_well:
            self._since = None
            self.has_worked = True
        return self._is_well

    @property
    def _is_well(self) -> bool:
        return self.info is not None and self.info.healthy

    def _see(self, now: float) -> bool:
        """Take note of trouble; say whether it is to be tried now."""
        trouble = self._backend.trouble
        if self._since is not None and not trouble:
            self._since = None
            return True
        if self.info is None or not self.info.healthy:
            return now - self._tried >= _AGAIN_S
        if trouble:
            self._since = now if self._since is None else self._since
            if now - self._since >= _PATIENCE_S:
                self._set(replace(self.info, healthy=False, message=trouble))
        return False

    async def _open_again(self) -> None:
        try:
            info = await _open(self._backend, may_lack=self._may_lack and self.info is None)
        except Exception as bug:  # of the backend: it goes on as it was
            _log.error("cannot open backend %s again", self.name, exc_info=bug)
            return
        if info is not None and info.healthy and (trouble := self._backend.trouble):
            info = replace(info, healthy=False, message=trouble)
        self._set(info)

    def _set(self, info: BackendInfo | None) -> None:
        if info is not None and info != self.info:
            _tell(info)
        self.info = info


async def _open(backend: Backend, *, may_lack: bool) -> BackendInfo | None:
    """Open a backend; None if it may be left out, and finds nothing here to work with."""
    try:
        return await backend.open()
    except BackendAbsent as error:
        if may_lack:
            _log.debug("backend %s is left out: %s", backend.name, error)
            return None
        return BackendInfo(backend.name, healthy=False, message=error.message)
    except KohakuError as error:
        return BackendInfo(backend.name, healthy=False, message=error.message)


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
