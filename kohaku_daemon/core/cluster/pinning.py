"""Which image a batch runs that was named by its reference: what the first node to ask found.

Knows: who may ask, and that the first word counts.
Does not know: registries. What a tag means there may change while a batch runs, and each of its
tasks runs the same image all the same.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.cluster.actions import Answer, SaveBatch
from kohaku_daemon.core.cluster.events import PinAsked
from kohaku_daemon.core.cluster.registries import credential_for
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState
from protocol.errors import BadRequest, Conflict, NotFound
from protocol.messages.runner import PinnedImage

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class Pinning:
    """Carries out what runners ask about images."""

    def __init__(self, state: ClusterState, scribe: Scribe) -> None:
        self._state = state
        self._scribe = scribe

    def pin(self, event: PinAsked) -> None:
        """Say what a batch runs, and with whose name to pull it.

        A credential is told to those only who have a task to run with it.

        Raises:
            NotFound: No task of that batch is on that node.
            Conflict: The batch runs another image.
            BadRequest: What was found is no digest.
        """
        batch = self._state.batches.get(event.batch)
        there = self._state.tasks_on(event.node).values()
        if batch is None or not any(task.batch == event.batch for task in there):
            raise NotFound(f"no task of batch {event.batch} is on node {event.node}")
        reference = batch.record.image.reference if batch.record.image is not None else ""
        if not reference or reference != event.reference:
            raise Conflict(f"batch {event.batch} does not run image {event.reference[:200]!r}")
        if event.digest and not _DIGEST.fullmatch(event.digest):
            raise BadRequest("digest must be sha256: and 64 hexadecimal digits")
        if event.digest and not batch.record.pinned:
            batch.record = replace(batch.record, pinned=event.digest)
            self._scribe.add(SaveBatch(batch.record))
        credential = credential_for(self._state, reference)
        self._scribe.add(Answer(PinnedImage(batch.record.pinned, credential)))
