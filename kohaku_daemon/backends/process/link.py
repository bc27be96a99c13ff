"""The runner's keepers: a few, started when there is something to launch.

Knows: how keepers are started, chosen, noticed to be gone, and replaced.
Does not know: what is said to one of them (``conversation``), or what answers and ends mean
for a task (``backend``).
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.process.conversation import Answer, Conversation, OnOver
from kohaku_daemon.backends.process.launching import STARTED
from kohaku_daemon.backends.process.record import LaunchPlan

#: No keeper answered: whether the program ran is in the record, or lost.
VANISHED: Final = "vanished"

_ROOT: Final = Path(__file__).resolve().parents[3]
_BOOT: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from kohaku_daemon.backends.process.guard import main; main(int(sys.argv[2]), sys.argv[3])"
)
#: Keepers that may end under one launch before it is given up.
_TRIES: Final = 5
#: Keepers at most: one starts and ends some 1,000 programs a second, and stands still while the
#: kernel loads each. Two also where there are few cores, so that one works meanwhile.
_MOST: Final = max(2, min(4, (os.cpu_count() or 1) // 4))
#: Launches without an answer at which one more keeper is started, if it may.
_BUSY: Final = 4
#: Seconds after its last launch ended that a keeper is let go of. One stays, so that a launch
#: need not wait for a start; more are 20 MB each for nothing.
_IDLE_S: Final = 10.0


class KeeperLink:
    """A few keepers, started when there is something to launch."""

    def __init__(self, root: Path, log: Path) -> None:
        """Make a link without a keeper.

        Args:
            root: Folder of the records.
            log: File for what a keeper has to say that nobody expected.
        """
        self._root = root
        self._log_path = log
        self._all: list[Conversation] = []
        self._by_name: dict[str, Conversation] = {}
        #: Launches that more than one keeper may have been told of.
        self._asked_again: set[str] = set()
        self._changing = asyncio.Lock()
        self._look: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"KeeperLink({self._all})"

    @property
    def pids(self) -> list[int]:
        """Pids of the keepers that take launches."""
        return [one.pid for one in self._all if one.is_open]

    async def launch(self, plan: LaunchPlan) -> Answer:
        """Launch, and give the keeper's answer.

        A keeper that ends before it answers is replaced and another one asked: whoever takes
        the record first runs it, the other one answers ``taken``.

        Raises:
            OSError: No keeper can be started.
        """
        name = os.path.basename(plan["record"])
        for _ in range(_TRIES):
            conversation = self._choose() or await self._start_one()
            answer = await conversation.ask(plan)
            if answer is not None and answer.kind == STARTED:
                self._by_name[name] = conversation
                return answer
            self._asked_again.add(name)
            if answer is not None:
                return answer
        return Answer(VANISHED)

    def watch(self, name: str, on_over: OnOver) -> float | None:
        """Have the end of a launch told, once; give when it started in UTC seconds.

        None if no keeper of ours has it.
        """
        conversation = self._by_name.get(name)
        return None if conversation is None else conversation.watch(name, on_over)

    def unwatch(self, name: str) -> None:
        """Do not tell of the end of a launch."""
        conversation = self._by_name.get(name)
        if conversation is not None:
            conversation.unwatch(name)

    def has_ended(self, name: str) -> bool:
        """Say whether a keeper of ours has told that nothing is left of a launch."""
        conversation = self._by_name.get(name)
        return conversation is not None and conversation.has_ended(name)

    def is_done_with(self, name: str) -> bool:
        """Say whether a launch has ended and no keeper has its record open, or will."""
        return name not in self._asked_again and self.has_ended(name)

    def forget(self, name: str) -> None:
        """Forget a launch."""
        self._asked_again.discard(name)
        conversation = self._by_name.pop(name, None)
        if conversation is not None:
            conversation.forget(name)

    async def close(self) -> None:
        """Let go of the keepers. They end when nothing is left that they keep."""
        async with self._changing:
            if self._look is not None:
                self._look.cancel()
            every, self._all = self._all, []
            self._by_name.clear()
            await asyncio.gather(*(one.close() for one in every))

    def _choose(self) -> Conversation | None:
        """Choose the least busy keeper; None if one more should be started."""
        ready = [one for one in self._all if one.is_open]
        best = min(ready, key=lambda one: one.busy, default=None)
        if best is not None and (best.busy < _BUSY or len(ready) >= _MOST):
            return best
        return None

    async def _start_one(self) -> Conversation:
        async with self._changing:
            chosen = self._choose()
            if chosen is None:
                chosen = await _start_keeper(self._root, self._log_path)
                self._all = [one for one in self._all if not one.is_lost] + [chosen]
                self._look_soon()
            return chosen

    def _look_soon(self) -> None:
        if self._look is None and len(self._all) > 1:
            loop = asyncio.get_running_loop()
            self._look = loop.call_later(_IDLE_S, self._let_go_of_idle)

    def _let_go_of_idle(self) -> None:
        """Let go of keepers that nobody needs any more, up to the first one."""
        self._look = None
        self._all = [one for one in self._all if not one.is_lost]
        first = next((one for one in self._all if one.is_open), None)
        for one in self._all:
            if one is not first and one.idle_s >= _IDLE_S:
                one.let_go()
        self._look_soon()


async def _start_keeper(root: Path, log: Path) -> Conversation:
    ours, theirs = socket.socketpair()
    with theirs, log.open("ab") as errors:
        process = subprocess.Popen(  # noqa: ASYNC220  a vfork, 1 to 2 ms, seldom
            [
                sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOT,
                str(_ROOT), str(theirs.fileno()), str(root),
            ],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={"LANG": "C.UTF-8"},
        )  # fmt: skip
    try:
        # It forks the guard and ends.
        await asyncio.to_thread(process.wait)
        loop = asyncio.get_running_loop()
        _, conversation = await loop.create_connection(Conversation, sock=ours)
    except BaseException:  # whatever it was, cancellation too: no process is left without a link
        ours.close()
        process.kill()
        process.wait()
        raise
    await conversation.wait_for_hello()
    return conversation
