"""The thread that commits: one piece of work after the other, told to the event loop when done.

Knows: handing work over and its outcome back, with as little of both threads' time as that takes.
Does not know: what is written. A pool of ``concurrent.futures`` does the same with two futures
and a lock for each piece: 60 us of 250 that a small commit takes (measured).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

#: Told how a piece of work went: None, or what it raised.
OnDone = Callable[[BaseException | None], None]


class _Piece(NamedTuple):
    work: Callable[[], None]
    on_done: OnDone
    loop: asyncio.AbstractEventLoop


class Writer:
    """One thread with an inbox. Of its own: in a shared pool a commit could wait for a disk
    that hangs.
    """

    def __init__(self, name: str) -> None:
        """Make one without a thread, which begins with the first piece; ``name`` is for people."""
        self._name = name
        self._inbox = SimpleQueue[_Piece | None]()
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], None], on_done: OnDone) -> None:
        """Have work done, and ``on_done`` called on the event loop that runs now."""
        if self._thread is None:
            # A daemon: whoever fails before it closes this shall end all the same.
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._inbox.put(_Piece(work, on_done, asyncio.get_running_loop()))

    async def run(self, work: Callable[[], None]) -> None:
        """Have work done, and wait for it. Raises what the work raises.

        Who stops waiting does not stop the work.
        """
        outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell(error: BaseException | None) -> None:
            if outcome.done():  # nobody waits any more
                return
            if error is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(error)

        self.put(work, tell)
        await outcome

    def close(self) -> None:
        """Let the thread end once its inbox is empty, and wait for it."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while (piece := self._inbox.get()) is not None:
            error: BaseException | None = None
            try:
                piece.work()
            except BaseException as reason:  # told to who waits for it
                error = reason
            if not piece.loop.is_closed():
                piece.loop.call_soon_threadsafe(piece.on_done, error)
            del piece, error  # keep nothing while there is nothing to do
