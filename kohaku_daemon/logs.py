"""Logging of a daemon: one line an event, on stderr.

Knows: how a record becomes a line. Does not know: who writes records. Ids belong into
``extra``, not into the text: they become ``key=value`` at the end of the line, or fields
of their own in JSON. What is logged may come from a stranger, so nothing in a record can
begin a new line or drive a terminal.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Final, TextIO

#: What every record has; the rest was given as ``extra``.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: C0 and C1 controls, DEL, and the line separators that some readers honour.
_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN: Final = re.compile(r"[^\s\"'=]+")


def set_up(level: str, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Send every record of ``level`` and above to ``stream``, stderr by default."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if as_json else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    # One line a request says nothing that our own events do not say better.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """``TIME LEVEL MODULE  what happened  key=value key=value``; a traceback is indented below."""

    def format(self, record: logging.LogRecord) -> str:
        """Make the line of one record."""
        line = (
            f"{_at(record)} {record.levelname:<7} {record.name}  {_one_line(record.getMessage())}"
        )
        fields = " ".join(f"{key}={_shown(value)}" for key, value in _extra(record).items())
        if fields:
            line += "  " + fields
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line = "\n    ".join([line, *map(_one_line, trace)])
        return line


class JsonLines(logging.Formatter):
    """One JSON object a line, for collectors."""

    def format(self, record: logging.LogRecord) -> str:
        """Make the line of one record."""
        fields: dict[str, Any] = {
            "at": _at(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        # What is said about the record itself is not to be replaced by an extra field.
        fields = _extra(record) | fields
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def _at(record: logging.LogRecord) -> str:
    text = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _OWN}


def _one_line(text: str) -> str:
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _shown(value: object) -> str:
    text = _one_line(str(value))
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
