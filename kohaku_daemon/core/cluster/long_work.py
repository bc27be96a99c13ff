"""Work on many tasks, done a piece at a time, so that nobody else waits long.

One request may make, end or release 100,000 tasks. Done in one go that would hold up everybody
for a second, and its commit as well. So such work is a generator: it stops after each task, and
goes on in the next turn once a piece is done. What is small is done at once. A request is
answered when all its pieces are.

Each piece is committed by itself, and the host may be killed between two. So whoever begins
such work sees to it that what is stored after any piece tells what is left of it (``recovery``).

Knows: how much one piece is, whose turn it is, which answer is owed for what.
Does not know: what is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Final

from kohaku_daemon.core.cluster.actions import Answer
from kohaku_daemon.core.cluster.scribe import Scribe
from protocol.ids import BatchId

#: Tasks of one piece, some 3 ms of work with what it takes to write and show them.
PIECE: Final = 500

#: Stops after each task; gives what the request is answered with.
Work = Generator[None, None, object]


class LongWork:
    """What is under way, and what waits for that."""

    def __init__(self, scribe: Scribe, piece: int = PIECE) -> None:
        self.piece = piece
        self._scribe = scribe
        #: Work with the number of its answer, 0 for none.
        self._going: deque[tuple[Work, int]] = deque()
        self._waiting: dict[BatchId, list[tuple[Work, int]]] = {}

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._going

    def answer(self, work: Work) -> None:
        """Begin with what the request at hand is answered by."""
        is_over, value = self._do_piece(work)
        if is_over:
            self._scribe.add(Answer(value))
        else:
            self._going.append((work, self._scribe.answer_later()))

    def answer_after(self, batch: BatchId, work: Work) -> None:
        """Answer the request at hand by what begins once a batch is ``whole``."""
        self._waiting.setdefault(batch, []).append((work, self._scribe.answer_later()))

    def whole(self, batch: BatchId) -> None:
        """Note that all tasks of a batch are made."""
        self._going.extend(self._waiting.pop(batch, ()))

    def begin(self, work: Work) -> None:
        """Begin with what nobody waits for."""
        is_over, _ = self._do_piece(work)
        if not is_over:
            self.put(work)

    def put(self, work: Work) -> None:
        """Have something done later that nobody waits for."""
        self._going.append((work, 0))

    def go_on(self) -> None:
        """Do the next piece of what had its last turn the longest ago."""
        if not self._going:
            return
        work, number = self._going.popleft()
        is_over, value = self._do_piece(work)
        if not is_over:
            self._going.append((work, number))
        elif number:
            self._scribe.add(Answer(value, number))

    def _do_piece(self, work: Work) -> tuple[bool, object]:
        """Do one piece; say whether it was the last, and what the answer is."""
        # One step may end a whole gang, which comes to more than one action.
        enough = len(self._scribe.out) + 4 * self.piece
        try:
            for _ in range(self.piece):
                next(work)
                if len(self._scribe.out) > enough:
                    break
        except StopIteration as done:
            return True, done.value
        return False, None
