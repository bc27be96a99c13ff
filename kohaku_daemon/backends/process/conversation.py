"""One keeper, as the runner talks to it: its answers, and the ends it tells.

Knows: which launches wait for an answer, which ones run, what the keeper has said of each.
Does not know: how a keeper is started or chosen (``link``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from kohaku_daemon.backends.process import keeper, tree
from kohaku_daemon.backends.process.launching import STARTED
from kohaku_daemon.backends.process.record import Ending, LaunchPlan

_log = logging.getLogger(__name__)

#: Seconds after which a keeper without an answer is replaced: far longer than a start takes
#: on a busy machine with its programs on a slow share. Its other launches wait so long too.
ANSWER_S: Final = 60.0
#: Seconds a keeper with nothing to keep may take to end when told to.
_END_S: Final = 5.0
#: Told of a launch's end; None if its keeper was lost first.
OnOver = Callable[[Ending | None], None]


#: Of the standard library's JSON each launch's line takes 20 us, and its two answers take 4.
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


class Answer(NamedTuple):
    """What a keeper says of a launch: see ``launching``, or VANISHED."""

    kind: str
    text: str = ""
    #: UTC seconds, if STARTED.
    started_at: float = 0.0


@dataclass(slots=True)
class _Live:
    """One launch that a keeper has started."""

    started_at: float
    ending: Ending | None = None
    on_over: OnOver | None = None


class _Asked(NamedTuple):
    """A launch that waits for an answer; None is given if the keeper ended without one."""

    name: str
    #: By the event loop's clock.
    until: float
    answer: asyncio.Future[Answer | None]


class Conversation(asyncio.Protocol):
    """One keeper, the launches that wait for its answer, and those it has started."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._hello: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._pid = self._guard = 0
        self._starts = (0, 0)
        self._count = 0
        #: The first has waited longest.
        self._waiting: dict[int, _Asked] = {}
        self._late: asyncio.TimerHandle | None = None
        self._live: dict[str, _Live] = {}
        self._unread = b""
        self._unsent: list[bytes] = []
        self._is_retiring = False
        self._running = 0
        self._idle_since = asyncio.get_running_loop().time()
        self.is_lost = False

    def __repr__(self) -> str:
        return f"Conversation(pid={self._pid}, waiting={len(self._waiting)})"

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def is_open(self) -> bool:
        return not (self.is_lost or self._is_retiring)

    @property
    def busy(self) -> int:
        return len(self._waiting)

    @property
    def idle_s(self) -> float:
        """Say for how many seconds it has had nothing to do; 0.0 if it has."""
        if self._waiting or self._running:
            return 0.0
        return asyncio.get_running_loop().time() - self._idle_since

    def let_go(self) -> None:
        """Ask it for no more: it ends when nothing is left that it keeps."""
        self._is_retiring = True
        if self._transport is not None:
            self._transport.close()

    async def ask(self, plan: LaunchPlan) -> Answer | None:
        """Give the answer, or None if the keeper ended without one."""
        self._count += 1
        number, loop = self._count, asyncio.get_running_loop()
        name, until = os.path.basename(plan["record"]), loop.time() + ANSWER_S
        asked = self._waiting[number] = _Asked(name, until, loop.create_future())
        self._send(_write_line(number, plan))
        if self.is_lost:
            self._settle_all()
        if self._late is not None and self._late.when() > asked.until:
            self._late.cancel()
            self._late = None
        if self._late is None:
            # One timer for all: a timeout for each launch would cost it 15 us.
            self._late = loop.call_at(asked.until, self._give_up_late)
        try:
            return await asked.answer
        finally:
            self._waiting.pop(number, None)

    async def wait_for_hello(self) -> None:
        """Wait until it is there.

        Raises:
            OSError: It has ended, or says nothing.
        """
        try:
            async with asyncio.timeout(ANSWER_S):
                self._pid, first, self._guard, second = await self._hello
        except TimeoutError as error:
            raise OSError("a new keeper says nothing") from error
        self._starts = first, second

    def watch(self, name: str, on_over: OnOver) -> float | None:
        live = self._live.get(name)
        if live is None or (self.is_lost and live.ending is None):
            return None
        live.on_over = on_over
        if live.ending is not None:
            asyncio.get_running_loop().call_soon(self._tell, name)
        return live.started_at

    def unwatch(self, name: str) -> None:
        live = self._live.get(name)
        if live is not None:
            live.on_over = None

    def has_ended(self, name: str) -> bool:
        live = self._live.get(name)
        return live is not None and live.ending is not None

    def forget(self, name: str) -> None:
        self._live.pop(name, None)

    async def close(self) -> None:
        if self._late is not None:
            self._late.cancel()
        is_idle = all(live.ending is not None for live in self._live.values())
        for live in self._live.values():
            live.on_over = None
        if self._transport is not None:
            self._transport.close()
        if is_idle and not self._waiting and self._guard:
            await asyncio.to_thread(_wait_for_end, self._guard, self._starts[1])

    # What the keeper says --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a stream socket"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take(_read_line(line))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if not self._hello.done():
            self._hello.set_exception(OSError("a new keeper ended at once"))
        self._settle_all()
        for name, live in self._live.items():
            if live.ending is None:
                self._tell(name)

    def _take(self, said: list[Any]) -> None:
        kind = said[0]
        if kind == keeper.OVER:
            self._running -= 1
            self._idle_since = asyncio.get_running_loop().time()
            live = self._live.get(said[1])
            if live is not None:
                live.ending = Ending(*said[2])
                self._tell(said[1])
        elif kind == keeper.RETIRING:
            self._is_retiring = True
        elif kind == keeper.HELLO:
            self._hello.set_result(said[1:])
        else:
            self._running += kind == STARTED
            self._answer(said[1], Answer(kind, said[2], said[3]))

    def _answer(self, number: int, answer: Answer) -> None:
        asked = self._waiting.pop(number, None)
        if asked is None:
            return
        if answer.kind == STARTED:
            self._live[asked.name] = _Live(answer.started_at)
        if not asked.answer.done():
            asked.answer.set_result(answer)

    def _tell(self, name: str) -> None:
        live = self._live.get(name)
        if live is not None and live.on_over is not None:
            on_over, live.on_over = live.on_over, None
            on_over(live.ending)

    def _settle_all(self) -> None:
        for asked in self._waiting.values():
            if not asked.answer.done():
                asked.answer.set_result(None)

    def _give_up_late(self) -> None:
        """Replace a keeper that owes an answer for too long.

        Whatever holds it, its guard goes on, and another keeper finds its launches taken, or
        takes them.
        """
        self._late, loop = None, asyncio.get_running_loop()
        oldest = next(iter(self._waiting.values()), None)
        if oldest is None:
            return
        if oldest.until <= loop.time():
            _log.warning("keeper %d does not answer; replacing it", self._pid)
            self._is_retiring = True
            self._kill()
            self._settle_all()
        else:
            self._late = loop.call_at(oldest.until, self._give_up_late)

    # What it is told -------------------------------------------------------------------

    def _send(self, line: bytes) -> None:
        """Send soon, with all that is to be sent by then: one message for a batch."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(line)

    def _flush(self) -> None:
        lines, self._unsent = self._unsent, []
        if self._transport is not None and not self.is_lost:
            self._transport.write(b"".join(lines))

    def _kill(self) -> None:
        descriptor = tree.open_process(self._pid, self._starts[0])
        if descriptor is not None:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)


def _wait_for_end(pid: int, start: int) -> None:
    descriptor = tree.open_process(pid, start)
    if descriptor is None:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(1000 * _END_S):
            _log.warning("guard %d does not end", pid)
    finally:
        os.close(descriptor)


def _write_line(number: int, plan: LaunchPlan) -> bytes:
    try:
        return _encode((number, plan)) + b"\n"
    except UnicodeEncodeError:  # folders may have names that are no UTF-8: as escapes
        return json.dumps((number, plan)).encode() + b"\n"


def _read_line(line: bytes) -> list[Any]:
    try:
        said: list[Any] = _decode(line)
    except msgspec.DecodeError:  # as above
        said = json.loads(line)
    return said
