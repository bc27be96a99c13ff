"""Reports that wait for the link: the newest of each launch.

Knows: what has to be said, what can wait a little because a newer word may come, and how much
of it fits one message.
Does not know: the link. What is here is said anew when the host is reached again, so it may
be dropped at any time a new link has said all.

An end is said at once: somebody waits for it. A step on the way there is said after a moment,
which is longer than a short task lasts. So the host hears of that one only once, and has one
change to commit for it and not three; the end says when the launch started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from protocol.messages.runner import AttemptReport, AttemptState

#: Reports in one message.
MOST_REPORTS: Final = 256
#: Bytes of reports in one message: half of what a control message may hold, as an inventory
#: may be in it too.
MOST_BYTES: Final = 128 * 1024
#: Seconds a step waits for the next one.
_LINGER_S: Final = 0.025

_size_of: Final = msgspec.msgpack.Encoder().encode


class Outbox:
    """What has changed and has not been said."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, int], AttemptReport] = {}
        #: Steps, each with the time since when one of its launch waits, the oldest first.
        self._steps: dict[tuple[int, int], tuple[float, AttemptReport]] = {}
        self._filled = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, report: AttemptReport) -> None:
        """Have a launch reported; an older report of it is said no more."""
        name = (report.task, report.attempt)
        if report.state is AttemptState.ENDED:
            self._steps.pop(name, None)
            self._ends[name] = report
            self._filled.set()
        elif name in self._steps:
            # It keeps its place: a launch that is busy would never be heard of else.
            self._steps[name] = (self._steps[name][0], report)
        else:
            self._steps[name] = (asyncio.get_running_loop().time(), report)
            self._wait_for_steps()

    def clear(self) -> None:
        """Drop everything: it is said in another way."""
        self._ends.clear()
        self._steps.clear()
        self._filled.clear()

    async def take(self) -> tuple[AttemptReport, ...]:
        """Wait for reports and take as many as fit one message: ends first, then steps."""
        group: tuple[AttemptReport, ...] = ()
        while not group:
            await self._filled.wait()
            group = next(pages([*self._ends.values(), *self._find_ripe()]), ())
            for report in group:
                name = (report.task, report.attempt)
                if self._ends.pop(name, None) is None:
                    del self._steps[name]
            if not self._ends and not self._find_ripe():
                self._filled.clear()
                self._wait_for_steps()
        return group

    def _find_ripe(self) -> list[AttemptReport]:
        """Give the steps that have waited long enough."""
        until, ripe = asyncio.get_running_loop().time() - _LINGER_S, []
        for since, report in self._steps.values():
            if since > until:
                break
            ripe.append(report)
        return ripe

    def _wait_for_steps(self) -> None:
        if self._timer is None and self._steps:
            since, _ = next(iter(self._steps.values()))
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(since + _LINGER_S, self._ripen)

    def _ripen(self) -> None:
        self._timer = None
        if self._steps:
            self._filled.set()


def pages(reports: Iterable[AttemptReport]) -> Iterator[tuple[AttemptReport, ...]]:
    """Divide reports into what fits one message each."""
    page: list[AttemptReport] = []
    size = 0
    for report in reports:
        more = len(_size_of(report))
        if page and (len(page) == MOST_REPORTS or size + more > MOST_BYTES):
            yield tuple(page)
            page, size = [], 0
        page.append(report)
        size += more
    if page:
        yield tuple(page)
