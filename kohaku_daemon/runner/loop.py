"""The runner's one loop: events into the engine, its actions to the vault and then to the world.

Knows: that what comes together is committed together and before any of it is carried out,
and that what arrives during a commit gathers for the next one.
Does not know: what events mean, how actions are carried out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from kohaku_daemon.clock import Clock
from kohaku_daemon.core.node.actions import Forget, NodeAction, Remember
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.events import NodeEvent
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.runner.memory import Memory, encode_launch
from protocol.errors import Unavailable
from protocol.messages.runner import AttemptState

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: Seconds between tries to write what could not be written: the first, and the longest.
_RETRY_FIRST_S: Final = 0.25
_RETRY_LONGEST_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class _Question:
    """Asked in turn with the events; answered once all before it is on the disk."""

    ask: Callable[[NodeEngine], object]
    answer: asyncio.Future[Any]


class NodeLoop:
    """The only one that touches the engine."""

    def __init__(self, engine: NodeEngine, memory: Memory, clock: Clock) -> None:
        self._engine = engine
        self._memory = memory
        self._clock = clock
        self._entries: list[NodeEvent | _Question] = []
        self._more = asyncio.Event()
        self._recovered = asyncio.Event()
        #: Why the vault cannot be written; empty if it can.
        self.trouble = ""

    def post(self, event: NodeEvent) -> None:
        """Let an event be handled with the next group."""
        self._entries.append(event)
        self._more.set()

    async def ask(self, question: Callable[[NodeEngine], T]) -> T:
        """Ask the engine once all that was posted before is on the disk.

        The engine is then no further than the disk, so the answer may leave the machine.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._entries.append(_Question(question, answer))
        self._more.set()
        return await answer

    async def committed(self) -> None:
        """Wait until all that was posted before is on the disk."""
        await self.ask(lambda _: None)

    def live(self) -> list[LaunchRecord]:
        """Give the launches that run or are held, as they are thought of now."""
        return self._engine.live()

    def record(self, key: str) -> LaunchRecord | None:
        """Give one launch, as it is thought of now."""
        return self._engine.record(key)

    def is_live(self, key: str) -> bool:
        """Say whether a launch may still do something."""
        record = self._engine.record(key)
        return record is not None and record.state is not AttemptState.ENDED

    def unended(self) -> set[str]:
        """Give the keys of all launches that may still do something."""
        reports = self._engine.attempts()
        return {
            f"{report.task}-{report.attempt}"
            for report in reports
            if report.state is not AttemptState.ENDED
        }

    async def recovered(self) -> None:
        """Wait until the fate of every launch of an earlier run is known."""
        await self._recovered.wait()

    async def run(
        self, records: Iterable[LaunchRecord], carry_out: Callable[[NodeAction], None]
    ) -> NoReturn:
        """Take what the vault kept, then handle what is posted until cancelled.

        ``carry_out`` is given every action but ``Remember`` and ``Forget``, in order, and
        must not block.
        """
        for action in self._engine.recover(records, self._clock.now()):
            carry_out(action)
        while True:
            if self._engine.is_recovered:
                self._recovered.set()
            await self._more.wait()
            self._more.clear()
            entries, self._entries = self._entries, []
            await self._handle(entries, carry_out)

    async def _handle(
        self,
        entries: list[NodeEvent | _Question],
        carry_out: Callable[[NodeAction], None],
    ) -> None:
        kept: dict[str, bytes] = {}
        gone: set[str] = set()
        owed: list[NodeAction | _Question] = []
        for entry in entries:
            if isinstance(entry, _Question):
                owed.append(entry)
                continue
            for action in self._engine.handle(entry, self._clock.now()):
                match action:
                    case Remember(record):
                        # Encoded here and now: a later event may change the record.
                        kept[record.key] = encode_launch(record)
                        gone.discard(record.key)
                    case Forget(key):
                        kept.pop(key, None)
                        gone.add(key)
                    case _:
                        owed.append(action)
        if kept or gone:
            await self._commit(kept, gone)
        for debt in owed:
            if isinstance(debt, _Question):
                self._answer(debt)
            else:
                carry_out(debt)

    def _answer(self, question: _Question) -> None:
        if not question.answer.done():  # who asked may have gone
            question.answer.set_result(question.ask(self._engine))

    async def _commit(self, kept: dict[str, bytes], gone: set[str]) -> None:
        """Write, however often it takes: the engine is ahead of the disk and must not be alone."""
        wait_s = _RETRY_FIRST_S
        while True:
            try:
                await self._memory.keep_launches(kept, gone)
            except Unavailable as error:
                if not self.trouble:
                    _log.error("cannot keep launches, will go on trying: %s", error)
                self.trouble = error.message
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, _RETRY_LONGEST_S)
                continue
            if self.trouble:
                _log.warning("launches can be kept again")
                self.trouble = ""
            return
