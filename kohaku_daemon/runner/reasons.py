"""What is said of a launch that something went wrong with: to the log, and to the task's owner.

Knows: how a line of the log names its launch, which errors are for people, how long they may be.
Does not know: how a line is written (``kohaku_daemon.logs``), what is done about it.
"""

from __future__ import annotations

import logging
import secrets
from typing import Final

from kohaku_daemon.backends.base import BackendAway
from protocol.errors import KohakuError

_log = logging.getLogger(__name__)

#: Characters of a text a backend gives for people. A report has to fit a message.
_LONGEST_TEXT: Final = 2000


def about(key: str, node: str = "") -> dict[str, str]:
    """Give the fields of a launch, for ``extra``. ``key`` is ``TASK-ATTEMPT``."""
    task, _, attempt = key.partition("-")
    fields = {"task": task, "attempt": attempt}
    return fields | {"node": node} if node else fields


def explain(error: Exception, doing: str, key: str, node: str) -> str:
    """Log why a backend failed, and say it to people as far as it is for them.

    Only its own errors are; others are bugs of ours, which are told by an incident number.
    """
    if isinstance(error, KohakuError):
        _log.warning("%s failed: %s", doing, error, extra=about(key, node))
        return cut(error.message)
    incident = secrets.token_hex(4)
    fields = about(key, node)
    _log.error("%s failed, incident %s", doing, incident, exc_info=error, extra=fields)
    return f"{doing} it failed on its node, incident {incident} in the runner's log"


def waits_for(backend: str, error: BackendAway) -> str:
    """Say of a launch that nothing can be done with it while its backend is away."""
    return cut(f"waiting for {backend}: {error.message}")


def cut(text: str) -> str:
    """Give a text no longer than a report may be."""
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
