"""Opening data connections: tickets, and what travels on the ``logs`` kind.

Bulk data never shares a connection with control (SPEC, "Data connections").
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from protocol.ids import NamedTask

#: A byte of an output, counted from its beginning, or below 0 from its end.
LogOffset = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Source(StrEnum):
    """Which output of a task."""

    STDOUT = "stdout"
    STDERR = "stderr"


class OpenLogs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ask for a ticket to read a task's output."""

    task: NamedTask
    #: Counted from 1; None for the last attempt.
    attempt: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] | None = None
    #: Which outputs; both by default.
    sources: tuple[Source, ...] = (Source.STDOUT, Source.STDERR)
    #: Byte offset to begin at, for each output; negative counts from the end.
    stdout_from: LogOffset = 0
    stderr_from: LogOffset = 0
    #: Only the last lines of each output; 0 for all from the offset.
    tail_lines: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    #: Go on until the task ends.
    follow: bool = False


class Ticket(msgspec.Struct, frozen=True):
    """Leave to open one data connection, once, within its time."""

    ticket: str
    #: Path on the host to open as a WebSocket with ``Authorization: Ticket TICKET``.
    path: str
    expires_at: float


class LogChunk(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Bytes of one output. On the wire ``[1, source, offset, data]``."""

    source: Source
    #: Of the first byte, in that output's file.
    offset: int
    data: bytes


class LogEnd(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """All was sent. On the wire ``[2, stdout_end, stderr_end, dropped, error]``."""

    #: Offsets just after the last byte of each output.
    stdout_end: int
    stderr_end: int
    #: Bytes that the size cap kept out of the files.
    dropped: int = 0
    #: Why it ended before its end, as an error's code and message; empty if it did not.
    error: tuple[str, ...] = ()


LogItem = LogChunk | LogEnd
