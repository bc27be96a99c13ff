"""Reports that wait for the link: the newest of each launch.

Knows: what has to be said, and how much of it fits one message.
Does not know: the link. What is here is said anew when the host is reached again, so it may
be dropped at any time a new link has said all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from protocol.messages.runner import AttemptReport

#: Reports in one message.
MOST_REPORTS: Final = 256
#: Bytes of reports in one message: half of what a control message may hold, as an inventory
#: may be in it too.
MOST_BYTES: Final = 128 * 1024

_size_of: Final = msgspec.msgpack.Encoder().encode


class Outbox:
    """What has changed and has not been said."""

    def __init__(self) -> None:
        self._reports: dict[tuple[int, int], AttemptReport] = {}
        self._filled = asyncio.Event()

    def put(self, report: AttemptReport) -> None:
        """Have a launch reported; an older report of it is said no more."""
        self._reports.pop((report.task, report.attempt), None)
        self._reports[report.task, report.attempt] = report
        self._filled.set()

    def clear(self) -> None:
        """Drop everything: it is said in another way."""
        self._reports.clear()
        self._filled.clear()

    async def take(self) -> tuple[AttemptReport, ...]:
        """Wait for reports and take as many as fit one message, the oldest first."""
        await self._filled.wait()
        group = next(pages(self._reports.values()))
        for report in group:
            del self._reports[report.task, report.attempt]
        if not self._reports:
            self._filled.clear()
        return group


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
